"""graphopt as an ONNX backend: the interface of `onnx.backend.base`, for programs and tests that take any backend.

    import graphopt.backend as backend

    prepared = backend.prepare(model)                   # rewritten exactly, run by ONNX Runtime
    prepared = backend.prepare(model, engine="tvm")     # rewritten exactly, compiled for this processor
    y = prepared.run([x])[0]

Nothing is measured or chosen here: `graphopt.optimize` does that. What an engine cannot do raises an error that names
the operator; no model is run by another engine than the one asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.backend.base import Backend as OnnxBackend
from onnx.backend.base import BackendRep, namedtupledict

from graphopt import model as models
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.passes.base import Context, Pass
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.runtime.known_differences import Differences
from graphopt.shape_inputs import steering_inputs, with_constants

ENGINES = ("passes", "tvm")
"""`passes`: the passes alone, and ONNX Runtime runs what they make; `tvm`: that model compiled."""


class Prepared(BackendRep):
    """A model ready to run. Compiled code holds for one set of shapes: other shapes are compiled when they come."""

    def __init__(self, model: ir.Model, engine: str, threads: int | None):
        self.model = model
        """What the passes made of the model, an `onnx_ir.Model`."""
        self.engine = engine
        self.threads = threads
        signature = models.signature(model)
        self.inputs = signature.inputs
        """Name, element type and shape of each input, in the order that `run` takes them."""
        self.output_names = tuple(spec.name for spec in signature.outputs)
        self._steering = steering_inputs(model)
        self._compiled: dict[Any, Any] = {}
        self._session: Any = None
        self._differences = Differences(model, compiled=engine == "tvm")
        if engine == "passes":
            from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

            self._session = OnnxRuntimeEngine(models.to_bytes(model), threads)
        elif signature.is_static and not self._steering:
            self._compile({spec.name: tuple(map(int, spec.shape)) for spec in self.inputs if spec.shape}, {})  # pyright: ignore[reportArgumentType]

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, as a tuple whose fields also have the outputs' names.

        `inputs`: arrays in the order of `self.inputs`, one array where there is one input, or a mapping by name.
        Raises DataError where they do not fit, TargetError where the engine cannot compute the model for them.
        """
        feeds = self._feeds(inputs)
        outputs = self._engine_for(feeds).run({k: v for k, v in feeds.items() if self._takes(k)})
        return namedtupledict("Outputs", self.output_names)(*(outputs[name] for name in self.output_names))

    def _feeds(self, inputs: Any) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.inputs]
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
            if len(arrays) != len(names):
                raise DataError(f"{len(arrays)} inputs were given, the model takes {len(names)}: {', '.join(names)}")
            given = dict(zip(names, arrays, strict=True))
        for name in names:
            if name not in given:
                raise DataError(f"input {name!r} is missing")
        return {name: np.asarray(array) for name, array in given.items()}

    def _takes(self, name: str) -> bool:
        return self._session is not None or name not in self._steering

    def _engine_for(self, feeds: Mapping[str, np.ndarray]) -> Any:
        self._differences.check(feeds)
        if self._session is not None:
            return self._session
        fixed = {name: feeds[name] for name in self._steering}
        return self._compile({k: v.shape for k, v in feeds.items() if k not in fixed}, fixed)

    def _compile(self, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, np.ndarray]) -> Any:
        """The engine for these shapes of inputs and these values of steering inputs."""
        key = (
            tuple(sorted(shapes.items())),
            tuple((name, array.shape, str(array.dtype), array.tobytes()) for name, array in sorted(fixed.items())),
        )
        if key not in self._compiled:
            self._compiled[key] = self._built(shapes, fixed)
        return self._compiled[key]

    def _built(self, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, np.ndarray]) -> Any:
        from graphopt.runtime.tvm_engine import TvmEngine
        from graphopt.schedule_database import database_path
        from graphopt.targets.cpu import Cpu

        model = with_constants(self.model, fixed) if fixed else self.model
        dynamic = {spec.name for spec in self.inputs if not spec.is_static}
        model = models.fix_inputs(model, {name: shape for name, shape in shapes.items() if name in dynamic})
        target = Cpu(threads=self.threads or 0)
        lowered = target.lower(model)
        target.tune(lowered, seconds=0, database=database_path())
        folder = tempfile.mkdtemp(prefix="graphopt-backend-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        target.build(lowered, Path(folder))
        return TvmEngine(folder, self.threads)


class Backend(OnnxBackend):
    """The interface as a class, as `onnx.backend.test` takes it."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether `prepare` takes the model."""
        return True

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> Prepared:
        """See `graphopt.backend.prepare`."""
        return prepare(model, device, **kwargs)

    @classmethod
    def run_model(cls, model: Any, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """See `graphopt.backend.run_model`."""
        return prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """See `graphopt.backend.run_node`."""
        return run_node(node, inputs, device, outputs_info, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """See `graphopt.backend.supports_device`."""
        return supports_device(device)


def prepare(
    model: onnx.ModelProto | ir.Model | str | os.PathLike[str],
    device: str = "CPU",
    *,
    engine: str = "passes",
    passes: str | Pipeline | Iterable[Pass] = PRESETS["exact"],
    threads: int | None = None,
) -> Prepared:
    """Check a model, run `passes` on it, and get it ready on an engine.

    `model` is a ModelProto, an `onnx_ir.Model`, or a path (external data is found beside it); `engine` is `passes` or
    `tvm`; `threads` is the number of threads inside an operator, None for the engine's own choice. Compiled code takes
    decisions from the schedule database, and makes first guesses for kernels that are not in it (`graphopt tune`
    fills it). A model with dynamic shapes, or with inputs that decide shapes, is compiled when it first runs.

    Raises SpecError (device, engine or passes), ModelError (the model, or an operator that ONNX Runtime has no kernel
    for), PassError, DataError (a pass wants calibration data), UnsupportedOperatorError and TargetError (what TVM
    cannot compile).
    """
    if not supports_device(device):
        raise SpecError(f"there is no device {device!r} here", hint="the devices are CPU and CPU:0")
    if engine not in ENGINES:
        raise SpecError(f"unknown engine {engine!r}", hint=f"the engines are {' and '.join(ENGINES)}")
    pipeline = Pipeline.of(passes)
    rewritten, _ = pipeline.run(_checked(model), Context())
    return Prepared(rewritten, engine, threads)


def run_model(model: Any, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
    """`prepare` and one `run`."""
    return prepare(model, device, **kwargs).run(inputs)


def run_node(
    node: onnx.NodeProto,
    inputs: Any,
    device: str = "CPU",
    outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None,
    *,
    opset_version: int | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """One node on arrays, in the order of its inputs that are not left out.

    `opset_version`: of the node's domain; None: the newest that ONNX Runtime knows too. `outputs_info`, where given,
    has element type and shape of each output. Other arguments and errors are those of `prepare` and `Prepared.run`.
    """
    names = [name for name in dict.fromkeys(node.input) if name]
    arrays = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
    if len(arrays) != len(names):
        raise DataError(f"{len(arrays)} inputs were given, the node takes {len(names)}: {', '.join(names)}")
    helper = onnx.helper
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    outputs = [name for name in node.output if name]
    described = [helper.make_empty_tensor_value_info(name) for name in outputs]
    if outputs_info is not None:
        described = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
            for name, (dtype, shape) in zip(outputs, outputs_info, strict=True)
        ]
    graph = helper.make_graph([node], "node", infos, described)
    version = opset_version or _NEWEST_OPSET
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, version)], ir_version=10)
    if outputs_info is None:
        with contextlib.suppress(onnx.shape_inference.InferenceError):  # the check below says what is wrong
            proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    return run_model(proto, arrays, device, **kwargs)


def supports_device(device: str) -> bool:
    """Whether models run on `device`: `CPU` or `CPU:0`."""
    return device in ("CPU", "CPU:0")


_NEWEST_OPSET = 21


def _checked(model: Any) -> ir.Model:
    if isinstance(model, (str, os.PathLike)):
        return models.load(model)
    if isinstance(model, ir.Model):
        models.check(model, "the model")
        return model
    if not isinstance(model, onnx.ModelProto):
        raise ModelError(f"a model is a ModelProto, an onnx_ir.Model or a path, not {type(model).__name__}")
    return models.from_proto(model)


__all__ = ["ENGINES", "Backend", "Prepared", "prepare", "run_model", "run_node", "supports_device"]
