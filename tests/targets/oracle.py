"""Build a small ONNX model, compile it, and compare with ONNX Runtime without its graph optimisations."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import executable

EPSILON = float(np.finfo(np.float32).eps)
TARGET = Cpu(threads=1)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), name=f"{op}_{outputs[0]}", **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
) -> ir.Model:
    """An ONNX model whose inputs look like the arrays given; the types of outputs are inferred."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "test",
        infos,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in (constants or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred)
    return ir.from_proto(inferred)


def reference(made: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays: list[Any] = list(session.run(None, dict(feeds)))
    return dict(zip([o.name for o in session.get_outputs()], arrays, strict=True))


def compiled(made: ir.Model, feeds: Mapping[str, np.ndarray], target: Cpu = TARGET, decisions=None):
    """The compiled model's outputs; `decisions` overrides the default ones by kernel."""
    import tvm

    lowered = target.lower(made)
    if decisions:
        lowered.decisions.update(decisions)
    program = loaded(target.scheduled(lowered), target)
    tensors = [tvm.runtime.tensor(np.asarray(feeds[str(spec["name"])], order="C")) for spec in lowered.inputs]
    result: Any = program["main"](*tensors)
    names = [str(spec["name"]) for spec in lowered.outputs]
    arrays = [result.numpy()] if hasattr(result, "numpy") else [item.numpy() for item in result]
    return dict(zip(names, arrays, strict=True))


def loaded(module, target: Cpu) -> Any:
    """The virtual machine of a scheduled module, compiled into a library and opened."""
    import tvm
    from tvm import relax

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "model.so"
        executable.export(module, target.tvm_target(), library, arch=target.capabilities.arch, jobs=2)
        opened: Any = tvm.runtime.load_module(str(library))
        processor: Any = tvm.cpu()
        return relax.VirtualMachine(opened, processor)


def agree(made: ir.Model, feeds: Mapping[str, np.ndarray], tolerance: float, target: Cpu = TARGET) -> None:
    """Every output equals ONNX Runtime's within `tolerance` times its largest magnitude (at least 1)."""
    close(compiled(made, feeds, target), reference(made, feeds), tolerance)


def close(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, expected in wanted.items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        if expected.dtype.kind == "f":
            scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
            worst = float(np.abs(found[name] - expected).max(initial=0.0))
            assert worst <= tolerance * scale, (
                f"{name}: {worst / scale:.3g} of the largest magnitude, > {tolerance:.3g}"
            )
        else:
            np.testing.assert_array_equal(found[name], expected)


def sum_tolerance(terms: int) -> float:
    """Two orders of summation of `terms` products of numbers in [-1, 1].

    Rounding errors of a running sum are a random walk: `terms` steps of eps * sqrt(terms) / 2, so about
    eps * terms / 2 in all, for each of the two; 8 standard deviations.
    """
    return 8 * EPSILON * max(terms, 4)


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
