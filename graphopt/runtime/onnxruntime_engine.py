"""Run an ONNX model in ONNX Runtime on the CPU: the second engine of an artifact, and the numerical reference."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import opsets
from graphopt.errors import DataError, ModelError, TargetError, nearest
from graphopt.runtime import narrow_types


class OnnxRuntimeEngine:
    """An open ONNX Runtime session.

    `model` is a path (external data is found beside it) or the bytes of a model without external data.
    `threads` is the number of threads inside an operator, None for ONNX Runtime's choice; operators run one
    after another. `optimize=False` turns every graph optimisation off: then it computes what the file says, node
    by node, and can serve as a reference. `limit_s`: a run that takes longer is ended, a loop may be endless.

    Raises ModelError when the file is missing or ONNX Runtime refuses it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        threads: int | None = None,
        optimize: bool = True,
        limit_s: float | None = None,
    ) -> None:
        import onnxruntime

        self._limit_s = limit_s

        self._label = "the model" if isinstance(model, bytes) else str(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal only: its errors come back as exceptions, once
        options.inter_op_num_threads = 1
        if threads is not None:
            if threads < 1:
                raise TargetError(f"threads must be at least 1, not {threads}")
            options.intra_op_num_threads = threads
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        source = model if isinstance(model, bytes) else str(Path(model).absolute())
        if isinstance(source, str) and not Path(source).is_file():
            raise ModelError(f"no such file: {self._label}")
        self._failures = failures()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except self._failures as error:
            raise ModelError(
                f"ONNX Runtime cannot load {self._label}: {_too_new(source, error) or one_line(error)}"
            ) from error
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._output_list = list(self.output_names)
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        self._is_narrow = any(value.type in narrow_types.NAMES for value in values)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, for arrays of every input by name, in the model's shapes and dtypes.

        Raises DataError when inputs are missing, unknown, or of the wrong shape or dtype; TargetError when an
        operator fails.
        """
        try:
            values = self._values(feeds) if self._limit_s is None else self._limited(feeds)
        except (*self._failures, ValueError) as error:
            self._check(feeds)
            raise TargetError(f"ONNX Runtime failed on {self._label}: {one_line(error)}") from error
        return dict(zip(self.output_names, values, strict=True))  # type: ignore[arg-type]

    def _values(self, feeds: Mapping[str, np.ndarray], options: Any = None) -> Any:
        if not self._is_narrow:
            return self._session.run(self._output_list, feeds, options)
        given = {name: narrow_types.value_of(np.asarray(array)) for name, array in feeds.items()}
        made = self._session.run_with_ort_values(self._output_list, given, options)
        return [narrow_types.array_of(value) for value in made]

    def _limited(self, feeds: Mapping[str, np.ndarray]) -> Any:
        import onnxruntime

        options, limit = onnxruntime.RunOptions(), self._limit_s or 0.0
        ended: list[bool] = []

        def end() -> None:
            ended.append(True)
            options.terminate = True

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            return self._values(feeds, options)
        except self._failures as error:
            if ended:
                raise TargetError(f"one run of {self._label} in ONNX Runtime takes over {limit:g} s") from error
            raise
        finally:
            timer.cancel()

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Say what is wrong with the inputs, if they are what is wrong. Only called after a failure."""
        required = {value.name: value for value in self._session.get_inputs()}
        known = set(required) | {value.name for value in self._session.get_overridable_initializers()}
        for name in feeds:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"its inputs are: {', '.join(required)}"
                raise DataError(f"{self._label} has no input {name!r}", hint=hint)
        for name, value in required.items():
            if name not in feeds:
                raise DataError(f"{self._label} needs input {name!r}", hint=f"it is {value.type} of {value.shape}")
            given, wanted = np.asarray(feeds[name]), value.shape
            fits = len(wanted) == given.ndim and all(
                not isinstance(want, int) or want == have for want, have in zip(wanted, given.shape, strict=True)
            )
            dtype = _DTYPES.get(value.type)
            if not fits or (dtype is not None and given.dtype != dtype):
                raise DataError(
                    f"input {name!r} of {self._label} is {value.type} of shape {wanted}, "
                    f"but an array of {given.dtype} of shape {list(given.shape)} was given"
                )


_DTYPES = {
    f"tensor({theirs})": np.dtype(ours)
    for theirs, ours in (
        ("float", "float32"),
        ("double", "float64"),
        ("float16", "float16"),
        ("bool", "bool"),
        *((f"{sign}int{bits}", f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
}


def failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes share no base, and some of its failures are RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

    own = (item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))
    return (*own, RuntimeError)


def output_types(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Element type, as numpy names it, and shape of the outputs whose shapes are static, as ONNX Runtime infers them;
    scalars are left out, since it describes values of unknown rank like them. Raises ModelError."""
    engine = OnnxRuntimeEngine(file, 1, optimize=False)
    found = {}
    for value in engine._session.get_outputs():
        dtype, shape = _DTYPES.get(value.type), value.shape
        if dtype is not None and shape and all(isinstance(d, int) for d in shape):
            found[value.name] = str(dtype), tuple(int(d) for d in shape)
    return found


def _too_new(source: str | bytes, error: BaseException) -> str | None:
    """Which operators are newer than ONNX Runtime, where that is what is wrong."""
    if "opset version" not in str(error):
        return None
    import onnx

    newest = opsets.newest_versions()[0]
    bare = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source, load_external_data=False)
    changed = opsets.changed_since(bare, newest)
    return f"it knows opsets up to {newest}, and {', '.join(changed)} changed since" if changed else None


def one_line(error: BaseException) -> str:
    """An error of ONNX Runtime's in one line, without its own name, its number and places in its source."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=[A-Z\[])", "", text)
    return text[:300] if text else type(error).__name__
