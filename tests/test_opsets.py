"""Models of versions that ONNX Runtime does not know, and the forms of models that old exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import backend, opsets
from graphopt import model as models
from graphopt.errors import ModelError, UnsupportedOperatorError

FLOAT = TensorProto.FLOAT
NEWEST, NEWEST_IR = opsets.newest_versions()
X = np.linspace(-2, 3, 12, dtype=np.float32).reshape(1, 3, 2, 2)
too_new = pytest.mark.skipif(onnx.defs.onnx_opset_version() <= NEWEST, reason="ONNX Runtime knows all of onnx's opsets")


def model_of(nodes, opset, constants=None, ir_version=8, listed=False, shape=tuple("nchw")):
    """One input x of X's shape, one output y; `listed`: initializers are inputs as well."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    infos = [helper.make_tensor_value_info("x", FLOAT, X.shape)]
    if listed:
        infos += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    outputs = [helper.make_tensor_value_info("y", FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", infos, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_every_opset_that_onnxruntime_knows(opset):
    """Convolution, normalization and pooling have been there all along."""
    constants = {"w": np.ones((2, 3, 1, 1), np.float32), **{n: np.full(2, 0.5, np.float32) for n in "sbmv"}}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *"sbmv"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    proto = model_of(nodes, opset, constants)
    made = models.from_proto(proto)
    assert made.opset_imports[""] == opset and not opsets.is_converted(made)
    wanted: Any = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": X})[0]
    np.testing.assert_allclose(backend.run_model(proto, [X])[0], wanted, rtol=1e-5)


def test_an_opset_before_the_oldest():
    """Opset 6 broadcasts by an attribute."""
    proto = model_of([helper.make_node("Add", ["x", "b"], ["y"], broadcast=1)], 6, {"b": X[0, 0]}, 3, True)
    made = models.from_proto(proto)
    assert made.opset_imports[""] == opsets.OLDEST_OPSET and opsets.is_converted(made)
    np.testing.assert_array_equal(backend.run_model(proto, [X])[0], X + X[0, 0])


@too_new
def test_a_newer_stamp_on_what_is_not_new():
    proto = model_of(
        [helper.make_node("Relu", ["x"], ["y"])], onnx.defs.onnx_opset_version(), ir_version=onnx.IR_VERSION
    )
    made = models.from_proto(proto)
    assert made.opset_imports[""] == NEWEST and made.ir_version == NEWEST_IR
    np.testing.assert_array_equal(backend.run_model(proto, [X])[0], np.maximum(X, 0))


@too_new
def test_a_new_operator_that_is_defined_by_others():
    proto = model_of([helper.make_node("SwiGLU", ["x", "x"], ["y"])], 28)
    assert "SwiGLU" not in {node.op_type for node in models.from_proto(proto).graph}


@too_new
def test_a_new_operator_is_named_where_it_cannot_be_helped():
    graph = helper.make_graph(
        [helper.make_node("Einsum", ["x", "x"], ["y"], equation="i,i->")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [3])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)], ir_version=10)
    with pytest.raises(ModelError, match=rf"knows opsets up to {NEWEST}, and Einsum"):
        backend.prepare(proto)


@too_new
def test_optimizing_a_file_beyond_onnxruntime(tmp_path):
    """The race is against what the converter made of it."""
    proto = model_of(
        [helper.make_node("Relu", ["x"], ["y"])], onnx.defs.onnx_opset_version(), ir_version=onnx.IR_VERSION
    )
    onnx.save(proto, str(tmp_path / "new.onnx"))
    result = graphopt.optimize(
        tmp_path / "new.onnx", tmp_path / "out", preset="exact", engine="onnxruntime", threads=1, measure_seconds=0.2
    )
    np.testing.assert_array_equal(result.load(threads=1).run({"x": X})["y"], np.maximum(X, 0))


@pytest.mark.parametrize("engine", backend.ENGINES)
def test_initializers_that_are_inputs(engine):
    """IR version 3 lists every weight, and a caller leaves them out."""
    proto = model_of([helper.make_node("Mul", ["x", "w"], ["y"])], 7, {"w": X}, ir_version=3, listed=True)
    prepared = backend.prepare(proto, engine=engine, threads=1)
    assert [spec.name for spec in prepared.inputs] == ["x"]
    np.testing.assert_array_equal(prepared.run([X])[0], X * X)


@pytest.mark.parametrize("engine", backend.ENGINES)
def test_initializers_that_are_shared(engine):
    """One weight of two nodes, one of which an exact pass could have changed in place."""
    constants = {"w": np.full((3, 3, 1, 1), 0.5, np.float32), **{n: np.full(3, 0.5, np.float32) for n in "sbmv"}}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", *"sbmv"], ["n"]),
        helper.make_node("Conv", ["n", "w"], ["y"]),
    ]
    proto = model_of(nodes, 17, constants)
    wanted: Any = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": X})[0]
    np.testing.assert_allclose(backend.run_model(proto, [X], engine=engine)[0], wanted, rtol=1e-5)


def _sparse(name: str) -> onnx.SparseTensorProto:
    """[0, 2, 0, 3]."""
    values = numpy_helper.from_array(np.array([2, 3], np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 3], np.int64), "places"), [4])


def test_sparse_initializers(tmp_path):
    proto = model_of([helper.make_node("Add", ["x", "w"], ["y"])], 17, shape=["n"])
    proto.graph.input[0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_value_info("x", FLOAT, [4]).type.tensor_type.shape
    )
    proto.graph.sparse_initializer.append(_sparse("w"))
    x = np.ones(4, np.float32)
    for engine in backend.ENGINES:
        np.testing.assert_array_equal(backend.run_model(proto, [x], engine=engine)[0], [1, 3, 1, 4])
    onnx.save(proto, str(tmp_path / "sparse.onnx"))
    with pytest.raises(ModelError, match=r"Add.*sparse"):  # onnx's own checker refuses it in a file
        models.load(tmp_path / "sparse.onnx")


def test_names_that_repeat_in_subgraphs(tmp_path):
    """Both branches call their value t, and the other branch's own constant k."""

    def branch(value):
        out = helper.make_tensor_value_info("t", FLOAT, X.shape)
        nodes = [helper.make_node("Mul", ["x", "k"], ["t"])]
        return helper.make_graph(nodes, "b", [], [out], [numpy_helper.from_array(np.asarray(value, np.float32), "k")])

    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch(2), else_branch=branch(3))]
    for condition, factor in ((True, 2), (False, 3)):
        proto = model_of(nodes, 17, {"c": np.array(condition)})
        for engine in backend.ENGINES:
            np.testing.assert_array_equal(backend.run_model(proto, [X], engine=engine)[0], factor * X)


def test_conversion_leaves_other_models_alone(tmp_path):
    made = ir.from_proto(model_of([helper.make_node("Relu", ["x"], ["y"])], 17))
    assert opsets.for_onnxruntime(made) is made


@pytest.mark.parametrize("engine", backend.ENGINES)
def test_parts_whose_sizes_are_computed(engine):
    """They are not equal parts: the second one here has no elements, and a shape is asked of the first."""
    nodes = [
        helper.make_node("Shape", ["x"], ["size"], start=2, end=3),
        helper.make_node("Sub", ["size", "size"], ["none"]),
        helper.make_node("Concat", ["size", "none"], ["sizes"], axis=0),
        helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=2),
        helper.make_node("Shape", ["a"], ["whole"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Reshape", ["r", "whole"], ["y"]),
    ]
    try:
        found = backend.run_model(model_of(nodes, 17), [X], engine=engine)[0]
    except UnsupportedOperatorError as error:
        assert engine == "tvm" and "Split: a part with no elements" in str(error)
        return
    np.testing.assert_array_equal(found, np.maximum(X, 0))
