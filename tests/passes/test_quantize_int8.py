"""quantize-int8 on small graphs: placement, arithmetic, engines, determinism."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from graphopt import model as models
from graphopt.calibration import Dataset, collect_statistics, random_dataset
from graphopt.capabilities import host_capabilities, x86_for_mcpu
from graphopt.errors import PassError, SpecError
from graphopt.graph import constant_of
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.quantization.ranges import encode_range
from graphopt.passes.quantization.weights import round_bias, round_weights, weight_scales
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.spec import bind, parse
from tests.passes import oracle

VNNI = x86_for_mcpu("cascadelake")


def build(text: str, seed: int = 0, **shapes: tuple[int, ...]) -> ir.Model:
    """A model from ONNX's text form; `shapes` are initializers filled with normal numbers."""
    rng = np.random.default_rng(seed)
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\nnet {text}')
    for name, shape in shapes.items():
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        proto.graph.initializer.append(
            numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)
        )
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def array_of(value: ir.Value | None) -> np.ndarray:
    """The array of an initializer."""
    found = constant_of(value)
    assert found is not None
    return found


def quantizers(model: ir.Model) -> dict[str, ir.Node]:
    """QuantizeLinear nodes by the name of the value they quantize."""
    return {str(n.inputs[0].name): n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0] is not None}


def quantize(
    model: ir.Model, samples: int = 32, data: Dataset | None = None, capabilities=VNNI, **options
) -> PassResult:
    each = QuantizeInt8(**options)
    data = data or random_dataset(models.signature(model), samples, 0)
    statistics = collect_statistics(model, each.observes(model), data)
    result = each.run(model.clone(), Context(capabilities, statistics, data))
    models.check(result.model, "quantized")
    assert models.signature(result.model) == models.signature(model)
    return result


def snr_db(model: ir.Model, other: ir.Model, seed: int = 9) -> float:
    feeds = oracle.random_feeds(model, {}, seed)
    wanted, got = oracle.run(model, feeds)[0], oracle.run(other, feeds)[0]
    return float(10 * np.log10(np.square(wanted).sum() / max(1e-30, np.square(wanted - got).sum())))


def engine_operators(model: ir.Model, folder, signed: bool = False) -> Counter[str]:
    """Operator types after ONNX Runtime's own optimisation; `signed`: as on a machine that multiplies s8 x s8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if signed:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


CHAIN = """(float[N,3,12,12] x) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    c = Conv<pads=[1,1,1,1]>(p, w2)  six = Constant<value_float=6.0>()  zero = Constant<value_float=0.0>()
    k = Clip(c, zero, six)  d = Conv<group=8, pads=[1,1,1,1]>(k, w3, b3)  s = Add(d, c2)  t = Relu(s)
    g = GlobalAveragePool(t)  f = Flatten(g)  y = Gemm<transB=1>(f, w4, b4)
}"""
RESIDUAL = """(float[N,3,12,12] x) => (float[N,5] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w2, b2)  s = Add(c, r)  t = Relu(s)
    u = Conv(t, w3)  v = Conv<pads=[1,1,1,1]>(t, w5)  ru = Relu(u)  rv = Relu(v)
    j = Concat<axis=1>(ru, rv)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(j)
    q = Conv(m, w6)  l = LeakyRelu<alpha=0.1>(q)  z = AveragePool<kernel_shape=[2,2]>(l)
    f = Flatten(z)  y = Gemm<transB=1>(f, w4, b4)
}"""
RESIDUAL_SHAPES = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (8, 8, 1, 1), "w5": (8, 8, 3, 3),
    "w6": (8, 16, 1, 1), "w4": (5, 200), "b4": (5,),
}  # fmt: skip


def residual() -> ir.Model:
    return build(RESIDUAL, **RESIDUAL_SHAPES)


def test_all_of_a_residual_network_runs_in_integers_in_onnx_runtime(tmp_path):
    result = quantize(residual())
    operators = engine_operators(result.model, tmp_path)
    assert result.applied == 6 and not result.skipped
    assert operators["QLinearConv"] == 5 and operators["QLinearAdd"] == 1 and operators["QLinearConcat"] == 1
    assert operators["QLinearLeakyRelu"] == 1 and operators["QLinearAveragePool"] == 1 and operators["QGemm"] == 1
    for left in ("Conv", "Relu", "Add", "Concat", "MaxPool", "LeakyRelu", "Gemm"):
        assert operators[left] == 0, f"{left} is left float: {operators}"
    assert operators["QuantizeLinear"] == 1, "only the input is quantized"
    assert snr_db(residual(), result.model) > 25  # six layers of 8 bits


def test_openvino_takes_it_and_agrees():
    openvino = pytest.importorskip("openvino")
    quantized = quantize(residual()).model
    feeds = oracle.random_feeds(residual(), {}, 4)
    compiled = openvino.Core().compile_model(
        openvino.Core().read_model(models.to_bytes(quantized)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    got = next(iter(compiled(feeds).values()))
    wanted = oracle.run(quantized, feeds)[0]
    kinds = [
        (op.get_rt_info()["layerType"].value, op.get_rt_info()["runtimePrecision"].value)
        for op in compiled.get_runtime_model().get_ops()
    ]
    assert all(precision == "u8" for kind, precision in kinds if kind == "Convolution")
    assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()) > 25


def test_values_that_share_a_scale_and_the_clip_that_saturation_replaces():
    quantized = quantize(residual()).model
    pairs = {name: node.inputs[1:] for name, node in quantizers(quantized).items()}

    def encoding(name):
        scale, zero = (array_of(v) for v in pairs[name])
        return float(scale), int(zero)

    assert encoding("ru") == encoding("rv") == encoding("j") == encoding("m")
    assert encoding("s" if "s" in pairs else "t")[1] == 0
    assert "a" not in pairs and "u" not in pairs, "nothing between a layer and its activation"
    assert "y" not in pairs, "logits stay float"


def test_relu6_never_reaches_beyond_six(tmp_path):
    text = """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
        zero = Constant<value_float=0.0>()  six = Constant<value_float=6.0>()
        a = Conv(x, w1)  k = Clip(a, zero, six)  y = Conv(k, w2) }"""
    model = build(text, w1=(16, 3, 1, 1), w2=(4, 16, 1, 1))
    data = random_dataset(models.signature(model), 4, 0)
    loud = Dataset(_Loud(data, 30.0), models.signature(model), source="loud")
    result = quantize(model, data=loud)
    scale = array_of(quantizers(result.model)["k"].inputs[1])
    assert np.float32(scale) * np.float32(255) <= np.float32(6)
    assert engine_operators(result.model, tmp_path)["Clip"] == 0


class _Loud:
    def __init__(self, inner: Dataset, factor: float):
        self.inner, self.factor, self.count = inner, factor, len(inner)

    def read(self, rows):
        return {n: a * np.float32(self.factor) for n, a in next(self.inner.subset(rows).batches(len(rows))).items()}


def test_integers_are_those_of_the_equation():
    """One convolution, computed in plain integer arithmetic from the stored tensors."""
    model = build(
        "(float[1,3,6,6] x) => (float[1,4,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }", w=(4, 3, 3, 3), b=(4,)
    )
    quantized = quantize(model).model
    stored = {n: array_of(v) for n, v in quantized.graph.initializers.items()}
    feeds = oracle.random_feeds(model, {}, 3)
    x_scale, x_zero = stored["x_scale"], int(stored["x_zero_point"])
    x = np.clip(np.rint(feeds["x"] / x_scale) + x_zero, 0, 255).astype(np.int64) - x_zero
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,mcij->nmhw", windows, stored["w_quantized"].astype(np.int64))
    sums += stored["b_quantized"].astype(np.int64)[None, :, None, None]
    assert stored["w_quantized"].dtype == np.int8 and stored["b_quantized"].dtype == np.int32
    np.testing.assert_array_equal(stored["b_scale"], x_scale * stored["w_scale"])
    real = sums * stored["b_scale"].astype(np.float64)[None, :, None, None]
    levels = np.clip(np.rint(real / stored["y_scale"]) + int(stored["y_zero_point"]), 0, 255)
    expected = (levels - int(stored["y_zero_point"])) * stored["y_scale"]
    got = oracle.run(quantized, feeds)[0]
    # float rounding before the last Q may move a value that lies between two levels to the other one
    assert np.abs(got - expected).max() <= stored["y_scale"] * 1.001
    assert np.mean(np.abs(got - expected) > stored["y_scale"] / 2) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.sampled_from([np.uint8, np.int8]))
def test_zero_is_exact_and_every_value_in_range_is_within_half_a_step(low, high, kind):
    encoding = encode_range(low, high, np.dtype(kind))
    least, greatest = encoding.limits
    assert least <= encoding.zero_point <= greatest and np.isfinite(encoding.scale) and encoding.scale >= 2.0**-60
    points = np.linspace(low, high, 257)
    scale = float(encoding.scale)
    integers = np.clip(np.rint(points / scale) + encoding.zero_point, least, greatest)
    back = (integers - encoding.zero_point) * scale
    # the zero point is rounded too: the far ends may lie one half step outside
    assert np.abs(back - points).max() <= scale * 1.01 + 1e-30


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([127, 64]), st.integers(0, 1))
def test_weights_are_within_half_a_step_and_within_their_limit(seed, limit, axis):
    rng = np.random.default_rng(seed)
    weights = (rng.standard_normal((6, 5)) * 10.0 ** rng.uniform(-3, 3, (6, 5))).astype(np.float32)
    weights[:, 2] = 0
    weights[3] = 0
    scales = weight_scales(weights, axis, None, np.float32(1), limit)
    rounded = round_weights(weights, axis, scales, limit).integers
    wide = scales.reshape((-1, 1) if axis == 0 else (1, -1)).astype(np.float64)
    assert np.abs(rounded).max() <= limit and (scales > 0).all()
    assert (np.abs(rounded * wide - weights) <= wide * 0.5001).all()


def test_a_bias_that_would_overflow_raises_the_scale_of_its_weights():
    weights, bias = np.full((2, 3), 1e-6, np.float32), np.array([1e4, 0.0], np.float32)
    scales = weight_scales(weights, 0, bias, np.float32(1e-4), 127)
    stored = round_bias(bias, scales * np.float32(1e-4))
    assert abs(stored[0] * float(scales[0]) * 1e-4 - 1e4) < 1e-3
    assert scales[0] > scales[1] and scales[1] == np.float32(1e-6 / 127)


def test_compensated_rounding_leaves_less_output_error_than_nearest():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((12, 12)) / 3
    x = (rng.standard_normal((4000, 12)) @ mixing + 1.5).astype(np.float32)
    from graphopt.passes.quantization.moments import Moments

    moments = Moments(x.mean(0)[None].astype(np.float64), np.cov(x.T, bias=True)[None])
    weights = rng.standard_normal((16, 12)).astype(np.float32)
    scales = weight_scales(weights, 0, None, np.float32(1), 7)
    nearest = round_weights(weights, 0, scales, 7).integers
    better = round_weights(weights, 0, scales, 7, 1, moments)
    wide = scales[:, None].astype(np.float64)

    def error(integers, shift):
        return np.square(x @ (integers * wide - weights).T + shift).mean()

    assert better.shift is not None
    assert error(better.integers, better.shift) < 0.5 * error(nearest, 0.0)
    # the shift is what the mean output lost: adding it back leaves none
    left = (x @ (better.integers * wide - weights).T + better.shift).mean(0)
    assert np.abs(left).max() < 1e-4


@pytest.mark.parametrize(
    "attributes",
    [
        "pads=[1,1,1,1]",
        "strides=[2,2], pads=[0,1,2,1]",
        "dilations=[2,2]",
        "group=2",
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER", strides=[2,2]',
        'auto_pad="VALID"',
    ],
)
def test_patches_are_what_the_convolution_multiplies(attributes):
    from graphopt.passes.quantization.moments import collect_moments
    from graphopt.passes.quantization.placement import place

    groups = 2 if "group" in attributes else 1
    model = build(
        f"(float[N,4,5,6] x) => (float[N,6,H,W] y) {{ y = Conv<{attributes}>(x, w) }}", w=(6, 4 // groups, 3, 3)
    )
    data = random_dataset(models.signature(model), 6, 0)
    (layer,) = place(model.graph).layers
    from graphopt.progress import SILENT

    moments = collect_moments(model, [layer], data, 0, SILENT)[layer]
    weights = array_of(layer.node.inputs[1]).reshape(groups, 6 // groups, -1)
    (outputs,) = collect_statistics(model, ("y",), data).values()
    assert outputs.channel_mean is not None
    means = np.einsum("grt,gt->gr", weights, moments.mean).reshape(-1)
    np.testing.assert_allclose(means, outputs.channel_mean, atol=1e-5)
    y = np.concatenate([oracle.run(model, feeds)[0] for feeds in data.batches(6)])
    assert moments.covariance is not None
    variance = np.einsum("grt,gtu,gru->gr", weights, moments.covariance, weights).reshape(-1)
    np.testing.assert_allclose(variance, y.var(axis=(0, 2, 3)), rtol=1e-4)


def test_dead_channels_zero_ranges_and_tiny_weights_run():
    model = build(
        "(float[N,3,6,6] x) => (float[N,4,6,6] y) { a = Conv(x, w1, b1)  r = Relu(a)  y = Conv(r, w2, b2) }",
        w1=(4, 3, 1, 1), b1=(4,), w2=(4, 4, 1, 1), b2=(4,),
    )  # fmt: skip
    for name, value in (("w1", 0.0), ("b1", -1.0), ("w2", 1e-30)):  # r is all zero, w2 next to denormal
        tensor = model.graph.initializers[name]
        tensor.const_value = ir.Tensor(np.full_like(array_of(tensor), value), name=name)
    result = quantize(model)
    for name, value in result.model.graph.initializers.items():
        if name.endswith("_scale"):
            assert (array_of(value) >= np.finfo(np.float32).tiny).all(), name
    feeds = oracle.random_feeds(model, {}, 0)
    wanted, got = oracle.run(model, feeds)[0], oracle.run(result.model, feeds)[0]
    assert np.abs(wanted - got).max() <= np.abs(wanted).max() / 100


def test_u8_s8_and_reduced_range_follow_the_capabilities():
    def kinds(**options):
        model = quantize(residual(), **options).model
        zero = array_of(quantizers(model)["x"].inputs[2])
        weights = max(np.abs(array_of(v).astype(int)).max() for n, v in model.graph.initializers.items()
                      if n.startswith("w") and n.endswith("_quantized"))  # fmt: skip
        return zero.dtype.name, int(weights)

    assert kinds(capabilities=VNNI) == ("uint8", 127)
    assert kinds(capabilities=x86_for_mcpu("haswell")) == ("uint8", 64)
    assert kinds(capabilities=x86_for_mcpu("haswell"), reduce_range="false") == ("uint8", 127)
    assert kinds(activations="int8", reduce_range="true") == ("int8", 64)


def test_int8_activations_run_in_integers_as_well(tmp_path):
    result = quantize(residual(), activations="int8")
    assert engine_operators(result.model, tmp_path, signed=True)["QLinearConv"] == 5
    assert snr_db(residual(), result.model) > 25


def test_a_layer_left_out_stays_float_in_onnx_runtime(tmp_path):
    """ONNX Runtime quantizes float weights it finds between a DQ and a Q, with one scale a tensor: not here."""
    model = build(
        """(float[N,3,8,8] x) => (float[N,4,8,8] y) {
            a = Conv(x, w1)  r = Relu(a)  p = MaxPool<kernel_shape=[1,1]>(r)
            c = Conv<group=8>(p, w2, b2)  s = Relu(c)  y = Conv(s, w3) }""",
        w1=(8, 3, 1, 1), w2=(8, 1, 1, 1), b2=(8,), w3=(4, 8, 1, 1),
    )  # fmt: skip
    tensor = model.graph.initializers["w2"]
    uneven = array_of(tensor) * np.logspace(-4, 0, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    tensor.const_value = ir.Tensor(uneven, name="w2")
    # For this machine: where products are summed in pairs of 16 bits, weights of full range would saturate.
    result = quantize(model, exclude=("conv_3",), capabilities=host_capabilities())
    assert [s.node for s in result.skipped] == ["conv_3"] and "excluded" in result.skipped[0].reason
    operators = engine_operators(result.model, tmp_path)
    assert operators["QLinearConv"] == 2 and operators["Conv"] + operators["FusedConv"] == 1
    import onnxruntime

    feeds = oracle.random_feeds(model, {}, 5)
    session = onnxruntime.InferenceSession(models.to_bytes(result.model), providers=["CPUExecutionProvider"])
    fast, plain = session.run(None, feeds)[0], oracle.run(result.model, feeds)[0]
    scale = array_of(result.model.graph.initializers["y_scale"])
    assert np.abs(fast - plain).max() <= 2 * scale


def test_what_is_skipped_is_said():
    model = build(
        """(float[N,4,8,8] x, float[4,4,1,1] v) => (float[N,4,17,17] y, float[N,4,8,4] z, float[4,4,8,8] q) {
            y = ConvTranspose<strides=[2,2]>(x, w1)  m = MatMul(x, w2)  z = MatMul(m, w3)  q = Conv(x, v) }""",
        w1=(4, 4, 3, 3), w2=(8, 4), w3=(4, 4),
    )  # fmt: skip
    result = quantize(model.clone(), exclude_types=("Conv",), exclude=("matmul_1",), samples=4)
    reasons = {s.node: s.reason for s in result.skipped}
    assert "ONNX Runtime" in reasons["convtranspose_0"]
    assert reasons["matmul_1"] == "excluded by name"
    assert reasons["conv_3"] == "excluded by type Conv"
    assert result.applied == 1
    again = quantize(model, samples=4)
    assert {s.node: s.reason for s in again.skipped}["conv_3"] == "its weights are not constant"
    with pytest.raises(PassError, match="did you mean 'matmul_1'"):
        quantize(model, exclude=("matmul1",))
    with pytest.raises(PassError, match="statistics"):
        QuantizeInt8().run(model, Context(VNNI))


def test_gemm_and_matmul_fold_their_factors():
    model = build(
        """(float[N,6] x) => (float[N,3] y) {
            h = Gemm<alpha=0.5, beta=2.0>(x, w1, b1)  r = Relu(h)  m = MatMul(r, w2)  y = Gemm<transB=1>(m, w3) }""",
        w1=(6, 12), b1=(12,), w2=(12, 8), w3=(3, 8),
    )  # fmt: skip
    result = quantize(model, samples=200)
    assert result.applied == 3 and snr_db(model, result.model) > 25


@pytest.mark.parametrize("shape", ["N,6", "N,4,6"])
def test_matmul_and_add_become_one_integer_gemm(shape, tmp_path):
    nodes = "m = MatMul(x, w1)  a = Add(b1, m)  r = Relu(a)  n = MatMul(r, w2)  y = Add(n, b2)"
    text = f"(float[{shape}] x) => (float[{shape.replace('6', '3')}] y) {{ {nodes} }}"
    model = build(text, w1=(6, 12), b1=(12,), w2=(12, 3), b2=(3,))
    result = quantize(model, samples=100)
    stored = result.model.graph.initializers
    assert array_of(stored["b1_quantized"]).dtype == np.int32 and "a" not in quantizers(result.model)
    assert snr_db(model, result.model) > 25
    operators = engine_operators(result.model, tmp_path)
    assert operators["Gemm"] == operators["MatMul"] == 0, operators


def test_the_opset_is_raised_or_the_model_is_left_alone():
    old = build("(float[1,3,6,6] x) => (float[1,108] y) { a = Conv(x, w)  y = Flatten(a) }", w=(3, 3, 1, 1))
    proto = ir.to_proto(old)
    proto.opset_import[0].version = 10
    proto.ir_version = 5
    result = quantize(ir.from_proto(proto))
    assert result.applied == 1 and result.model.opset_imports[""] == 13
    assert snr_db(old, result.model) > 25
    unknown = ir.from_proto(proto)
    unknown.graph.append(
        ir.node("FusedConv", [unknown.graph.inputs[0], unknown.graph.initializers["w"]], domain="com.microsoft")
    )
    unknown.opset_imports["com.microsoft"] = 1
    statistics = collect_statistics(ir.from_proto(proto), ("x", "a"), random_dataset(models.signature(old), 4, 0))
    untouched = QuantizeInt8().run(unknown, Context(VNNI, statistics))
    if untouched.applied == 0:
        assert "opset 10 cannot be raised" in untouched.skipped[0].reason
    else:
        assert untouched.model.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy", "mse"])
def test_the_same_input_gives_the_same_bytes(calibration):
    first, second = (models.to_bytes(quantize(residual(), calibration=calibration).model) for _ in range(2))
    assert first == second


def test_options_come_from_the_grammar():
    each = bind(parse("quantize-int8{calibration=mse,exclude=[a,b],rounding=nearest}"), QuantizeInt8, "pass")
    assert each == QuantizeInt8(calibration="mse", exclude=("a", "b"), rounding="nearest")
    assert each.fidelity is Fidelity.LOSSY and each.name == "quantize-int8"
    assert "quantize-int8{" in str(each) and bind(parse(str(each)), QuantizeInt8, "pass") == each
    with pytest.raises(SpecError, match="percentile must be above 50"):
        bind(parse("quantize-int8{percentile=0.9}"), QuantizeInt8, "pass")
