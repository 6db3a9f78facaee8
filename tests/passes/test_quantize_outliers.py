"""Outliers among the features of a LayerNormalization or Gelu: scaled down, in a function that stays the same."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.calibration import collect_statistics, load_dataset
from graphopt.model import signature
from graphopt.passes.base import Context
from graphopt.passes.quantization.outliers import LEAST_GAIN, chosen_scales, scale_outliers
from graphopt.passes.quantization.placement import place
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.pipeline import Pipeline

ROWS, FEATURES, COLUMNS = 12, 32, 24


def model_with_outliers(maker: str, residual: bool, outlier: float = 40.0) -> ir.Model:
    """LayerNormalization or Gelu, the product of what it makes, and an Add of it where `residual`."""
    rng = np.random.default_rng(3)
    width = FEATURES if residual else COLUMNS
    reach = np.ones(FEATURES, np.float32)
    reach[5] = outlier
    weights = (rng.normal(size=(FEATURES, width)) / 6).astype(np.float32)
    arrays = {"w": weights, "reach": reach, "zero": np.zeros(FEATURES, np.float32)}
    if maker == "LayerNormalization":
        nodes = [helper.make_node("LayerNormalization", ["x", "reach", "zero"], ["made"], axis=-1)]
    else:
        nodes = [helper.make_node("Mul", ["x", "reach"], ["wide"]), helper.make_node("Gelu", ["wide"], ["made"])]
    nodes.append(helper.make_node("MatMul", ["made", "w"], ["product"], name="layer"))
    if residual:
        nodes.append(helper.make_node("Add", ["product", "made"], ["sum"]))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", ROWS, FEATURES])],
        [helper.make_tensor_value_info("sum" if residual else "product", TensorProto.FLOAT, ["n", ROWS, width])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(file, x=np.random.default_rng(0).normal(size=(16, ROWS, FEATURES)).astype(np.float32))
    return file


@pytest.mark.parametrize("maker", ["LayerNormalization", "Gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_function_stays_and_a_mul_is_put_in_only_where_it_must(maker, residual, data_file):
    model = model_with_outliers(maker, residual)
    dataset = load_dataset(data_file, signature(model))
    statistics = collect_statistics(model, ("made",), dataset)
    x = np.load(data_file)["x"]
    before, muls = run(model, x), sum(n.op_type == "Mul" for n in model.graph)
    scaled = scale_outliers(model, place(model.graph).layers, statistics)
    assert len(scaled) == 1
    after = run(model, x)
    assert np.abs(after - before).max() <= FEATURES * 2.0**-22 * np.abs(before).max()
    added = sum(n.op_type == "Mul" for n in model.graph) - muls
    assert added == (0 if maker == "LayerNormalization" and not residual else 1)
    (name,) = scaled
    seen = collect_statistics(model, (name,), dataset)[name]
    assert scaled[name].maximum == pytest.approx(seen.maximum, rel=1e-5)
    assert scaled[name].minimum <= seen.minimum + 1e-6
    assert scaled[name].count == seen.count


@pytest.mark.parametrize("maker", ["LayerNormalization", "Gelu"])
def test_less_noise_than_without(maker, data_file):
    model = model_with_outliers(maker, residual=True)
    x = np.load(data_file)["x"]
    dataset, exact = load_dataset(data_file, signature(model)), run(model, x)
    noise = {}
    for outliers in ("scale", "keep"):
        made, (record,) = Pipeline((QuantizeInt8(outliers=outliers),)).run(model, Context(data=dataset))
        noise[outliers] = float(((run(made, x) - exact) ** 2).mean())
        assert any("outliers" in note for note in record.notes) == (outliers == "scale")
    assert noise["scale"] < noise["keep"] / 2


def test_nothing_is_done_where_all_features_reach_alike(data_file):
    model = model_with_outliers("LayerNormalization", residual=True, outlier=1.0)
    statistics = collect_statistics(model, ("made",), load_dataset(data_file, signature(model)))
    nodes = len(list(model.graph))
    assert scale_outliers(model, place(model.graph).layers, statistics) == {}
    assert len(list(model.graph)) == nodes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30), st.floats(0.1, 300), st.booleans())
def test_scales_shrink_peaks_and_pay(seed, features, columns, outlier, symmetric):
    rng = np.random.default_rng(seed)
    peaks = rng.uniform(0, 2, features)
    peaks[0] *= outlier
    weights = rng.normal(size=(features, columns))
    scales = chosen_scales(peaks, 0.5, weights, symmetric)
    if scales is None:
        return
    assert (scales >= 1).all() and scales.max() > 1
    order = np.argsort(peaks)
    assert (np.diff(scales[order]) >= -1e-12).all()
    assert (peaks / scales).max() < peaks.max()

    def activations(s):
        return ((peaks / s).max()) ** 2 * float((s**2 * (weights**2).sum(axis=1)).sum())

    assert activations(scales) * LEAST_GAIN <= activations(np.ones(features)) * (1 + LEAST_GAIN)


def test_degenerate_peaks():
    assert chosen_scales(np.zeros(4), 0.0, np.ones((4, 3)), True) is None
    assert chosen_scales(np.array([np.inf, 1.0]), 1.0, np.ones((2, 3)), True) is None
    assert chosen_scales(np.ones(0), 1.0, np.ones((0, 3)), False) is None
