"""The ONNX backend interface: both engines, dynamic shapes, inputs that steer, errors that name what is wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import backend
from graphopt.errors import DataError, GraphoptError, ModelError, SpecError, UnsupportedOperatorError

ENGINES = pytest.mark.parametrize("engine", backend.ENGINES)


def model_of(nodes, inputs, outputs, constants=None, opset=17, ir_version=10):
    """`inputs` and `outputs`: name to (element type, shape)."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


FLOAT = TensorProto.FLOAT
RELU = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [2, 3])}, {"y": (FLOAT, [2, 3])})
X = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)


@ENGINES
def test_a_model_runs_on_arrays_and_on_names(engine):
    prepared = backend.prepare(RELU, engine=engine, threads=1)
    for given in ([X], X, {"x": X}):
        outputs: Any = prepared.run(given)
        np.testing.assert_array_equal(outputs[0], np.maximum(X, 0))
        np.testing.assert_array_equal(outputs["y"], np.maximum(X, 0))
        assert isinstance(outputs, tuple)


@ENGINES
def test_run_model_and_a_file(engine, tmp_path):
    onnx.save(RELU, str(tmp_path / "relu.onnx"))
    found = [backend.run_model(source, [X], engine=engine)[0] for source in (RELU, tmp_path / "relu.onnx")]
    np.testing.assert_array_equal(*found)


@ENGINES
def test_one_node(engine):
    node = helper.make_node("Add", ["a", "b"], ["c"])
    found: Any = backend.run_node(node, [X, X], engine=engine)
    np.testing.assert_array_equal(found["c"], X + X)
    found = backend.run_node(node, [X, X], outputs_info=[(np.float32, (2, 3))], opset_version=13, engine=engine)
    np.testing.assert_array_equal(found[0], X + X)


@ENGINES
def test_dynamic_shapes_are_compiled_as_they_come(engine):
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    prepared = backend.prepare(
        model_of(nodes, {"x": (FLOAT, ["n", 3])}, {"y": (FLOAT, ["n", 3])}), engine=engine, threads=1
    )
    for rows in (1, 5, 2, 5):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3) - 3
        np.testing.assert_array_equal(prepared.run([x])[0], np.maximum(x, 0))


@ENGINES
def test_inputs_that_steer(engine):
    """The axes of a sum come through a Cast: compiled code is made for their values, and made anew for others."""
    nodes = [
        helper.make_node("Cast", ["axes"], ["axes64"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["x", "axes64"], ["y"], keepdims=1),
    ]
    model = model_of(nodes, {"x": (FLOAT, [2, 3]), "axes": (TensorProto.INT32, [1])}, {"y": (FLOAT, ["a", "b"])})
    prepared = backend.prepare(model, engine=engine, threads=1)
    for axis in (0, 1, 0):
        found = prepared.run([X, np.array([axis], np.int32)])[0]
        np.testing.assert_allclose(found, X.sum(axis=axis, keepdims=True), rtol=1e-6)


def test_devices():
    assert backend.supports_device("CPU")
    assert not backend.supports_device("CUDA")
    with pytest.raises(SpecError, match="CUDA"):
        backend.prepare(RELU, "CUDA")
    with pytest.raises(SpecError, match=r"fast.*passes and tvm"):
        backend.prepare(RELU, engine="fast")


@ENGINES
def test_wrong_inputs(engine):
    prepared = backend.prepare(RELU, engine=engine, threads=1)
    with pytest.raises(DataError, match=r"2 inputs were given.*x"):
        prepared.run([X, X])
    with pytest.raises(DataError, match="'x' is missing"):
        prepared.run({})
    with pytest.raises(GraphoptError, match="'x'"):
        prepared.run([X[:1]])


def test_what_is_no_model():
    with pytest.raises(ModelError, match="not int"):
        backend.prepare(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        backend.prepare(model_of([helper.make_node("Relu", ["z"], ["y"])], {}, {"y": (FLOAT, [1])}))


def test_an_operator_that_an_engine_lacks_is_named():
    x = {"x": (TensorProto.UINT8, ["n"])}
    model = model_of(
        [helper.make_node("ImageDecoder", ["x"], ["y"])], x, {"y": (TensorProto.UINT8, ["h", "w", 3])}, opset=20
    )
    with pytest.raises(ModelError, match="ImageDecoder"):
        backend.prepare(model, engine="passes")
    with pytest.raises(UnsupportedOperatorError, match="ImageDecoder"):
        backend.prepare(model, engine="tvm").run([np.zeros(4, np.uint8)])


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4", "FLOAT4E2M1"])
def test_narrow_types_go_in_and_come_out(kind):
    """Three elements: where several share a byte, the last one is not full."""
    number = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    shape = (number, [3])
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    model = model_of(nodes, {"x": shape}, {"y": (number, [3, 1])}, {"s": np.array([3, 1], np.int64)}, 23, 11)
    x = np.array([1, 2, 3], np.float32).astype(dtype)
    try:
        found = backend.run_model(model, [x])[0]
    except ModelError as error:
        assert "Reshape" in str(error)  # ONNX Runtime has no kernel for it in this type
        return
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), np.array([[1], [2], [3]], np.float32))


def test_what_onnxruntime_computes_otherwise_is_refused():
    """With align_corners and a scale that gives no whole size, ONNX Runtime is not the standard."""
    nodes = [
        helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", coordinate_transformation_mode="align_corners")
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 1, 2, 4]), "s": (FLOAT, [4])}, {"y": (FLOAT, [1, 1, "h", "w"])}, opset=19)
    x = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)
    prepared = backend.prepare(model)
    assert prepared.run([x, np.array([1, 1, 2, 2], np.float32)])[0].shape == (1, 1, 4, 8)
    with pytest.raises(UnsupportedOperatorError, match=r"Resize.*align_corners"):
        prepared.run([x, np.array([1, 1, 0.6, 0.6], np.float32)])


def test_importing_it_loads_no_engine():
    program = (
        "import sys, graphopt.backend; "
        "print([m for m in ('tvm', 'onnxruntime', 'onnxsim', 'onnxscript') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
