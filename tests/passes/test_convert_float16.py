"""convert-float16: numbers as numpy rounds them, weights bit for bit, graphs that ONNX Runtime runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from graphopt import model as models
from graphopt.errors import PassError
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.convert_float16 import ConvertFloat16
from graphopt.passes.float16.narrow import narrow
from graphopt.pipeline import Pipeline
from graphopt.spec import bind, parse
from tests.passes import oracle
from tests.passes.test_quantize_int8 import array_of, build

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def convert(model: ir.Model, **options) -> PassResult:
    result = ConvertFloat16(**options).run(model.clone(), Context())
    models.check(result.model, "converted")
    assert models.signature(result.model) == models.signature(model)
    return result


def reasons(result: PassResult) -> dict[str, str]:
    return {skip.node: skip.reason for skip in result.skipped}


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, 40, elements=st.floats(width=32)), st.integers(0, 2**32 - 1))
def test_numbers_are_rounded_as_numpy_rounds_and_stay_finite(special, seed):
    spread = np.random.default_rng(seed).standard_normal(200) * 2.0 ** np.random.default_rng(seed).integers(
        -32, 20, 200
    )
    array = np.concatenate(
        [special, spread.astype(np.float32), np.array([65504, 65519, 65520, -65520, 2**-25, -0.0], np.float32)]
    )
    found = narrow(array)
    with np.errstate(over="ignore"):
        plain = array.astype(np.float16)
    finite = np.isfinite(array)
    beyond = finite & ~np.isfinite(plain)
    np.testing.assert_array_equal(found.array[~beyond], plain[~beyond])
    assert (np.signbit(found.array) == np.signbit(plain))[~np.isnan(array)].all()
    assert (np.abs(found.array[beyond]) == 65504).all() and found.saturated == beyond.sum()
    assert np.isfinite(found.array[finite]).all() and found.vanished == ((array != 0) & (plain == 0)).sum()
    small = (np.abs(array) < 2.0**-14) & (plain != 0) & (np.abs(plain) < 2.0**-14)
    assert found.blurred == (small & (plain.astype(np.float32) != array)).sum()


NETWORK = """(float[N,3,12,12] x) => (float[N,5] y, float[N,8,6,6] t) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    t = Conv<pads=[1,1,1,1], group=4>(p, w2)  l = LeakyRelu<alpha=0.1>(t)  c = Concat<axis=1>(l, p)
    e = AveragePool<kernel_shape=[6,6]>(c)  f = Flatten(e)  y = Gemm<transB=1>(f, w3, b3)
}"""
SHAPES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 2, 3, 3), "w3": (5, 16), "b3": (5,)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-9, 5))
def test_stored_weights_are_numpys_and_nothing_else_changes(seed, power):
    """The same as the model whose float32 weights are rounded to float16 and back, up to the order of sums (an engine
    packs weights that are constants)."""
    model = build(NETWORK, seed, **SHAPES)
    rounded = model.clone()
    for name in ("w1", "w2", "w3"):
        array = (array_of(model.graph.initializers[name]) * 10.0**power).astype(np.float32)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        back = narrow(array).array.astype(np.float32)
        rounded.graph.initializers[name].const_value = ir.Tensor(back, name=name)
    result = convert(model)
    assert result.applied == 3 and [n.op_type for n in result.model.graph].count("Cast") == 3
    for name in ("w1", "w2", "w3"):
        stored = array_of(result.model.graph.initializers[f"{name}_float16"])
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored, narrow(array_of(model.graph.initializers[name])).array)
    feeds = oracle.random_feeds(model, {}, seed % 1000)
    bounds = oracle.rounding_bound(rounded, feeds)
    for wanted, got, bound in zip(oracle.run(rounded, feeds), oracle.run(result.model, feeds), bounds, strict=True):
        assert (np.abs(wanted.astype(np.float64) - got) <= bound).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_network_in_float16_is_within_its_roundings(seed):
    model = build(NETWORK, seed, **SHAPES)
    rng = np.random.default_rng(seed)
    for name, shape in SHAPES.items():  # far from subnormals: the bound is relative
        array = (rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    result = convert(model, compute=True)
    assert result.applied == 9 and not result.skipped
    casts = [n for n in result.model.graph if n.op_type == "Cast"]
    assert [c.inputs[0].name for c in casts if c.outputs[0].dtype is HALF and c.inputs[0]] == ["x"]
    assert sorted(str(c.outputs[0].name) for c in casts if c.outputs[0].dtype is FLOAT) == ["t", "y"]
    assert all(v.dtype is HALF for v in result.model.graph.initializers.values())
    feeds = oracle.random_feeds(model, {}, seed % 1000)
    bounds = oracle.rounding_bound(model, feeds, np.float16)
    for wanted, got, bound in zip(oracle.run(model, feeds), oracle.run(result.model, feeds), bounds, strict=True):
        assert wanted.dtype == got.dtype == np.float32
        assert (np.abs(wanted.astype(np.float64) - got) <= bound).all()
        assert (wanted != got).any()


OPERATORS = {
    "Softmax": "v = Softmax(u)",
    "Exp": "v0 = Exp(u)  v = Tanh(v0)",
    "Norm": "v = LayerNormalization(u, gamma)",
    "Less": "b = Less(u, x)  v = Where(b, u, x)",
    "Resize": "v0 = Resize<mode=\"nearest\">(u, , scales)  v = Slice(v0, zeros, sizes)",
    "Split": "v1, v2 = Split<axis=1, num_outputs=2>(u)  v = Concat<axis=1>(v2, v1)",
    "TopK": "v, i = TopK(u, four)",
    "Pad": "v0 = Pad(u, pads)  v = Slice(v0, zeros, sizes)",
    "Epsilon": "v = Add(u, epsilon)",
    "Mask": "v0 = Max(u, lowest)  v = Clip(v0)",
    "Tanh": "v = Tanh(u)",
    "Twice": "w = Relu(u)  v = Add(w, u)",
    "Sizes": "s = Shape(u)  f = Cast<to=1>(s)  g = Mul(f, ones)  k = Cast<to=7>(g)  v = Reshape(u, k)",
    "If": "c = Less(zero, one)  v = If<then_branch = yes () => (float[4,4] o) { o = Neg(u) }, "
    "else_branch = no () => (float[4,4] q) { q = Identity(u) }>(c)",
}  # fmt: skip


def mixed(kinds: list[str]) -> ir.Model:
    body, value = "", "x"
    for index, kind in enumerate(kinds):
        text = OPERATORS[kind]
        for name in ("v0", "v1", "v2", "v", "u", "b", "w", "i", "s", "f", "g", "k", "c", "o", "q", "yes", "no"):
            new = value if name == "u" else f"{name}_{index}"
            text = _renamed(text, name, new)
        body += text + "  "
        value = f"v_{index}"
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[4,4] x) => (float[4,4] y) '
        f"{{ {body} y = MatMul({value}, m) }}"
    )
    constants: dict[str, object] = {
        "gamma": [1.0, 2.0, 3.0, 4.0], "scales": [2.0, 2.0], "zeros": [0, 0], "m": np.eye(4), "sizes": [4, 4],
        "four": [4], "pads": [0, 1, 1, 0], "epsilon": 1e-12, "lowest": -1e9, "ones": [1.0, 1.0],
        "zero": 0.0, "one": 1.0,
    }  # fmt: skip
    for name, value in constants.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def _renamed(text: str, name: str, new: str) -> str:
    import re

    return re.sub(rf"(?<![\w.=]){name}(?![\w=])", new, text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_mixture_is_typed_right_and_runs(kinds, seed):
    """Valid after shape inference, kept operators in float32, no value cast there and back, and the same result to
    the precision of float16."""
    model = mixed(kinds)
    result = convert(model, compute=True)
    types = {v.name: v.dtype for n in ir.from_proto(_inferred(result.model)).graph for v in n.outputs}
    for node in result.model.graph:
        for value in node.outputs:
            assert value.dtype == types[value.name], node.op_type
        if node.op_type in ("Softmax", "Exp", "LayerNormalization", "Less"):
            assert all(v.dtype is FLOAT for v in node.inputs if v is not None)
        if node.op_type in ("MatMul", "Tanh", "Relu", "Pad", "TopK", "Split"):
            assert node.inputs[0] is not None and node.inputs[0].dtype is HALF
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        assert not (node.op_type == "Cast" and source is not None and source.op_type == "Cast" and
                    source.inputs[0] is not None and source.inputs[0].dtype == node.outputs[0].dtype)  # fmt: skip
    feeds = oracle.random_feeds(model, {}, seed)
    wanted, got = oracle.run(model, feeds)[0], oracle.run(result.model, feeds)[0]
    assert wanted.shape == got.shape and np.isfinite(got).all()
    if not {"Less", "TopK", "Norm"} & set(kinds):  # these decide, or divide by what may be small
        # Only `Twice` makes values and errors larger, by two; Exp is behind Tanh. Each operator rounds twice at most.
        largest = 2 ** len(kinds) * max(1.0, float(np.abs(feeds["x"]).max()))
        amplified = (np.e if "Exp" in kinds else 2) ** len(kinds)
        assert np.abs(wanted - got).max() <= 2 * (len(kinds) + 2) * 2.0**-11 * largest * amplified


def _inferred(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    proto.graph.ClearField("value_info")
    return onnx.shape_inference.infer_shapes(proto)


def test_sizes_are_counted_in_float32():
    """4099 is no float16; a resize by sizes computed in floats must not lose a row."""
    model = build(
        """(float[1,1,4099,2] x) => (float[A,B,C,D] y) {
            s = Shape(x)  f = Cast<to=1>(s)  d = Mul(f, one)  k = Cast<to=7>(d)  r = Reshape(x, k)  y = Relu(r) }""",
        one=(),
    )
    model.graph.initializers["one"].const_value = ir.Tensor(np.array(1, np.float32), name="one")
    result = convert(model, compute=True)
    assert oracle.run(result.model, oracle.random_feeds(model, {}))[0].shape == (1, 1, 4099, 2)
    assert "sizes" in reasons(result)["mul_2"]


def test_constants_beyond_the_range_keep_small_operators_in_float32_and_saturate_large_weights():
    model = mixed(["Epsilon", "Mask"])
    result = convert(model, compute=True)
    assert sum("beyond the range" in reason for reason in reasons(result).values()) == 2
    wide = build("(float[2,40] x) => (float[2,3] y) { y = MatMul(x, w) }", w=(40, 3))
    array = array_of(wide.graph.initializers["w"]).copy()
    array[:2] = 1e6
    array[2] = -1e-9
    wide.graph.initializers["w"].const_value = ir.Tensor(array, name="w")
    for options in ({}, {"compute": True}):
        result = convert(wide, **options)
        assert result.notes[0] == "6 values of 'w' are beyond 65504 and saturate"
        assert "3 are too small and become 0" in result.notes[1]


def test_what_is_excluded_stays_in_float32():
    model = build(NETWORK, **SHAPES)
    for compute in (False, True):
        result = convert(model, compute=compute, exclude=("conv_0",), exclude_types=("Gemm",))
        names = set(result.model.graph.initializers)
        assert {"w1", "w3", "w2_float16"} <= names and "excluded" in " ".join(reasons(result).values())
    with pytest.raises(PassError, match="did you mean 'conv_0'"):
        convert(model, exclude=("conv0",))


def test_scales_of_quantizers_and_small_constants_are_left():
    model = build(
        """(float[1,80,2,2] x) => (float[1,80,2,2] y) {
            q = QuantizeLinear<axis=1>(x, s)  d = DequantizeLinear<axis=1>(q, s)  y = Mul(d, k) }""",
        s=(80,), k=(80, 1, 1),
    )  # fmt: skip
    scales = np.abs(array_of(model.graph.initializers["s"])) + np.float32(0.01)
    model.graph.initializers["s"].const_value = ir.Tensor(scales, name="s")
    result = convert(model)
    assert result.applied == 1 and set(result.model.graph.initializers) == {"s", "k_float16"}
    assert convert(build("(float[1,4] x) => (float[1,4] y) { y = Mul(x, k) }", k=(4,))).applied == 0


def test_constant_nodes_count_as_weights_and_old_opsets_do_not():
    weight = ",".join(["0.5"] * 64)
    text = f"(float[2,8] x) => (float[2,8] y) {{ w = Constant<value = float[8,8] {{{weight}}}>()  y = MatMul(x, w) }}"
    result = convert(build(text))
    assert result.applied == 1 and array_of(result.model.graph.initializers["w_float16"]).dtype == np.float16
    proto = ir.to_proto(build("(float[2,8] x) => (float[2,8] y) { y = MatMul(x, w) }", w=(8, 8)))
    proto.opset_import[0].version = 6
    old = ConvertFloat16().run(ir.from_proto(proto), Context())
    assert old.applied == 0 and "opset 6" in old.skipped[0].reason


def test_options_come_from_the_grammar():
    each = bind(parse("convert-float16{compute=true,exclude=[a]}"), ConvertFloat16, "pass")
    assert each == ConvertFloat16(compute=True, exclude=("a",)) and each.fidelity is Fidelity.LOSSY


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "mobilenetv2", "resnet20_cifar10", "stories260k", "nsnet2", "magika"]
)
@pytest.mark.parametrize("compute", [False, True])
def test_trained_networks_are_half_as_large_and_run(name, compute, shared_model):
    model, _ = Pipeline.parse("simplify,fold-batch-norm").run(models.load(shared_model(name)), Context())
    feeds = oracle.random_feeds(model, oracle.SHAPES[name], 0)
    made, (record,) = Pipeline.parse(str(ConvertFloat16(compute=compute))).run(model, Context())
    assert record.parameter_bytes_after < 0.51 * record.parameter_bytes_before
    for wanted, got in zip(oracle.run(model, feeds), oracle.run(made, feeds), strict=True):
        # weights of 11 bits are 66 dB off, a little less through many layers
        assert 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()) > 40
