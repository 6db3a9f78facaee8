"""`inspect`: counts by hand on small models, and the published multiply-accumulates of the shared ones."""

from __future__ import annotations

import json

import pytest

from graphopt import model as models
from graphopt.inspection import inspect
from tests.passes.oracle import SHAPES
from tests.rewrites.pairs import parse


def test_a_small_model_by_hand():
    found = inspect(
        parse("""g (float[1, 2, 4, 4] x) => (float[1, 4, 2, 2] y)
        <float[4, 1, 3, 3] w = {1,2,3,4,5,6,7,8,9, 1,2,3,4,5,6,7,8,9, 1,2,3,4,5,6,7,8,9, 1,2,3,4,5,6,7,8,9},
         float[4] b = {1, 2, 3, 4}> { [conv] c = Conv <group = 2> (x, w, b) [act] y = Relu(c) }""")
    )
    assert (found.nodes, found.operators) == (2, {"Conv": 1, "Relu": 1})
    assert (found.parameters, found.parameter_bytes) == (40, 160)
    assert found.macs == 4 * 2 * 2 * 9 and found.macs_unknown == ""
    assert found.peak_activation_bytes == 4 * (32 + 16), "x and c; then x is dead, and y as large as c"
    assert found.inputs == ("x: float32[1,2,4,4]",) and found.dynamic_dims == ()
    assert found.opsets == {"ai.onnx": 17} and found.ir_version == 8
    conv, act = found.layers
    assert (conv.name, conv.op, conv.output_shape, conv.macs) == ("conv", "Conv", (1, 4, 2, 2), 144)
    assert (conv.parameters, conv.parameter_bytes, conv.activation_bytes) == (40, 160, 64)
    assert (act.macs, act.parameters) == (0, 0)


@pytest.mark.parametrize(
    ("head", "initializers", "node", "macs"),
    [
        ("float[2, 3] x", "float[3, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12}", "MatMul(x, w)", 2 * 3 * 4),
        ("float[5, 2, 3] x, float[5, 3, 4] w", "", "MatMul(x, w)", 5 * 2 * 3 * 4),
        ("float[3, 2] x, float[4, 3] w", "", "Gemm <transA = 1, transB = 1> (x, w)", 2 * 3 * 4),
        ("int8[2, 3] x, int8[3, 4] w", "", "MatMulInteger(x, w)", 2 * 3 * 4),
        ("float[1, 2, 3, 3] x, float[2, 5, 2, 2] w", "", "ConvTranspose(x, w)", 2 * 3 * 3 * 5 * 4),
        ("float[1, 2, 5] x, float[4, 2, 3] w", "", "Conv(x, w)", 4 * 3 * 2 * 3),
        ("int8[1, 2, 5] x, int8[4, 2, 3] w", "", "ConvInteger(x, w)", 4 * 3 * 2 * 3),
        ("float[7, 1, 3] x, float[1, 12, 3] w, float[1, 12, 4] r", "", "GRU <hidden_size = 4> (x, w, r)", 7 * 12 * 7),
        (
            "float[7, 2, 3] x, float[2, 16, 3] w, float[2, 16, 4] r",
            "",
            'LSTM <hidden_size = 4, direction = "bidirectional"> (x, w, r)',
            7 * 2 * 2 * 16 * 7,
        ),
        ("float[7, 1, 3] x, float[1, 4, 3] w, float[1, 4, 4] r", "", "RNN <hidden_size = 4> (x, w, r)", 7 * 4 * 7),
    ],
)
def test_multiply_accumulates(head, initializers, node, macs):
    dtype = "int32" if "Integer" in node else "float"
    rank = {"MatMul": "A, B", "Gemm": "A, B", "ConvT": "A, B, C, D", "Conv(": "A, B, C", "ConvI": "A, B, C"}
    dims = next((d for k, d in rank.items() if node.startswith(k)), "A, B, C, D")
    dims = "A, B, C" if "5, 2, 3" in head else dims
    found = inspect(parse(f"g ({head}) => ({dtype}[{dims}] y) <{initializers}> {{ y = {node} }}"))
    assert found.macs == macs


def test_the_quantize_dequantize_form_counts_like_the_float_form():
    found = inspect(
        parse("""g (float[1, 2, 5] x) => (float[1, 4, 3] y)
        <int8[4, 2, 3] q = {1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6,1,2,3,4,5,6}, float s = {0.1}, uint8 z = {3}> {
            a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) w = DequantizeLinear(q, s) y = Conv(b, w) }""")
    )
    assert found.macs == 4 * 3 * 2 * 3
    assert found.parameter_bytes == 24 + 4 + 1


def test_liveness():
    """x is read at the end, a until b is made: at most x, a and b are alive, then x, b and c."""
    found = inspect(
        parse("""g (float[10] x) => (float[10] y) {
            a = Neg(x) b = Exp(a) c = Log(b) d = Abs(c) y = Add(d, x) }""")
    )
    assert found.peak_activation_bytes == 3 * 40


def test_an_unread_output_dies_at_once_and_an_output_of_the_model_never():
    found = inspect(
        parse("""g (float[8] x) => (float[8] y, float[4] p, float[4] z) <int64[2] s = {4, 4}> {
            y = Neg(x) p, q = Split <axis = 0> (y, s) z = Abs(p) }""")
    )
    assert found.peak_activation_bytes == 64, "y stays (32) beside p and q (16 each); then z takes the place of q"


def test_a_value_read_inside_a_subgraph_lives_until_then():
    found = inspect(
        parse("""g (float[8] x, bool c) => (float[8] y) {
            a = Neg(x) b = Abs(a) d = Exp(b) y = If (c) <
                then_branch = t () => (float[8] p) { p = Add(a, d) },
                else_branch = e () => (float[8] q) { q = Mul(d, d) }> }""")
    )
    assert found.peak_activation_bytes == 1 + 3 * 32, "c, a, b and d together"
    assert found.nodes == 6 and found.operators["Add"] == 1


def test_dynamic_sizes_give_a_reason_instead_of_a_figure():
    found = inspect(parse("g (float[N, 4] x, float[4, 2] w) => (float[N, 2] y) { [mm] y = MatMul(x, w) }"))
    assert found.macs is None and "MatMul 'mm'" in found.macs_unknown and "--input" in found.macs_unknown
    assert found.peak_activation_bytes is None and "'x'" in found.peak_unknown
    assert found.dynamic_dims == ("x[0]=N",)
    assert found.layers[0].output_shape == ("N", 2)
    fixed = inspect(
        models.fix_inputs(
            parse("g (float[N, 4] x, float[4, 2] w) => (float[N, 2] y) { y = MatMul(x, w) }"), {"x": (5, 4)}
        )
    )
    assert fixed.macs == 40 and fixed.dynamic_dims == ()


def test_multiplications_inside_a_subgraph_are_not_guessed():
    found = inspect(
        parse("""g (float[2, 2] x, bool c) => (float[2, 2] y) { y = If (c) <
            then_branch = t () => (float[2, 2] p) { p = MatMul(x, x) },
            else_branch = e () => (float[2, 2] q) { q = Neg(x) }> }""")
    )
    assert found.macs is None and "inside a subgraph" in found.macs_unknown


def test_it_is_plain_data_and_leaves_the_model_alone():
    model = parse("g (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }")
    before = models.to_bytes(model)
    plain = inspect(model).to_dict()
    assert models.to_bytes(model) == before
    assert json.loads(json.dumps(plain)) == plain
    assert plain["nodes"] == 1 and plain["parameters"] == 2 and plain["layers"][0]["output_shape"] == [2]


PUBLISHED = {
    "squeezenet1_1": "349.15 M", "mobilenetv2": "300.77 M", "mobilenetv1_075": "325.40 M", "tiny_darknet": "491.52 M",
    "facenet": "1.42 G", "deeplabv3_mnv2": "8.83 G", "resnet20_cifar10": "40.55 M", "resnet56_cifar10": "125.49 M",
    "mnist_cnn": "787 k", "ultraface_rfb320": "100.42 M", "yolox_nano": "522.55 M", "nanodet_m": "342.22 M",
    "super_resolution": "2.98 G", "style_transfer": "240.65 M", "nsnet2": "268.10 M", "gtcrn": "497 k",
    "stories260k": "19.22 M", "magika": "366.72 M",
}  # fmt: skip
"""Counted from run-time shapes, at batch 1 and the sizes of SHAPES."""


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_multiply_accumulates(shared_model, name):
    number, unit = PUBLISHED[name].split()
    found = inspect(models.fix_inputs(models.load(shared_model(name)), SHAPES[name]))
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}[unit]
    digits = len(number.partition(".")[2])
    assert found.macs is not None, found.macs_unknown
    assert round(found.macs / scale, digits) == float(number)
    assert found.peak_activation_bytes is not None, found.peak_unknown
    assert sum(row.macs or 0 for row in found.layers) == found.macs


def test_attention_counts_its_two_products():
    body = """g (float[2, 4, 6, 8] q, float[2, 2, 5, 8] k, float[2, 2, 5, 3] v) => (float[2, 4, 6, 3] y) {
        y = Attention (q, k, v) }"""
    assert inspect(parse(body, opset=23, ir_version=11)).macs == 2 * 4 * 6 * 5 * (8 + 3)
    body = """g (float[2, 6, 32] q, float[2, 5, 16] k, float[2, 5, 6] v) => (float[2, 6, 12] y) {
        y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) }"""
    assert inspect(parse(body, opset=23, ir_version=11)).macs == 2 * 4 * 6 * 5 * (8 + 3)
