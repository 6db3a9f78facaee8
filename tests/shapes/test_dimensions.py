"""Arithmetic with sizes that are not known agrees with arithmetic on any sizes they may have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphopt.shapes.dimensions import Dim, are_equal, at_most, floor_divide, is_capped, is_natural, truncate_divide

H, W = Dim.named("H"), Dim.named("W")

EXPRESSIONS = st.recursive(
    st.one_of(st.integers(-4, 4), st.sampled_from(["H", "W"])),
    lambda inner: st.tuples(st.sampled_from("+-*"), inner, inner),
    max_leaves=8,
)


def evaluate(expression, h, w):
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return h if expression == "H" else w
    operation, left, right = expression
    a, b = evaluate(left, h, w), evaluate(right, h, w)
    return a + b if operation == "+" else a - b if operation == "-" else a * b


def substitute(size, h, w):
    if not isinstance(size, Dim):
        return size
    total = 0
    for monomial, factor in size.terms.items():
        for name in monomial:
            factor *= {"H": h, "W": w}[name]
        total += factor
    return total


@given(EXPRESSIONS, st.integers(0, 9), st.integers(0, 9))
def test_polynomials_agree_with_integers(expression, h, w):
    assert substitute(evaluate(expression, H, W), h, w) == evaluate(expression, h, w)


@given(EXPRESSIONS, EXPRESSIONS)
def test_equal_means_equal_everywhere(left, right):
    a, b = evaluate(left, H, W), evaluate(right, H, W)
    sizes = [(2, 3), (5, 7), (11, 13), (101, 211), (1009, 2003)]
    same = all(evaluate(left, h, w) == evaluate(right, h, w) for h, w in sizes)
    if a == b:
        assert same and hash(a) == hash(b)


@given(EXPRESSIONS, EXPRESSIONS, st.integers(0, 9), st.integers(0, 9))
def test_equal_or_not_is_never_wrong(left, right, h, w):
    same = are_equal(evaluate(left, H, W), evaluate(right, H, W))
    assert same in (None, evaluate(left, h, w) == evaluate(right, h, w))


def test_equal_or_not():
    assert are_equal(H, -1) is False and are_equal(H * 2 + 1, 0) is False and are_equal(H, H + 1) is False
    assert are_equal(H, H) is True and are_equal(3, 3) is True
    assert are_equal(H, 0) is None and are_equal(H, W) is None and are_equal(H - W, -1) is None
    half = truncate_divide(H - 4, 2)
    assert half is not None and are_equal(half, -1) is None, "H may be 2"


def test_capped_sizes():
    capped = at_most(64, H + W)  # type: ignore[arg-type]
    assert is_capped(capped, W + H) and not is_capped(capped, H) and not is_capped(H, H)
    assert not is_capped(capped * 2, W + H) and not is_capped(3, H) and not is_capped(capped, capped)
    assert is_natural(capped) and not is_natural(H * W * -1 + 2)  # type: ignore[arg-type]


@given(st.integers(-20, 20), st.integers(-5, 5))
def test_onnx_division_rounds_towards_zero(a, b):
    assert truncate_divide(a, b) == (None if b == 0 else int(a / b))


def test_division():
    assert floor_divide(H * 4 * W, 2) == H * W * 2
    assert floor_divide(H * 4, 4) is not H and floor_divide(H * 4, 4) == H
    assert floor_divide(H + 1, 2) == floor_divide(1 + H, 2) != floor_divide(H, 2)
    assert truncate_divide(H * 6, 3) == H * 2
    assert truncate_divide(H, W) == truncate_divide(H, W) != truncate_divide(W, H)
    assert truncate_divide(H, H) is None, "1 unless H is 0"
    assert H + 2 - 3 + 1 == H and H - H == 0 and repr(H * 2 + W) == "2*H+W"
