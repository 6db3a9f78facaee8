"""Made-up inputs, and the ONNX Runtime engine against numpy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import DataError, GraphoptError, ModelError, TargetError
from graphopt.model import Signature, TensorSpec
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.samples import random_feeds


def one(name: str, dtype, *shape) -> Signature:
    return Signature((TensorSpec(name, np.dtype(dtype), shape),), ())


@given(
    st.sampled_from(["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_noise_has_the_shape_and_dtype_asked_for(dtype, shape, seed):
    signature = one("x", dtype, *shape)
    array = random_feeds(signature, seed)["x"]
    assert array.shape == tuple(shape)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, random_feeds(signature, seed)["x"])
    if array.dtype.kind != "f":
        assert set(np.unique(array).astype(int)) <= {0, 1}


def test_noise_is_standard_normal():
    array = random_feeds(one("x", "float32", 200, 200), 1)["x"].astype(np.float64)
    count = array.size  # five standard errors: of the mean 1/sqrt(n), of the variance sqrt(2/n)
    assert abs(array.mean()) < 5 / np.sqrt(count)
    assert abs(array.var() - 1) < 5 * np.sqrt(2 / count)
    assert not np.array_equal(array, random_feeds(one("x", "float32", 200, 200), 2)["x"])


def test_the_batch_dimension_is_filled_in_wherever_its_name_stands():
    signature = Signature(
        (TensorSpec("x", np.dtype("float32"), ("batch", 3)), TensorSpec("h", np.dtype("float32"), (1, "batch", 4))), ()
    )
    feeds = random_feeds(signature, batch=5)
    assert feeds["x"].shape == (5, 3)
    assert feeds["h"].shape == (1, 5, 4)
    assert random_feeds(one("x", "float32", None, 2))["x"].shape == (1, 2)


def test_other_dynamic_dimensions_must_be_given():
    with pytest.raises(ModelError, match=r"axis 2 .*--input 'image:\?,3,\?,\?'"):
        random_feeds(one("image", "float32", "N", 3, "H", "W"))
    with pytest.raises(ModelError, match="only numbers and booleans"):
        random_feeds(one("text", object, 1))


@pytest.fixture
def gemm(tmp_path):
    """y = x w + b, and the weights; external data on request."""
    weight = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    bias = np.arange(4, dtype=np.float32)

    def build(external: bool = False):
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
        graph = helper.make_graph(
            nodes,
            "gemm",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        path = tmp_path / "gemm.onnx"
        onnx.save(model, path, save_as_external_data=external, location="gemm.data", size_threshold=0)
        return path, weight, bias

    return build


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_the_engine_computes_what_numpy_computes(gemm, external, optimize, threads):
    path, weight, bias = gemm(external)
    x = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    got = OnnxRuntimeEngine(path, threads, optimize).run({"x": x})
    exact = x.astype(np.float64) @ weight + bias
    # A sum of n products and a bias: at most n + 1 roundings of half an ulp of the sum of magnitudes.
    bound = 6 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight) + np.abs(bias))
    assert list(got) == ["y"]
    assert np.all(np.abs(got["y"] - exact) <= bound)


def test_the_engine_opens_bytes_and_quietly_refuses_nonsense(gemm, tmp_path, capfd):
    path, _, _ = gemm()
    assert OnnxRuntimeEngine(path.read_bytes()).input_names == ("x",)
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        OnnxRuntimeEngine(b"nonsense")
    with pytest.raises(ModelError, match="no such file"):
        OnnxRuntimeEngine(tmp_path / "gone.onnx")
    with pytest.raises(TargetError, match="threads must be"):
        OnnxRuntimeEngine(path, 0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        ({}, "needs input 'x'"),
        ({"X": np.ones((1, 5), np.float32)}, "no input 'X'; its inputs are: x"),
        ({"x": np.ones((1, 6), np.float32)}, r"an array of float32 of shape \[1, 6\]"),
        ({"x": np.ones((1, 5), np.float64)}, "an array of float64"),
        ({"x": np.ones(5, np.float32)}, r"of shape \[5\]"),
    ],
)
def test_wrong_inputs_are_one_clear_line(gemm, feeds, says, capfd):
    engine = OnnxRuntimeEngine(gemm()[0], 1)
    with pytest.raises(DataError, match=says) as caught:
        engine.run(feeds)
    assert isinstance(caught.value, GraphoptError)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_fails_is_a_target_error(tmp_path):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"], "bad")]
    graph = helper.make_graph(
        nodes,
        "reshape",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6]), helper.make_tensor_value_info("shape", 7, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    engine = OnnxRuntimeEngine(model.SerializeToString(), 1)
    with pytest.raises(TargetError, match=r"ONNX Runtime failed on the model: .*bad"):
        engine.run({"x": np.ones(6, np.float32), "shape": np.array([7])})
