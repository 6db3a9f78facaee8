"""`simplify`, case by case, as numbered in its docstring."""

from __future__ import annotations

import pytest

from graphopt.passes.simplify import Simplify
from tests.rewrites.pairs import parse, rewrites, stays

OWN = Simplify(use_onnxsim=False)


def test_1_listed_initializers_become_constants():
    before = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
    result = OWN.run(parse(before), _context())
    assert [v.name for v in result.model.graph.inputs] == ["x"]
    assert "1 initializers that were listed as inputs are constants now" in result.notes


def test_1_overridable_initializers_stay_and_are_not_folded():
    keep = Simplify(use_onnxsim=False, keep_overridable=True)
    before = "g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { v = Neg(w) y = Add(x, v) }"
    result = keep.run(parse(before), _context())
    assert [v.name for v in result.model.graph.inputs] == ["x", "w"]
    assert [n.op_type for n in result.model.graph] == ["Neg", "Add"]


def test_2_constants_become_initializers():
    rewrites(
        OWN,
        "g (float[2] x) => (float[2] y) { c = Constant <value = float[2] {1, 2}> () y = Add(x, c) }",
        "g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { y = Add(x, c) }",
    )


def test_3_a_convolution_that_keeps_its_size_shares_its_shape():
    """Shape of the result is Shape of the input: H + 2 - 3 + 1 = H."""
    rewrites(
        OWN,
        """g (float[1, 1, H, W] x) => (float[1, 1, H, W] y, int64[2] a, int64[2] b)
        <float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[2] i = {2, 3}, float zero = {0}> {
            y = Conv <pads = [1, 1, 1, 1]> (x, w)
            sx = Shape(x) sy = Shape(y) a = Gather(sx, i) gy = Gather(sy, i) b = Add(gy, gy) }""",
        """g (float[1, 1, H, W] x) => (float[1, 1, H, W] y, int64[2] a, int64[2] b)
        <float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[2] i = {2, 3}> {
            y = Conv <pads = [1, 1, 1, 1]> (x, w)
            sx = Shape(x) a = Gather(sx, i) b = Add(a, a) }""",
        shapes={"x": (1, 1, 5, 4)},
    )


def test_4_a_vector_is_joined_from_single_dimensions():
    """Nobody reads the transposed value for its shape any more."""
    rewrites(
        OWN,
        """g (float[N, 3, M] x, float[K] z) => (float y)
        <int64[1] start = {0}, int64[1] end = {2}, int64[1] three = {3}> {
            u = Transpose <perm = [2, 0, 1]> (x) v = Neg(u) s = Shape(v) lead = Slice(s, start, end)
            n = Shape <start = 0, end = 1> (x)
            t = Concat <axis = 0> (lead, three, n) w = Expand(z, t) y = ReduceSum <keepdims = 0> (w) }""",
        """g (float[N, 3, M] x, float[K] z) => (float y) <int64[1] three = {3}> {
            n = Shape <start = 0, end = 1> (x) m = Shape <start = 2, end = 3> (x)
            t = Concat <axis = 0> (m, n, three, n) w = Expand(z, t) y = ReduceSum <keepdims = 0> (w) }""",
        shapes={"x": (4, 3, 5), "z": (4,)},
        opset=18,
    )


@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("opset", [14, 15])
def test_4_a_dimension_as_a_vector_is_shape_s_own(place, opset):
    """Two of three nodes are left, or three of four where the number is read as well: the graph never grows."""
    before = f"""g (float[N, M] x, float[K] z) => (float[A, B] y, int64 c)
    <int64 i = {{{place}}}, int64[1] axis = {{0}}, int64[1] two = {{2}}> {{
        s = Shape(x) m = Gather(s, i) u = Unsqueeze(m, axis)
        t = Concat <axis = 0> (two, u) y = Expand(z, t) c = Neg(m) }}"""
    after = """g (float[N, M] x, float[K] z) => (float[A, B] y, int64 c) <int64[1] two = {2}> {
        u = Shape <start = 1, end = 2> (x) m = Squeeze(u)
        t = Concat <axis = 0> (two, u) y = Expand(z, t) c = Neg(m) }"""
    if opset < 15:
        found = OWN.run(parse(before, opset=opset), _context()).model
        assert "Gather" in [node.op_type for node in found.graph]
    else:
        rewrites(OWN, before, after, shapes={"x": (4, 5), "z": (5,)}, opset=opset)


@pytest.mark.parametrize("target", ["{0, 0, 6}", "{0, -1, 6}"])
def test_4_a_target_of_two_dimensions_that_may_not_be_copied(target):
    """A dimension that was lost on the way (K or 1 of M) is what is left over: -1."""
    rewrites(
        OWN,
        f"""g (float[N, M, 6] x, float[N, K, 6] z, int64[N, L] i) => (float[N, L, 6] y)
        <int64[2] pair = {{2, 3}}, int64[3] back = {target}> {{
            a = Add(x, z) s = Shape(i) t = Concat <axis = 0> (s, pair) v = Reshape <allowzero = 1> (a, t)
            w = Reshape(v, back) y = Neg(w) }}""",
        "g (float[N, M, 6] x, float[N, K, 6] z, int64[N, L] i) => (float[N, L, 6] y) { a = Add(x, z) y = Neg(a) }",
        shapes={"x": (4, 5, 6), "z": (4, 5, 6), "i": (4, 5)},
        opset=18,
    )


GRID = """g (bool[N, M] x) => (bool[N, 1, 1, M] y)
    <int64 zero = {0}, int64 one = {1}, int64[3] right = {1, 2, 3}, int64[3] left = {0, 1, 2}, int64[1] last = {-1}> {
        n = Shape <start = 0, end = 1> (x) m = Shape <start = 1, end = 2> (x) ns = Squeeze(n) ms = Squeeze(m)
        i = Range(zero, ns, STEP) j = Range(zero, ms, one) iu = Unsqueeze(i, right) ju = Unsqueeze(j, left)
        b = Max(iu, ju) s = Shape(b) ie = Expand(iu, s) je = Expand(ju, s)
        il = Unsqueeze(ie, last) jl = Unsqueeze(je, last) k = Concat <axis = -1> (PARTS) y = GatherND(x, k) }"""


def test_6_elements_gathered_in_order():
    rewrites(
        OWN,
        GRID.replace("STEP", "one").replace("PARTS", "il, jl"),
        "g (bool[N, M] x) => (bool[N, 1, 1, M] y) <int64[4] t = {0, 1, 1, -1}> { y = Reshape(x, t) }",
        shapes={"x": (4, 5)},
        opset=18,
    )


def test_6_elements_gathered_in_another_order():
    before = GRID.replace("STEP", "one").replace("PARTS", "jl, il").replace("y)", "y)", 1)
    found = OWN.run(parse(before.replace("bool[N, M] x", "bool[M, N] x"), opset=18), _context()).model
    assert "GatherND" in [node.op_type for node in found.graph]


FLAT = """g (bool[N, M] x) => (bool[N, 1, 1, M] y)
    <int64 zero = {0}, int64 one = {1}, int64[3] right = {1, 2, 3}, int64[3] left = {0, 1, 2}, int64[1] last = {-1}> {
        n = Shape <start = 0, end = 1> (x) m = Shape <start = 1, end = 2> (x) ns = Squeeze(n) ms = Squeeze(m)
        i = Range(zero, ns, one) j = Range(START, ms, one) iu = Unsqueeze(i, right) ju = Unsqueeze(j, left)
        f = Unsqueeze(x, last) d = Flatten <axis = 2> (f) p = Mul(iu, FACTOR) k = Add(PARTS)
        e = Gather(d, k) s = Shape(k) r = Reshape(e, last) y = Reshape(r, s) }"""


@pytest.mark.parametrize("parts", ["p, ju", "ju, p"])
@pytest.mark.parametrize("factor", ["m", "ms"])
def test_6_elements_gathered_in_order_by_one_index(parts, factor):
    """The exporter that traces flattens what it indexes; and the result is reshaped to the shape of the index."""
    rewrites(
        OWN,
        FLAT.replace("START", "zero").replace("FACTOR", factor).replace("PARTS", parts),
        "g (bool[N, M] x) => (bool[N, 1, 1, M] y) <int64[4] t = {0, 1, 1, -1}> { y = Reshape(x, t) }",
        shapes={"x": (4, 5)},
        opset=18,
    )


@pytest.mark.parametrize(
    ("start", "factor", "parts"),
    [("zero", "n", "p, ju"), ("zero", "m", "p, iu"), ("zero", "m", "iu, ju"), ("one", "m", "p, ju")],
)
def test_6_elements_gathered_in_another_order_by_one_index(start, factor, parts):
    before = FLAT.replace("START", start).replace("FACTOR", factor).replace("PARTS", parts)
    found = OWN.run(parse(before.replace("bool[N, 1, 1, M] y", "bool[A, B, C, D] y"), opset=18), _context()).model
    assert "Gather" in [node.op_type for node in found.graph]


def test_6_rows_gathered_in_order():
    """Indices that are a range and no sum; the rows stay whole."""
    rewrites(
        OWN,
        """g (float[N, 3] x) => (float[1, N, 3] y) <int64 zero = {0}, int64 one = {1}, int64[1] axis = {0}> {
            n = Shape <start = 0, end = 1> (x) ns = Squeeze(n) i = Range(zero, ns, one) k = Unsqueeze(i, axis)
            v = Neg(x) w = Gather(v, k) y = Neg(w) }""",
        """g (float[N, 3] x) => (float[1, N, 3] y) <int64[3] t = {1, -1, 3}> {
            v = Neg(x) w = Reshape(v, t) y = Neg(w) }""",
        shapes={"x": (4, 3)},
        opset=18,
    )


def test_4_a_target_that_is_constant_seen_from_further_up():
    """N and M are lost where all is one axis: no constant makes them of N * M."""
    rewrites(
        OWN,
        """g (float[N, M] x) => (float[N, 1, M] y) <int64[1] flat = {-1}, int64[1] axis = {1}> {
            u = Unsqueeze(x, axis) s = Shape(u) a = Neg(x) v = Reshape(a, flat) w = Reshape(v, s) y = Neg(w) }""",
        """g (float[N, M] x) => (float[N, 1, M] y) <int64[3] t = {0, 1, -1}> {
            a = Neg(x) w = Reshape(a, t) y = Neg(w) }""",
        shapes={"x": (4, 5)},
    )


def test_6_expand_to_where_not_minus_one():
    """PyTorch's expand(-1, M): the size that is there, written as 1."""
    rewrites(
        OWN,
        """g (float[N, M] x) => (float[N, M] y)
        <int64 one = {1}, int64[1] axis = {0}, int64[1] minus = {-1}, int64[1] two = {2}, int64[2] all = {-1, -1}> {
            s = Shape(x) m = Gather(s, one) mu = Unsqueeze(m, axis) t = Concat <axis = 0> (minus, mu)
            ones = ConstantOfShape <value = int64[1] {1}> (two) e = Equal(t, all) w = Where(e, ones, t)
            v = Expand(x, w) y = Neg(v) }""",
        "g (float[N, M] x) => (float[N, M] y) { y = Neg(x) }",
        shapes={"x": (4, 5)},
    )


@pytest.mark.parametrize("op,constant,stays_", [("And", 1, False), ("Or", 0, False), ("And", 0, True), ("Or", 1, True)])
def test_6_neutral_booleans(op, constant, stays_):
    before = f"""g (bool[2, 3] x) => (bool[2, 3] y) <bool c = {{{constant}}}> {{
        n = Not(x) v = {op}(c, n) y = Not(v) }}"""
    found = [node.op_type for node in OWN.run(parse(before), _context()).model.graph]
    assert (op in found) == stays_


def test_4_reshape_by_the_batch_dimension():
    rewrites(
        OWN,
        """g (float[N, 2, 3] x) => (float[N, 6] y) <int64 zero = {0}, int64[1] axis = {0}, int64[1] six = {6}> {
            s = Shape(x) n = Gather(s, zero) u = Unsqueeze(n, axis)
            t = Concat <axis = 0> (u, six) y = Reshape(x, t) }""",
        "g (float[N, 2, 3] x) => (float[N, 6] y) <int64[2] t = {0, 6}> { y = Reshape(x, t) }",
        shapes={"x": (4, 2, 3)},
    )


def test_4_known_dimensions_fold():
    rewrites(
        OWN,
        """g (float[N, 4] x) => (float[N, 4] y) <int64 one = {1}> {
            s = Shape(x) n = Gather(s, one) f = Cast <to = 1> (n) y = Mul(x, f) }""",
        "g (float[N, 4] x) => (float[N, 4] y) <float f = {4}> { y = Mul(x, f) }",
        shapes={"x": (3, 4)},
    )


def test_5_constants_fold():
    rewrites(
        OWN,
        """g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {
            s = Add(a, b) e = Sqrt(s) y = Mul(x, e) }""",
        "g (float[2] x) => (float[2] y) <float[2] e = {2, 2.4494898}> { y = Mul(x, e) }",
    )


def test_5_a_large_result_stays_a_node():
    small = Simplify(use_onnxsim=False, max_folded_bytes=1024)
    stays(
        small,
        """g (float[1024] x) => (float[1024] y) <int64[1] s = {1024}> {
            c = ConstantOfShape <value = float[1] {2}> (s) y = Mul(x, c) }""",
    )


def test_5_a_large_result_does_not_come_in_by_its_parts():
    small = Simplify(use_onnxsim=False, max_folded_bytes=1024)
    result = small.run(
        parse("""g (float[512] x) => (float[512] y) <int64[1] s = {128}> {
            a = ConstantOfShape <value = float[1] {2}> (s) b = ConstantOfShape <value = float[1] {3}> (s)
            c = Concat <axis = 0> (a, b, b, a) y = Mul(x, c) }"""),
        _context(),
    )
    assert [n.op_type for n in result.model.graph] == ["Concat", "Mul"]


@pytest.mark.parametrize(
    ("node", "initializers", "opset"),
    [
        ("v = Identity(r)", "", 17),
        ("v = Dropout(r)", "", 17),
        ("v = Cast <to = 1> (r)", "", 17),
        ("v = Reshape(r, c)", "int64[2] c = {0, 4}", 17),
        ("v = Reshape(r, c)", "int64[2] c = {-1, 4}", 17),
        ("v = Expand(r, c)", "int64[2] c = {1, 4}", 17),
        ("v = Expand(r, c)", "int64[1] c = {1}", 17),
        ("v = Flatten(r)", "", 17),
        ("v = Tile(r, c)", "int64[2] c = {1, 1}", 17),
        ("v = Transpose <perm = [0, 1]> (r)", "", 17),
        ("v = Pad(r, c)", "int64[4] c = {0, 0, 0, 0}", 17),
        ("v = Pad <pads = [0, 0, 0, 0]> (r)", "", 9),
        ("v = Slice(r, z, e)", "int64[1] z = {0}, int64[1] e = {9223372036854775807}", 17),
        ("v = Slice(r, z, e, a)", "int64[1] z = {0}, int64[1] e = {4}, int64[1] a = {-1}", 17),
        ("v = Slice <starts = [0], ends = [2147483647], axes = [0]> (r)", "", 9),
        ("v = Concat <axis = 1> (r)", "", 17),
        ("v = Sum(r)", "", 17),
        ("v = Add(c, r)", "float c = {0}", 17),
        ("v = Sub(r, c)", "float[4] c = {0, 0, 0, 0}", 17),
        ("v = Mul(r, c)", "float[1] c = {1}", 17),
        ("v = Div(r, c)", "float c = {1}", 17),
        ("v = Relu(r)", "", 17),
    ],
)
def test_6_nodes_that_change_nothing(node, initializers, opset):
    rewrites(
        OWN,
        f"g (float[N, 4] x) => (float[N, 4] y) <{initializers}> {{ r = Relu(x) {node} y = Neg(v) }}",
        "g (float[N, 4] x) => (float[N, 4] y) { r = Relu(x) y = Neg(r) }",
        opset=opset,
        shapes={"x": (3, 4)},
    )


@pytest.mark.parametrize(
    ("node", "initializers"),
    [
        ("y = Add(x, c)", "float[3, 4] c = {0,0,0,0, 0,0,0,0, 0,0,0,0}"),  # broadcasts N = 1 to 3
        ("y = Expand(x, c)", "int64[2] c = {3, 4}"),
        ("y = Sub(c, x)", "float c = {0}"),
        ("y = Div(c, x)", "float c = {1}"),
        ("y = Mul(x, c)", "float[2] c = {1, 2}"),
    ],
)
def test_6_nodes_that_look_as_if_they_changed_nothing(node, initializers):
    last = 2 if "float[2]" in initializers else 4
    stays(OWN, f"g (float[N, {last}] x) => (float[M, {last}] y) <{initializers}> {{ {node} }}")


def test_7_transposes():
    rewrites(
        OWN,
        """g (float[2, 3, 4] x) => (float[4, 3, 2] y) {
            a = Transpose <perm = [1, 2, 0]> (x) y = Transpose <perm = [1, 0, 2]> (a) }""",
        "g (float[2, 3, 4] x) => (float[4, 3, 2] y) { y = Transpose <perm = [2, 1, 0]> (x) }",
    )


def test_7_transposes_that_cancel():
    rewrites(
        OWN,
        """g (float[2, 3] x) => (float[2, 3] y) { r = Relu(x)
            a = Transpose <perm = [1, 0]> (r) b = Transpose <perm = [1, 0]> (a) y = Neg(b) }""",
        "g (float[2, 3] x) => (float[2, 3] y) { r = Relu(x) y = Neg(r) }",
    )


def test_7_reshapes():
    rewrites(
        OWN,
        """g (float[N, 6] x) => (float[N, 2, 3] y) <int64[3] a = {-1, 3, 2}, int64[3] b = {-1, 2, 3}> {
            v = Reshape(x, a) y = Reshape(v, b) }""",
        "g (float[N, 6] x) => (float[N, 2, 3] y) <int64[3] b = {-1, 2, 3}> { y = Reshape(x, b) }",
        shapes={"x": (4, 6)},
    )


def test_7_a_zero_in_a_reshape_means_the_reshape_before():
    stays(
        OWN,
        """g (float[6, 2] x) => (float[3, 4] y) <int64[3] a = {3, 2, 2}, int64[2] b = {0, -1}> {
            v = Reshape(x, a) y = Reshape(v, b) }""",
    )


def test_7_squeeze_transpose_unsqueeze():
    rewrites(
        OWN,
        """g (float[1, N, 1, 8] x) => (float[N, 1, 8] y) <int64[1] a = {0}> {
            v = Squeeze(x, a) w = Transpose <perm = [1, 0, 2]> (v) u = Neg(w) y = Transpose <perm = [1, 0, 2]> (u) }""",
        """g (float[1, N, 1, 8] x) => (float[N, 1, 8] y) <int64[3] t = {1, 0, 8}> {
            w = Reshape(x, t) u = Neg(w) y = Transpose <perm = [1, 0, 2]> (u) }""",
        shapes={"x": (1, 3, 1, 8)},
    )


def test_7_slices_on_two_axes():
    rewrites(
        OWN,
        """g (float[4, 4] x) => (float[2, 2] y)
        <int64[1] one = {1}, int64[1] three = {3}, int64[1] zero = {0}, int64[1] two = {2}> {
            v = Slice(x, one, three, zero) y = Slice(v, zero, three, one, two) }""",
        """g (float[4, 4] x) => (float[2, 2] y)
        <int64[2] s = {1, 0}, int64[2] e = {3, 3}, int64[2] a = {0, 1}, int64[2] t = {1, 2}> {
            y = Slice(x, s, e, a, t) }""",
    )


@pytest.mark.parametrize("opset", [11, 17])
def test_7_slices_that_cut_are_a_split(opset):
    low, high = "int64[1] z = {0}, int64[1] two = {2}", "int64[1] end = {2147483647}, int64[1] a = {1}"
    split = "Split <axis = 1, split = [2, 3]> (x)" if opset < 13 else "Split <axis = 1> (x, s)"
    rewrites(
        OWN,
        f"""g (float[N, 5] x) => (float[N, 2] p, float[N, 3] q) <{low}, {high}> {{
            q = Slice(x, two, end, a) p = Slice(x, z, two, a) }}""",
        f"g (float[N, 5] x) => (float[N, 2] p, float[N, 3] q) <int64[2] s = {{2, 3}}> {{ p, q = {split} }}",
        opset=opset,
        shapes={"x": (2, 5)},
    )


def test_7_concats():
    rewrites(
        OWN,
        """g (float[2] a, float[2] b, float[2] c) => (float[6] y) {
            v = Concat <axis = 0> (a, b) y = Concat <axis = 0> (v, c) }""",
        "g (float[2] a, float[2] b, float[2] c) => (float[6] y) { y = Concat <axis = 0> (a, b, c) }",
    )


def test_7_clip_of_relu():
    rewrites(
        OWN,
        "g (float[8] x) => (float[8] y) <float l = {0}, float h = {6}> { v = Relu(x) y = Clip(v, l, h) }",
        "g (float[8] x) => (float[8] y) <float l = {0}, float h = {6}> { y = Clip(x, l, h) }",
    )


def test_8_equal_nodes_and_constants():
    rewrites(
        OWN,
        """g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            v = Add(x, a) w = Add(x, b) y = Mul(v, w) }""",
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { v = Add(x, a) y = Mul(v, v) }",
    )


def test_8_random_nodes_are_never_equal():
    stays(
        OWN,
        """g (float[2] x) => (float[2] y) {
            v = RandomNormalLike <seed = 1.0> (x) w = RandomNormalLike <seed = 1.0> (x) y = Sub(v, w) }""",
    )


def test_9_the_unused_goes():
    rewrites(
        OWN,
        "g (float[2] x) => (float[2] y) <float[2] unused = {1, 2}> { v = Exp(x) w = Log(v) y = Neg(x) }",
        "g (float[2] x) => (float[2] y) { y = Neg(x) }",
    )


def test_10_onnxsim_is_asked():
    """x squared by way of an If with a constant condition: onnxsim inlines the branch, the clean-ups here do not."""
    before = """g (float[2] x) => (float[2] y) <bool c = {1}> {
        y = If (c) <then_branch = t () => (float[2] a) { a = Mul(x, x) },
                    else_branch = e () => (float[2] b) { b = Neg(x) }> }"""
    result = Simplify(use_onnxsim=True).run(parse(before), _context())
    assert [n.op_type for n in result.model.graph] == ["Mul"]
    assert any("onnxsim removed" in note for note in result.notes)


def _context():
    from graphopt.passes.base import Context

    return Context()


def test_6_a_slice_to_an_end_that_no_tensor_reaches():
    """Exporters write 1e9 for "to the end"; of rows of a mebibyte there cannot be so many."""
    rewrites(
        OWN,
        """g (float[N, 512, 512] x) => (float[N, 512, 512] y)
        <int64[1] start = {0}, int64[1] end = {1000000000}, int64[1] axis = {0}> {
            r = Relu(x) s = Slice(r, start, end, axis) y = Neg(s) }""",
        "g (float[N, 512, 512] x) => (float[N, 512, 512] y) { r = Relu(x) y = Neg(r) }",
        shapes={"x": (2, 512, 512)},
    )
    stays(
        OWN,
        """g (float[N, 2] x) => (float[M, 2] y)
        <int64[1] start = {0}, int64[1] end = {1000000000}, int64[1] axis = {0}> {
            y = Slice(x, start, end, axis) }""",
    )
