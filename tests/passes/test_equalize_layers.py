"""equalize-layers: the function stays, the ranges meet, and what cannot be scaled is refused in words."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import model as models
from graphopt.errors import PassError
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.equalization.pairs import find_pairs
from graphopt.passes.equalize_layers import SETTLED, EqualizeLayers
from graphopt.spec import bind, parse
from graphopt.verify import Reference
from tests.passes import oracle
from tests.passes.test_quantize_int8 import build


def equalize(model: ir.Model, **options) -> PassResult:
    result = EqualizeLayers(**options).run(model.clone(), Context())
    models.check(result.model, "equalized")
    assert models.signature(result.model) == models.signature(model)
    return result


def assert_same_function(model: ir.Model, other: ir.Model, seed: int) -> None:
    """Within what rounding explains, element by element, in ONNX Runtime without optimisations."""
    feeds = oracle.random_feeds(model, {}, seed)
    bounds = oracle.rounding_bound(model, feeds)
    for wanted, got, bound in zip(oracle.run(model, feeds), oracle.run(other, feeds), bounds, strict=True):
        assert wanted.shape == got.shape and wanted.dtype == got.dtype
        assert (np.abs(wanted.astype(np.float64) - got) <= bound).all()


def assert_ranges_meet(model: ir.Model) -> int:
    """Each channel of each pair has one range on both sides, as nearly as the iteration settles; the pairs."""
    pairs, _ = find_pairs(model, ())
    for pair in pairs:
        before, after = pair.first.output_peaks(), pair.second.input_peaks()
        alive = (before > 0) & (after > 0)
        apart = np.abs(np.log(before[alive] / after[alive]))
        assert (apart <= 2 * SETTLED + 8 * np.finfo(np.float32).eps).all()
    return len(pairs)


BETWEEN = {
    "nothing": lambda i, o: [],
    "Relu": lambda i, o: [helper.make_node("Relu", [i], [o])],
    "LeakyRelu": lambda i, o: [helper.make_node("LeakyRelu", [i], [o], alpha=0.3)],
    "Clip": lambda i, o: [helper.make_node("Clip", [i, "zero", "six"], [o])],
    "MaxPool": lambda i, o: [helper.make_node("MaxPool", [i], [o], kernel_shape=[2, 2], pads=[1, 1, 0, 0])],
    "AveragePool": lambda i, o: [helper.make_node("AveragePool", [i], [o], kernel_shape=[3, 2], pads=[1, 0, 1, 1])],
}


@st.composite
def chains(draw):
    """A model of 2 to 5 convolutions of any kind, their channels badly scaled, and how many pairs can be equalized."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes: list[onnx.NodeProto] = []
    arrays: dict[str, np.ndarray] = {"zero": np.float32(0), "six": np.float32(6)}  # pyright: ignore
    channels, value, pairs = draw(st.integers(1, 6)), "x", 0
    shape = (2, channels, 33, 30)
    count = draw(st.integers(2, 5))
    for index in range(count):
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "grouped", "transposed"]))
        groups = channels if kind == "depthwise" else 1
        if kind == "grouped":
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        outputs = groups * draw(st.integers(1, 2 if kind == "depthwise" else 4))
        kernel = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
        attributes: dict = {
            "strides": [draw(st.integers(1, 2)) if index < 2 else 1, 1],
            "dilations": [1, draw(st.integers(1, 2))],
        }
        attributes["pads"] = [draw(st.integers(0, 1)) for _ in range(4)] if kind != "transposed" else [0] * 4
        if kind == "transposed":
            groups, dims = 1, (channels, outputs, *kernel)
        else:
            dims = (outputs, channels // groups, *kernel)
        scale = 10.0 ** rng.uniform(-1.5, 1.5, dims[:2])[..., None, None]
        arrays[f"w{index}"] = (rng.standard_normal(dims) * scale / np.sqrt(np.prod(dims[1:]))).astype(np.float32)
        names = [value, f"w{index}"]
        if draw(st.booleans()):
            arrays[f"b{index}"] = rng.standard_normal(outputs).astype(np.float32)
            names.append(f"b{index}")
        last = index == count - 1
        operator = "ConvTranspose" if kind == "transposed" else "Conv"
        value = f"c{index}"
        nodes.append(helper.make_node(operator, names, [value], f"layer{index}", group=groups, **attributes))
        channels = outputs
        if last:
            break
        between = draw(st.sampled_from(list(BETWEEN)))
        nodes += BETWEEN[between](value, f"a{index}")
        value = value if between == "nothing" else f"a{index}"
        pairs += between != "Clip"
    if draw(st.booleans()):  # a classifier behind it
        arrays["w"] = rng.standard_normal((channels, 3)).astype(np.float32)
        nodes.append(helper.make_node("LeakyRelu", [value], ["l"]))
        nodes.append(helper.make_node("GlobalAveragePool", ["l"], ["p"]))
        nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
        nodes.append(helper.make_node(draw(st.sampled_from(["Gemm", "MatMul"])), ["f", "w"], ["y"], "head"))
        pairs += 1
    else:
        nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)), pairs


@settings(max_examples=80, deadline=None)
@given(chains(), st.integers(0, 1000))
def test_chains_compute_the_same_with_ranges_that_meet(chain, seed):
    model, pairs = chain
    result = equalize(model)
    assert_same_function(model, result.model, seed)
    assert assert_ranges_meet(result.model) == pairs
    assert result.applied <= pairs


def test_a_separable_run_settles_on_one_range_a_channel():
    """Pointwise, depthwise, pointwise: three weights of a channel, whose ranges become their geometric mean."""
    model = build(
        """(float[1,3,9,9] x) => (float[1,5,9,9] y) {
            a = Conv(x, w1, b1)  r = Relu(a)  d = Conv<group=8, pads=[1,1,1,1]>(r, w2, b2)  s = Relu(d)  y = Conv(s, w3) }""",  # noqa: E501
        w1=(8, 3, 1, 1), b1=(8,), w2=(8, 1, 3, 3), b2=(8,), w3=(5, 8, 1, 1),
    )  # fmt: skip
    (one, two), _ = find_pairs(model, ())
    ranges = [one.first.output_peaks(), one.second.input_peaks(), two.second.input_peaks()]
    wanted = np.prod(ranges, axis=0) ** (1 / 3)
    result = equalize(model)
    (one, two), _ = find_pairs(result.model, ())
    assert result.applied == 2
    for found in (one.first.output_peaks(), one.second.output_peaks(), two.second.input_peaks()):
        np.testing.assert_allclose(found, wanted, rtol=4 * SETTLED)


def test_rows_of_any_rank_and_an_added_bias():
    model = build(
        """(float[2,4,6] x) => (float[2,4,3] y) {
            m = MatMul(x, w1)  a = Add(m, b1)  r = Relu(a)  n = MatMul(r, w2)  l = LeakyRelu(n)  y = MatMul(l, w3) }""",
        w1=(6, 12), b1=(12,), w2=(12, 8), w3=(8, 3),
    )  # fmt: skip
    result = equalize(model)
    assert result.applied == 2 and [s.node for s in result.skipped] == ["matmul_5"]
    assert_ranges_meet(result.model)
    assert_same_function(model, result.model, 0)


def test_dead_channels_stay_as_they_are():
    model = build(
        "(float[1,2,5,5] x) => (float[1,3,5,5] y) { a = Conv(x, w1, b1)  y = Conv(a, w2) }",
        w1=(4, 2, 1, 1), b1=(4,), w2=(3, 4, 1, 1),
    )  # fmt: skip
    for name, cut in (("w1", (0,)), ("w2", (slice(None), 1))):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        array = tensor.numpy().copy()
        array[cut] = 0
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    result = equalize(model)
    assert_same_function(model, result.model, 3)
    bias = result.model.graph.initializers["b1"].const_value
    old = model.graph.initializers["b1"].const_value
    assert bias is not None and old is not None
    np.testing.assert_array_equal(bias.numpy()[:2], old.numpy()[:2])
    assert (bias.numpy()[2:] != old.numpy()[2:]).all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = Conv(x, w)  r = Clip(a, zero, six)  y = Conv(r, v)  z = Identity(x)", "ReLU6"),
        ("a = Conv(x, w)  r = Sigmoid(a)  y = Conv(r, v)  z = Identity(x)", "does not pass a scale on"),
        ("a = Conv(x, w)  r = Relu(a)  y = Conv(r, v)  z = Identity(r)", "read by several"),
        ("z = Conv(x, w)  y = Conv(z, v)", "output of the model"),
        ("a = Conv(x, w)  t = Add(a, x)  y = Conv(t, v)  z = Identity(x)", "does not pass a scale on"),
        ("a = Conv(x, w)  t = BatchNormalization(a, s, s, s, s)  y = Conv(t, v)  z = Identity(x)", "fold-batch-norm"),
        ("a = Conv(x, w)  q = Identity(v)  y = Conv(a, q)  z = Identity(x)", "not constant"),
        ("a = Conv(x, w)  y = Conv(x, a)  z = Identity(x)", "as weights"),
        ("a = Conv(x, w)  r = PRelu(a, s4)  y = Conv(r, v)  z = Identity(x)", "does not pass a scale on"),
        ("a = Conv(x, w)  y = MatMul(a, u)  z = Identity(x)", "another axis"),
    ],
)
def test_what_does_not_scale_is_left_and_said(text, reason):
    model = build(
        f"(float[1,4,3,3] x) => (float[A,B,C,D] y, float[E,F,G,H] z) {{ {text} }}",
        w=(4, 4, 1, 1), v=(4, 4, 1, 1), s=(4,), s4=(4, 1, 1), u=(3, 3), zero=(), six=(),
    )  # fmt: skip
    if "BatchNormalization" in text:
        model.graph.initializers["s"].const_value = ir.Tensor(np.ones(4, np.float32), name="s")
    result = EqualizeLayers().run(model.clone(), Context())
    assert result.applied == 0
    assert reason in {s.node: s.reason for s in result.skipped}["conv_0"]


def test_excluded_layers_and_other_types_are_left():
    text = "(float[1,4,3,3] x) => (float[1,4,3,3] y) { a = Conv(x, w)  b = Conv(a, v)  y = Conv(b, w) }"
    model = build(text, w=(4, 4, 1, 1), v=(4, 4, 1, 1))
    assert equalize(model).applied == 2  # and `w`, which two layers read, is there twice now
    assert_same_function(model, equalize(model).model, 1)
    left = equalize(model, exclude=("conv_2",))
    assert left.applied == 1 and "excluded" in {s.node: s.reason for s in left.skipped}["conv_1"]
    with pytest.raises(PassError, match="did you mean 'conv_1'"):
        equalize(model, exclude=("conv1",))
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    proto.graph.ClearField("value_info")
    half = ir.from_proto(proto)
    result = equalize(half)
    assert result.applied == 0 and all("float16" in s.reason or "output" in s.reason for s in result.skipped)


def test_it_is_found_by_name():
    each = bind(parse("equalize-layers{exclude=[a]}"), EqualizeLayers, "pass")
    assert each == EqualizeLayers(exclude=("a",)) and each.fidelity is Fidelity.ROUNDING


@pytest.mark.shared
@pytest.mark.parametrize(("name", "pairs"), [("tiny_darknet", 15), ("resnet20_cifar10", 9), ("mobilenetv2", 2)])
def test_trained_networks_keep_their_function(name, pairs, shared_model, tmp_path):
    from graphopt.pipeline import Pipeline

    model = models.load(shared_model(name))
    feeds = oracle.random_feeds(model, oracle.SHAPES[name], 0)
    reference = Reference(model, [feeds], tmp_path)
    _, records = Pipeline.parse("simplify,fold-batch-norm,equalize-layers").run(model, Context(), reference)
    assert records[-1].applied == pairs and all(e.within for e in records[-1].errors)
