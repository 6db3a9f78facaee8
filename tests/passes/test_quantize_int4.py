"""quantize-int4: what is stored is what is meant, bit for bit; how it is rounded; what is refused."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import Dataset, random_dataset
from graphopt.errors import DataError, PassError, SpecError
from graphopt.graph import attribute, input_of
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.quantize_int4 import QuantizeInt4
from graphopt.spec import bind, parse
from tests.passes import oracle
from tests.passes.test_quantize_int8 import RESIDUAL, RESIDUAL_SHAPES, array_of, build, snr_db

UNIT = 2.0**-24


def quantize(model: ir.Model, data: Dataset | None = None, **options) -> PassResult:
    result = QuantizeInt4(**options).run(model.clone(), Context(data=data))
    models.check(result.model, "quantized")
    assert models.signature(result.model) == models.signature(model)
    return result


def samples(model: ir.Model, count: int = 32, seed: int = 0) -> Dataset:
    return random_dataset(models.signature(model), count, seed)


def nibbles(value: ir.Value | None) -> np.ndarray:
    """The integers of a 4-bit initializer, read from the bytes of the file: low half first."""
    assert value is not None and value.const_value is not None and value.shape is not None
    packed = np.frombuffer(ir.to_proto(value.const_value).raw_data, np.uint8)
    shape = tuple(int(d) for d in value.shape)  # pyright: ignore[reportArgumentType]
    halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1)
    assert len(packed) == -(-int(np.prod(shape)) // 2) and not halves[np.prod(shape) :].any()
    integers = halves[: np.prod(shape)].astype(np.int32).reshape(shape)
    return np.where(integers > 7, integers - 16, integers) if value.dtype == ir.DataType.INT4 else integers


def dequantized(node: ir.Node) -> np.ndarray:
    """What a DequantizeLinear of 4 bits means, computed in numpy from its stored bytes."""
    integers, scales = nibbles(node.inputs[0]), array_of(node.inputs[1])
    points = nibbles(node.inputs[2]) if input_of(node, 2) is not None else np.zeros(scales.shape, np.int32)
    axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if not size:
        wide = [1] * integers.ndim
        wide[axis] = -1
        scales, points = scales.reshape(wide), points.reshape(wide)
    else:
        wanted = list(integers.shape)
        wanted[axis] = -(-wanted[axis] // size)
        assert scales.shape == points.shape == tuple(wanted)
        block = np.arange(integers.shape[axis]) // size
        scales, points = np.take(scales, block, axis), np.take(points, block, axis)
    return (integers - points).astype(np.float32) * scales


def exposed(model: ir.Model, name: str) -> ir.Model:
    """The model with the value `name` as one more output."""
    copy = model.clone()
    copy.graph.outputs.extend(v for n in copy.graph for v in n.outputs if v.name == name)
    return copy


@st.composite
def layers(draw) -> tuple[ir.Model, str]:
    """A model of one layer with weights `w`, of odd sizes and any geometry."""
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["Conv", "Conv1", "Gemm", "GemmT", "MatMul"]))
    outputs = draw(st.integers(1, 9))
    if kind.startswith("Conv"):
        group = draw(st.integers(1, 3))
        inputs = draw(st.integers(1, 70))
        kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4))) if kind == "Conv" else (draw(st.integers(1, 5)),)
        rank = len(kernel)
        options = f"group={group}, pads={[2] * 2 * rank}, strides={draw(st.sampled_from([[1] * rank, [2] * rank]))}"
        options += f", dilations={draw(st.sampled_from([[1] * rank, [2] * rank]))}"
        space = ",".join(["9"] * rank)
        text = (
            f"(float[N,{inputs * group},{space}] x) => (float[N,{outputs * group},{','.join('HWD'[:rank])}] y)"
            f"{{ y = Conv<{options}>(x, w) }}"
        )
        return build(text, seed, w=(outputs * group, inputs, *kernel)), "w"
    depth = draw(st.integers(5, 150))
    call = {"Gemm": "Gemm(x, w)", "GemmT": "Gemm<transB=1>(x, w)", "MatMul": "MatMul(x, w)"}[kind]
    shape = (outputs, depth) if kind == "GemmT" else (depth, outputs)
    return build(f"(float[N,{depth}] x) => (float[N,{outputs}] y) {{ y = {call} }}", seed, w=shape), "w"


@settings(max_examples=60)
@given(
    layers(), st.sampled_from([16, 32, 64, 128]), st.booleans(), st.sampled_from(["nearest", "hqq"]), st.integers(0, 99)
)
def test_what_the_engine_computes_with_is_what_the_stored_bytes_mean(layer, block, symmetric, method, seed):
    model, name = layer
    weights = array_of(model.graph.initializers[name])
    result = quantize(model, block=block, symmetric=symmetric, method=method)
    if result.applied == 0:
        assert "too short to gain" in result.skipped[0].reason
        return
    (node,) = [n for n in result.model.graph if n.op_type == "DequantizeLinear"]
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    assert input_of(node, 0).dtype == kind and (input_of(node, 2) is None) == symmetric  # pyright: ignore[reportOptionalMemberAccess]
    (reader,) = [n for n in result.model.graph if n.op_type in ("Conv", "Gemm", "MatMul")]
    read = str(reader.inputs[1].name)  # pyright: ignore[reportOptionalMemberAccess]
    feeds = oracle.random_feeds(model, {}, seed)
    y, engine = oracle.run(exposed(result.model, read), feeds)
    means = dequantized(node)
    (call,) = [n for n in model.graph if n.op_type == reader.op_type]
    turned = attribute(call, "transB", 0) > attribute(reader, "transB", 0)
    assert attribute(reader, "transB", 0) == 0
    reference = means.T if turned else means.reshape(weights.shape)
    np.testing.assert_array_equal(engine, means if turned else reference)
    # and that is the layer, with these weights in the place of its own
    plain = model.clone()
    plain.graph.initializers[name].const_value = ir.Tensor(reference, name=name)
    terms = weights[0].size if reader.op_type == "Conv" else feeds["x"].shape[1]
    bound = 2 * terms * UNIT * terms * np.abs(reference).max() * np.abs(feeds["x"]).max()
    np.testing.assert_allclose(y, oracle.run(plain, feeds)[0], rtol=0, atol=bound)
    assert "w" not in result.model.graph.initializers


@settings(max_examples=60)
@given(
    st.integers(2, 150), st.integers(1, 9), st.sampled_from([16, 32, 64, 128]), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_matmulnbits_holds_the_same_numbers(depth, columns, block, symmetric, gemm, biased, seed):
    call = ("Gemm(x, w, b)" if biased else "Gemm<transB=1>(x, w)") if gemm else "MatMul(x, w)"
    shape = (columns, depth) if gemm and not biased else (depth, columns)
    text = f"(float[N,{depth}] x) => (float[N,{columns}] y) {{ y = {call} }}"
    model = build(text, seed, w=shape, **({"b": (columns,)} if gemm and biased else {}))
    options = {"block": block, "symmetric": symmetric, "method": "nearest"}
    standard, contrib = quantize(model, **options), quantize(model, **options, form="matmulnbits")
    assert standard.applied == contrib.applied
    if contrib.applied == 0:
        return
    (node,) = [n for n in contrib.model.graph if n.op_type != "Constant"]
    assert (
        node.op_type == "MatMulNBits"
        and node.domain == "com.microsoft"
        and node.name == f"{call.split('(')[0].split('<')[0].lower()}_0"
    )
    weights = unpacked(node)
    (dequantize,) = [n for n in standard.model.graph if n.op_type == "DequantizeLinear"]
    reference = dequantized(dequantize)
    np.testing.assert_array_equal(weights, reference)
    bias = array_of(contrib.model.graph.initializers["b"]) if gemm and biased else np.zeros(columns, np.float32)
    # rows of the identity read the weights out: every other product is an exact zero
    y = oracle.run(contrib.model, {"x": np.eye(depth, dtype=np.float32)})[0]
    steps = np.abs(np.repeat(array_of(node.inputs[2]).reshape(columns, -1), block, 1)[:, :depth].T)
    slack = 0
    np.testing.assert_allclose(y, weights + bias, rtol=0, atol=slack * 64 * UNIT * (steps + np.abs(bias)).max())


@pytest.mark.parametrize(
    ("call", "shape"),
    [("MatMul(x, w)", (200, 24)), ("Gemm(x, w, b)", (200, 24)), ("Gemm<transB=1>(x, w, b)", (24, 200))],
)
def test_onnxruntime_multiplies_by_the_4_bits_themselves(call, shape, tmp_path):
    bias = {"b": (24,)} if "b)" in call else {}
    model = build(f"(float[N,200] x) => (float[N,24] y) {{ y = {call} }}", 5, w=shape, **bias)
    models.save(quantize(model, method="nearest").model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in models.load(tmp_path / "optimized.onnx").graph] == ["MatMulNBits"]


def unpacked(node: ir.Node) -> np.ndarray:
    """float32 (K, N) of a MatMulNBits, in numpy from its stored bytes, after ONNX Runtime's documentation."""
    depth, columns, block = (attribute(node, name, 0) for name in ("K", "N", "block_size"))
    blocks = -(-depth // block)
    packed, scales = array_of(node.inputs[1]), array_of(node.inputs[2]).reshape(columns, blocks)
    assert packed.shape == (columns, blocks, block // 2) and packed.dtype == np.uint8
    integers = np.stack([packed & 15, packed >> 4], -1).reshape(columns, blocks, block).astype(np.int32)
    points = np.full((columns, blocks), 8, np.int32)
    if input_of(node, 3) is not None:
        stored = array_of(node.inputs[3]).reshape(columns, -1)
        assert stored.shape[1] == -(-blocks // 2)
        points = np.stack([stored & 15, stored >> 4], -1).reshape(columns, -1)[:, :blocks].astype(np.int32)
    values = (integers - points[..., None]).astype(np.float32) * scales[..., None]
    return values.reshape(columns, -1)[:, :depth].T


@pytest.mark.parametrize(
    ("shape", "block", "stored", "scales", "axis"),
    [
        ((8, 64, 3, 3), 32, (8, 64, 3, 3), (8, 2, 3, 3), 1),
        ((8, 48, 1, 1), 32, (8, 48, 1, 1), (8, 2, 1, 1), 1),
        ((8, 16, 3, 3), 32, (8, 144), (8, 5), 1),
        ((8, 3, 3, 3), 32, (8, 3, 3, 3), (8,), 0),
        ((8, 3, 7, 7), 32, (8, 147), (8, 5), 1),
        ((8, 3, 3, 3), 16, (8, 27), (8, 2), 1),
    ],
)
def test_where_the_blocks_of_a_convolution_lie(shape, block, stored, scales, axis):
    text = f"(float[1,{shape[1]},9,9] x) => (float[1,8,H,W] y) {{ y = Conv(x, w) }}"
    result = quantize(build(text, w=shape), block=block, method="nearest")
    (node,) = [n for n in result.model.graph if n.op_type == "DequantizeLinear"]
    assert nibbles(node.inputs[0]).shape == stored and array_of(node.inputs[1]).shape == scales
    assert attribute(node, "axis", None) == axis
    assert (len(stored) == 2) == any(n.op_type == "Reshape" for n in result.model.graph)
    assert result.model.opset_imports[""] == 21 and result.model.ir_version >= 10


def test_the_file_becomes_as_small_as_the_format_says():
    model = build("(float[N,512] x) => (float[N,64] y) { y = MatMul(x, w) }", w=(512, 64))
    weights = 512 * 64
    for block in (16, 32, 64, 128):
        for symmetric in (True, False):
            result = quantize(model, block=block, symmetric=symmetric, method="nearest")
            points = 0 if symmetric else weights / block / 2
            assert models.parameter_bytes(result.model) == weights / 2 + 4 * weights / block + points


def test_weights_in_constant_nodes_do_not_stay_behind():
    rng = np.random.default_rng(0)
    model = build("(float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", w=(64, 8))
    array = rng.standard_normal((64, 8)).astype(np.float32)
    constant = ir.node("Constant", [], {"value": ir.tensor(array, name="c")})
    (product,) = list(model.graph)
    model.graph.insert_before(product, constant)
    product.replace_input_with(1, constant.outputs[0])
    del model.graph.initializers["w"]
    for form in ("qdq", "matmulnbits"):
        result = quantize(model, form=form)
        assert result.applied == 1 and all(n.op_type != "Constant" for n in result.model.graph)
        assert models.parameter_bytes(result.model) < array.nbytes / 6


def test_a_residual_network_keeps_its_outputs():
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    data = samples(model)
    plain = quantize(model, method="nearest", block=16)
    tuned = quantize(model, data, method="gptq", block=16)
    assert plain.applied == tuned.applied == 6
    assert snr_db(model, tuned.model) > 15
    assert "6 layers in 4 bits" in tuned.notes[0] and "times smaller" in tuned.notes[0]
    noise = [np.square(outputs(made, data) - outputs(model, data)).sum() for made in (plain.model, tuned.model)]
    assert noise[1] < noise[0]


def outputs(model: ir.Model, data: Dataset) -> np.ndarray:
    return np.concatenate([oracle.run(model, feeds)[0] for feeds in data.batches(8)]).astype(np.float64)


@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
@pytest.mark.parametrize("call", ["Gemm<alpha=0.5, beta=2.0>(x, w, b)", "Gemm<alpha=0.5>(x, w)"])
def test_the_bias_takes_back_the_mean_error(form, call):
    shapes: dict[str, tuple[int, ...]] = {"w": (96, 6), "b": (6,)}
    shapes = {name: shape for name, shape in shapes.items() if f" {name}" in call}
    model = build(f"(float[N,96] x) => (float[N,6] y) {{ y = {call} }}", 0, **shapes)
    rng = np.random.default_rng(2)
    from graphopt.calibration.dataset import _Arrays

    arrays = {"x": (rng.standard_normal((64, 96)) + 2).astype(np.float32)}
    data = Dataset(_Arrays(arrays), models.signature(model), source="shifted")
    wanted = outputs(model, data)
    corrected, left = (
        outputs(quantize(model, data, form=form, block=32, method="nearest", correct_bias=c).model, data) - wanted
        for c in (True, False)
    )
    assert np.abs(corrected.mean(0)).max() < 96 * 16 * UNIT * np.abs(arrays["x"]).max()
    assert np.abs(left.mean(0)).max() > 1e-3


def test_a_bias_of_an_added_constant_keeps_its_shape():
    model = build("(float[N,96] x) => (float[1,N,6] y) { m = MatMul(x, w)  y = Add(m, b) }", w=(96, 6), b=(1, 1, 6))
    result = quantize(model, samples(model, 400))
    assert result.applied == 1 and snr_db(model, result.model) > 15


def test_weights_that_several_nodes_read():
    text = """(float[N,96] x, int64[K] i) => (float[N,6] y, float[N,6] z, float[N,96] u, float[K,6] e) {
        y = MatMul(x, w)  z = MatMul(x, w)  u = MatMul(x, v)  e = Gather(t, i)  q = MatMul(x, t) }"""
    text = text.replace("float[K,6] e)", "float[K,6] e, float[N,6] q)")
    model = build(text, w=(96, 6), v=(96, 96), t=(96, 6))
    result = quantize(model, method="nearest")
    nodes = [n for n in result.model.graph if n.op_type == "DequantizeLinear"]
    assert len(nodes) == 2 and result.applied == 2, "w is stored once, t not at all"
    assert {s.node: s.reason for s in result.skipped} == {"matmul_4": "its weights are also read by 'gather_3'"}
    contrib = quantize(model, method="nearest", form="matmulnbits")
    products = [n for n in contrib.model.graph if n.op_type == "MatMulNBits"]
    assert len(products) == 3 and products[0].inputs[1] is products[1].inputs[1]
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32), "i": np.arange(2)}
    for a, b in zip(oracle.run(result.model, feeds), oracle.run(contrib.model, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=96 * 96 * 16 * UNIT)


def test_what_is_refused_is_said():
    model = build(
        """(float[N,40,8,8] x, float[4,40,1,1] v) => (float[N,4,17,17] y, float[N,40,8,4] z, float[N,4,8,8] q,
            float[N,40,8,8] d) {
            y = ConvTranspose<strides=[2,2]>(x, w1)  m = MatMul(x, w2)  z = MatMul(m, w3)  q = Conv(x, v)
            d = Conv<group=40>(x, w4) }""",
        w1=(40, 4, 3, 3), w2=(8, 64), w3=(64, 4), w4=(40, 1, 1, 1),
    )  # fmt: skip
    result = quantize(model, exclude=("matmul_1",), method="nearest")
    reasons = {s.node: s.reason for s in result.skipped}
    assert reasons == {
        "convtranspose_0": "only Conv, Gemm and MatMul are done",
        "matmul_1": "excluded by name",
        "conv_3": "its weights are not constant",
        "conv_4": "its rows of 1 weights are too short to gain from 4 bits",
    }
    assert result.applied == 1
    typed = quantize(model, exclude_types=("MatMul",), method="nearest")
    assert typed.applied == 0 and not typed.notes
    with pytest.raises(PassError, match="did you mean 'matmul_1'"):
        quantize(model, exclude=("matmul1",))
    with pytest.raises(DataError, match="calibration data"):
        quantize(model, bits="mixed")


def test_without_data_gptq_says_what_it_does_instead():
    model = build("(float[N,96] x) => (float[N,6] y) { y = MatMul(x, w) }", w=(96, 6))
    result = quantize(model, method="gptq")
    assert any("without calibration data" in note for note in result.notes)
    assert models.to_bytes(result.model) == models.to_bytes(quantize(model, method="hqq").model)


def test_where_the_opset_cannot_be_raised_products_become_matmulnbits(monkeypatch):
    model = build(
        "(float[1,3,6,6] x) => (float[1,6] y) { a = Conv(x, w)  f = Flatten(a)  y = MatMul(f, v) }",
        w=(8, 3, 3, 3), v=(128, 6),
    )  # fmt: skip
    import onnx.version_converter

    def refuse(*_):
        raise RuntimeError("no adapter for Something")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    result = quantize(model)
    assert result.applied == 1 and result.model.opset_imports[""] == 17
    assert [n.op_type for n in result.model.graph] == ["Conv", "Flatten", "MatMulNBits"]
    assert result.skipped[0].node == "conv_0" and "opset 17 cannot be raised to 21" in result.skipped[0].reason
    strict = quantize(model, form="qdq")
    assert strict.applied == 0 and "cannot be raised" in strict.skipped[-1].reason


def test_accuracy_level_is_an_attribute_of_matmulnbits():
    model = build("(float[N,96] x) => (float[N,6] y) { y = MatMul(x, w) }", w=(96, 6))
    result = quantize(model, form="matmulnbits", accuracy_level=4)
    (node,) = list(result.model.graph)
    assert attribute(node, "accuracy_level", None) == 4 and snr_db(model, result.model) > 15
    assert result.model.opset_imports["com.microsoft"] == 1 and result.model.opset_imports[""] == 17


def test_mixed_keeps_eight_bits_where_four_do_harm():
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    data = samples(model)

    def kinds(result: PassResult) -> list[ir.DataType | None]:
        return [n.inputs[0].dtype for n in result.model.graph if n.op_type == "DequantizeLinear"]  # pyright: ignore[reportOptionalMemberAccess]

    def stored(min_snr_db: float, min_ratio: float) -> PassResult:
        return quantize(model, data, block=16, bits="mixed", min_snr_db=min_snr_db, min_ratio=min_ratio)

    def reached(result: PassResult) -> float:
        found = re.search(r"outputs at ([\d.]+) dB", result.notes[-1])
        assert found is not None
        return float(found[1])

    none, every = stored(1.0, 1.0), stored(100.0, 1.0)
    middle = (reached(none) + reached(every)) / 2
    some = stored(middle, 1.0)
    assert reached(none) < middle <= reached(some) + 0.05 < reached(every)
    counts = [kinds(result).count(ir.DataType.INT8) for result in (none, some, every)]
    assert counts[0] == 0 and 0 < counts[1] < 6 and counts[2] == 6
    assert snr_db(model, none.model) < snr_db(model, some.model) < snr_db(model, every.model)
    assert "short of 100" in every.notes[-1] and "short" not in some.notes[-1]
    size = models.parameter_bytes(model)
    limit = (size / models.parameter_bytes(none.model) + size / models.parameter_bytes(every.model)) / 2
    bound = stored(100.0, limit)
    assert size / models.parameter_bytes(bound.model) >= limit and 0 < kinds(bound).count(ir.DataType.INT8) < 6


@pytest.mark.parametrize("method", ["nearest", "hqq", "gptq"])
def test_the_same_input_gives_the_same_bytes(method):
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    first, second = (models.to_bytes(quantize(model, samples(model), method=method).model) for _ in range(2))
    assert first == second


def test_what_is_excluded_changes_nothing_for_the_others():
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    data = samples(model)
    quantize(model, data)
    known = quantize(model, data, exclude=("conv_0",)).model
    fresh = quantize(model, samples(model), exclude=("conv_0",)).model
    assert models.to_bytes(known) == models.to_bytes(fresh)
    every = quantize(model, samples(model)).model
    for name in ("w2_q", "w6_q", "w4_q"):
        np.testing.assert_array_equal(nibbles(known.graph.initializers[name]), nibbles(every.graph.initializers[name]))


def test_few_covariances_are_kept_at_a_time(monkeypatch):
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    data = samples(model)
    together = quantize(model, data)
    monkeypatch.setattr("graphopt.passes.quantization.moments.MOST_ELEMENTS", 1)
    apart = quantize(model, samples(model))
    assert together.applied == apart.applied == 6 and snr_db(model, apart.model) > 15


def test_rows_too_long_for_a_covariance_are_rounded_without(monkeypatch):
    model = build(RESIDUAL, **RESIDUAL_SHAPES)
    monkeypatch.setattr("graphopt.passes.quantization.moments.MAX_TAPS", 50)
    result = quantize(model, samples(model), correct_bias=False)
    assert any(note.startswith("3 layers have too many weights") for note in result.notes), result.notes
    plain = quantize(model, method="hqq", correct_bias=False)
    for name in ("w2_q", "w5_q", "w4_q"):
        first, second = (nibbles(made.model.graph.initializers[name]) for made in (result, plain))
        np.testing.assert_array_equal(first, second)


def test_options_come_from_the_grammar():
    text = "quantize-int4{block=128,symmetric=false,method=hqq,form=matmulnbits,exclude=[a,b]}"
    each = bind(parse(text), QuantizeInt4, "pass")
    assert each == QuantizeInt4(128, False, "hqq", "matmulnbits", exclude=("a", "b"))
    assert each.fidelity is Fidelity.LOSSY and bind(parse(str(each)), QuantizeInt4, "pass") == each
    with pytest.raises(SpecError, match="must be one of 16, 32, 64, 128"):
        bind(parse("quantize-int4{block=48}"), QuantizeInt4, "pass")
