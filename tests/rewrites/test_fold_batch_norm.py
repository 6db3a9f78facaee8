"""`fold-batch-norm`, case by case, as numbered in its docstring.

The statistics are chosen so that a = scale / sqrt(var + epsilon) is a power of two: the folded weights are exact,
and what remains is the rounding of the sums (a few units in the last place of numbers up to about 100).
"""

from __future__ import annotations

import pytest

from graphopt.passes.fold_batch_norm import FoldBatchNorm
from tests.rewrites.pairs import rewrites, stays

FOLD = FoldBatchNorm()
STATISTICS = "float[2] s = {2, 4}, float[2] b = {1, -1}, float[2] m = {1, 0.5}, float[2] v = {4, 16}"
"""With epsilon 0: a = {1, 1} * {1, 1} = {1, 1}, shift = b - m*a = {0, -1.5}."""
DOUBLES = "float[2] s = {4, 1}, float[2] b = {1, -1}, float[2] m = {1, 0.5}, float[2] v = {4, 4}"
"""With epsilon 0: a = {2, 0.5}, shift = {-1, -1.25}."""
BN = "BatchNormalization <epsilon = 0.0>"
TOLERANCE = 8 * 128 * 2.0**-23
"""Eight units in the last place of sums that stay under 128."""


def test_1_after_conv():
    rewrites(
        FOLD,
        f"""g (float[1, 1, 4, 4] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] c = {{1, 2}}, {DOUBLES}> {{
            z = Conv (x, w, c) y = {BN} (z, s, b, m, v) }}""",
        """g (float[1, 1, 4, 4] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {2, 4, 6, 8, 2.5, 3, 3.5, 4}, float[2] c = {1, -0.25}> { y = Conv (x, w, c) }""",
        tolerance=TOLERANCE,
    )


def test_1_after_conv_without_bias_and_with_shared_weights():
    result = rewrites(
        FOLD,
        f"""g (float[1, 1, 4, 4] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, {DOUBLES}> {{
            z = Conv (x, w) n = {BN} (z, s, b, m, v) o = Conv (x, w) y = Add (n, o) }}""",
        """g (float[1, 1, 4, 4] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2, 1, 2, 2] w_2 = {2, 4, 6, 8, 2.5, 3, 3.5, 4},
         float[2] w_bias = {-1, -1.25}> { z = Conv (x, w_2, w_bias) o = Conv (x, w) y = Add (z, o) }""",
        tolerance=TOLERANCE,
    )
    assert set(result.model.graph.initializers) == {"w", "w_2", "w_bias"}


def test_2_after_conv_transpose_with_groups():
    rewrites(
        FOLD,
        f"""g (float[1, 2, 2, 2] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, {DOUBLES}> {{
            z = ConvTranspose <group = 2> (x, w) y = {BN} (z, s, b, m, v) }}""",
        """g (float[1, 2, 2, 2] x) => (float[1, 2, 3, 3] y)
        <float[2, 1, 2, 2] w = {2, 4, 6, 8, 2.5, 3, 3.5, 4}, float[2] c = {-1, -1.25}> {
            y = ConvTranspose <group = 2> (x, w, c) }""",
        tolerance=TOLERANCE,
    )


def test_3_after_gemm_with_trans_b_alpha_and_beta():
    rewrites(
        FOLD,
        f"""g (float[N, 3] x) => (float[N, 2] y)
        <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}, float[1] c = {{3}}, {DOUBLES}> {{
            z = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, c) y = {BN} (z, s, b, m, v) }}""",
        """g (float[N, 3] x) => (float[N, 2] y)
        <float[2, 3] w = {2, 4, 6, 2, 2.5, 3}, float[2] c = {11, 1.75}> {
            y = Gemm <transB = 1, alpha = 0.5> (x, w, c) }""",
        shapes={"x": (4, 3)},
        tolerance=TOLERANCE,
    )


def test_4_after_matmul():
    rewrites(
        FOLD,
        f"""g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {{1, 2, 3, 4}}, {DOUBLES}> {{
            z = MatMul (x, w) y = {BN} (z, s, b, m, v) }}""",
        """g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {2, 1, 6, 2}, float[2] c = {-1, -1.25}> {
            y = Gemm (x, w, c) }""",
        shapes={"x": (4, 2)},
        tolerance=TOLERANCE,
    )


def test_4_after_matmul_and_add():
    rewrites(
        FOLD,
        f"""g (float[N, 2] x) => (float[N, 2] y)
        <float[2, 2] w = {{1, 2, 3, 4}}, float[2] c = {{1, 2}}, {DOUBLES}> {{
            p = MatMul (x, w) z = Add (c, p) y = {BN} (z, s, b, m, v) }}""",
        """g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {2, 1, 6, 2}, float[2] c = {1, -0.25}> {
            p = MatMul (x, w) y = Add (c, p) }""",
        shapes={"x": (4, 2)},
        tolerance=TOLERANCE,
    )


def test_5_before_conv():
    """The second output sums 5 * -1 + 6 * -1 ... over its taps: a shift of b for each tap of its input channel."""
    rewrites(
        FOLD,
        f"""g (float[1, 2, 3, 3] x) => (float[1, 1, 2, 2] y)
        <float[1, 2, 2, 2] w = {{1, 2, 3, 4, 4, 4, 4, 4}}, {DOUBLES}> {{
            z = {BN} (x, s, b, m, v) y = Conv (z, w) }}""",
        """g (float[1, 2, 3, 3] x) => (float[1, 1, 2, 2] y)
        <float[1, 2, 2, 2] w = {2, 4, 6, 8, 2, 2, 2, 2}, float[1] c = {-30}> { y = Conv (x, w, c) }""",
        tolerance=TOLERANCE,
    )


def test_5_before_conv_with_padding_only_without_shift():
    body = """g (float[1, 2, 3, 3] x) => (float[1, 1, 4, 4] y)
        <float[1, 2, 2, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] s = {{4, 1}}, float[2] b = {{{shift}, 0}},
         float[2] m = {{0, 0}}, float[2] v = {{4, 4}}> {{
            z = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) y = Conv <pads = [1, 1, 1, 1]> (z, w) }}"""
    rewrites(
        FOLD,
        body.format(shift=0),
        """g (float[1, 2, 3, 3] x) => (float[1, 1, 4, 4] y)
        <float[1, 2, 2, 2] w = {2, 4, 6, 8, 2.5, 3, 3.5, 4}, float[1] c = {0}> {
            y = Conv <pads = [1, 1, 1, 1]> (x, w, c) }""",
        tolerance=TOLERANCE,
    )
    (skip,) = stays(FOLD, body.format(shift=1)).skipped
    assert "shift would differ at the border" in skip.reason


def test_6_before_conv_transpose():
    body = """g (float[1, 2, 3, 3] x) => (float[1, 1, {size}, {size}] y)
        <float[2, 1, {taps}, {taps}] w = {{{weights}}}, %s> {{
            z = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) y = ConvTranspose (z, w) }}""".replace(
        "%s", DOUBLES.replace("{", "{{").replace("}", "}}")
    )
    rewrites(
        FOLD,
        body.format(size=3, taps=1, weights="1, 4"),
        """g (float[1, 2, 3, 3] x) => (float[1, 1, 3, 3] y) <float[2, 1, 1, 1] w = {2, 2}, float[1] c = {-6}> {
            y = ConvTranspose (x, w, c) }""",
        tolerance=TOLERANCE,
    )
    (skip,) = stays(FOLD, body.format(size=4, taps=2, weights="1, 2, 3, 4, 5, 6, 7, 8")).skipped
    assert "overlaps unevenly" in skip.reason


def test_7_before_gemm():
    rewrites(
        FOLD,
        f"""g (float[N, 2] x) => (float[N, 2] y)
        <float[2, 2] w = {{1, 2, 3, 4}}, float[1, 2] c = {{1, 2}}, {DOUBLES}> {{
            z = {BN} (x, s, b, m, v) y = Gemm <alpha = 2.0, beta = 3.0> (z, w, c) }}""",
        """g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {2, 4, 1.5, 2}, float[2] c = {-6.5, -8}> {
            y = Gemm <alpha = 2.0> (x, w, c) }""",
        shapes={"x": (4, 2)},
        tolerance=TOLERANCE,
    )


CONV = "z = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w)"


@pytest.mark.parametrize(
    ("outputs", "nodes", "initializers", "opset", "reason"),
    [
        (
            "float[1, 2, 4, 4] y, float[1, 2, 4, 4] z",
            f"{CONV} y = {BN} (z, s, b, m, v)",
            STATISTICS,
            17,
            "output of the",
        ),
        (
            "float[1, 2, 4, 4] y",
            f"{CONV} n = {BN} (z, s, b, m, v) o = Relu(z) y = Add(n, o)",
            STATISTICS,
            17,
            "read by others",
        ),
        (
            "float[1, 2, 4, 4] y, float[2] rm, float[2] rv",
            f"{CONV} y, rm, rv = BatchNormalization <training_mode = 1> (z, s, b, m, v)",
            STATISTICS,
            17,
            "training mode",
        ),
        (
            "float[1, 2, 4, 4] y, float[2] rm, float[2] rv, float[2] sm, float[2] sv",
            f"{CONV} y, rm, rv, sm, sv = {BN} (z, s, b, m, v)",
            STATISTICS,
            9,
            "training mode",
        ),
        (
            "float[1, 2, 4, 4] y",
            f"t = Neg(s) {CONV} y = {BN} (z, t, b, m, v)",
            STATISTICS,
            17,
            "computed, not constant",
        ),
        (
            "float[1, 2, 4, 4] y",
            f"{CONV} y = {BN} (z, s, b, m, n)",
            STATISTICS + ", float[2] n = {-4, 1}",
            17,
            "not finite",
        ),
        ("float[1, 2, 4, 4] y", f"z = Relu(r) y = {BN} (z, s, b, m, v)", STATISTICS, 17, "no Conv"),
    ],
)
def test_refused_with_the_reason(outputs, nodes, initializers, opset, reason):
    weights = "float[2, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}"
    before = f"g (float[1, 1, 4, 4] x, float[1, 2, 4, 4] r) => ({outputs}) <{weights}, {initializers}> {{ {nodes} }}"
    result = stays(FOLD, before, opset=opset)
    assert result.applied == 0
    (skip,) = result.skipped
    assert reason in skip.reason
