"""Elementwise tensor expressions that vectorise: no call into the C mathematical library, and a division only where
the processor's divider is worth it (`divides`).

`exp` is a polynomial of degree 6 on |r| <= ln 2 / 2, fitted here for the least relative error (3e-9); the coefficients
of `tanh` are those of Cephes (S. Moshier, tanhf.c). Both are within 2 ulp of the correctly rounded value over their
whole range, `sigmoid` within 4, measured against float64 in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.targets.relax import normal_share, rounding

_EXP = (1.381459878757596e-3, 8.368716575205326e-3, 4.166838899254799e-2, 1.666652113199234e-1, 4.999999403953552e-1)
"""Coefficients of r^6 to r^2; those of r and 1 are 1."""
_ROUND = 12582912.0
"""1.5 * 2^23: added to a small number it leaves the nearest integer in the low bits of the sum."""
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF = (
    -0.0009000014397315681, 0.0021241232752799988, -0.001192202907986939, 0.0018333734478801489,
    -0.00795068684965372, 0.01432561594992876, -0.01978485845029354, 0.029621368274092674,
    -0.04351752623915672, 0.05842158943414688, -0.0740041509270668, 0.09059291332960129,
    -0.10918053984642029, 0.1340847909450531, -0.18010859191417694, 0.36073681712150574,
)  # fmt: skip
_ERF_END = 3.92
"""erf is 1 in float32 from here on."""


def exp_of(x):
    """exp of a float32 expression; below the least normal number that number, above the largest infinity."""
    from tvm import tirx

    def body(x):
        clamped = tirx.max(_f(_LOWEST), tirx.min(_f(_HIGHEST), x))  # a NaN stays one: it is the second operand
        return tirx.Select(x > _f(_HIGHEST), _f(np.inf), _let(clamped, _exp_in_range))

    return _let(x, body)


_LOWEST, _HIGHEST = -87.33654, 88.72283


def share_of(x):
    """exp of a number that is not positive; 0 below -87: denormals slow the next product down."""
    from tvm import tirx

    def body(x):
        bounded = tirx.max(_f(-87.0), x)
        return tirx.Select(x < _f(-87.0), _f(0.0), _let(bounded, _exp_in_range))

    return _let(x, body)


def _exp_in_range(x, sign: float = 1.0):
    """exp(sign * x) for |x| small enough that the result is normal: reduce to r = x - n ln 2, polynomial, times 2^n.

    The sum `shifted` holds n in its low bits, so that 2^n is an integer addition to the polynomial's exponent.
    """
    from tvm import tirx

    def reduced(shifted):
        n = shifted - _f(_ROUND)
        return _let(n, lambda n: (x * _f(sign) - n * _f(0.693359375)) - n * _f(-2.12194440e-4))

    def scaled(shifted):
        return _let(reduced(shifted), lambda r: times_power((_horner(_EXP, r) * r + _f(1.0)) * r + _f(1.0), shifted))

    def times_power(value, shifted):
        bits: Any = tirx.reinterpret("int32", value)
        exponent: Any = tirx.reinterpret("int32", shifted)
        return tirx.reinterpret("float32", bits + (exponent << 23))

    return _let(x * _f(sign * 1.44269504088896341) + _f(_ROUND), scaled)


def divides(lanes: int) -> bool:
    """Whether a division beats the eight operations that `reciprocal_of` replaces it with.

    A divider works beside the multipliers: 8 lanes take it 5 or 6 cycles since Skylake and Zen, 16 lanes two to three
    times as long. Measured in x * sigmoid(x) on Zen 3, cycles a vector: 10 with a division, 15 without.
    """
    return lanes <= 8


def reciprocal_of(d, divide: bool = False):
    """1 / d of a float32 expression between 1 and 2^126; without `divide` by multiplications only.

    The difference of exponents is a first guess, within 12 %; the cubic step y + y e + y e^2 with e = 1 - d y takes
    the third power of its error, twice.
    """
    from tvm import tirx

    if divide:
        return _f(1.0) / d

    def refined(d, y):
        return _let(y, lambda y: _let(_f(1.0) - d * y, lambda e: y + y * (e * e + e)))

    def body(d):
        bits: Any = tirx.reinterpret("int32", d)
        guess = tirx.reinterpret("float32", tirx.const(0x7EF311C3, "int32") - bits)
        return refined(d, refined(d, guess))

    return _let(d, body)


def sigmoid_of(x, divide: bool = False):
    """1 / (1 + exp(-x)); at least 1e-38."""
    from tvm import tirx

    bounded = tirx.max(_f(-_SATURATED), tirx.min(_f(_SATURATED), x))
    return _let(bounded, lambda x: _let(_exp_in_range(x, -1.0), lambda e: reciprocal_of(e + _f(1.0), divide)))


_SATURATED = 87.0


def tanh_of(x, divide: bool = False):
    """tanh: an odd polynomial near zero, 1 - 2 / (exp(2 |x|) + 1) elsewhere."""
    from tvm import tirx

    def near(x):
        return _let(x * x, lambda square: _horner(_TANH, square) * square * x + x)

    def far(x, size):
        bounded = tirx.min(_f(10.0), size)  # past 9.02 the result rounds to one
        power = _let(bounded + bounded, _exp_in_range)
        inverse = _let(power, lambda e: reciprocal_of(e + _f(1.0), divide))
        positive = _let(inverse, lambda y: _f(1.0) - _f(2.0) * y)
        return _let(positive, lambda y: tirx.Select(x < _f(0.0), _f(0.0) - y, y))

    def body(x):
        size = tirx.max(x, _f(0.0) - x)
        return _let(size, lambda size: tirx.Select(size < _f(0.625), near(x), far(x, size)))

    return _let(x, body)


def erf_of(x):
    """The error function: x times a polynomial in x * x, shifted to [-1, 1] so that no term is large.

    The polynomial interpolates erf(x) / x at Chebyshev's nodes, degree 15: within 2e-7 of the exact value everywhere.
    """
    from tvm import tirx

    def near(x):
        shifted = x * x * _f(2 / _ERF_END**2) - _f(1.0)
        product = _let(shifted, lambda u: _horner(_ERF, u)) * x
        return tirx.max(tirx.min(product, _f(1.0)), _f(-1.0))

    return _let(tirx.max(tirx.min(x, _f(_ERF_END)), _f(-_ERF_END)), near)


def gelu_of(x, table: bool = False):
    """x / 2 * (1 + erf(x / sqrt(2))); with `table` by `normal_share`."""
    if table:
        return _let(x, lambda x: x * (_f(0.5) + normal_share.normal_share(x)))
    return _let(x, lambda x: x * _f(0.5) * (_f(1.0) + erf_of(x * _f(np.sqrt(0.5)))))


def gelu_tanh_of(x, divide: bool = False):
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""

    def inner(x):
        return tanh_of(_f(np.sqrt(2 / np.pi)) * (x + _f(0.044715) * x * x * x), divide)

    return _let(x, lambda x: x * _f(0.5) * (_f(1.0) + inner(x)))


def clip_of(low: float | None, high: float | None) -> Callable:
    """min(max(x, low), high) of float32; None leaves a side open."""
    if low is not None and high is not None:
        low = min(low, high)  # the other order then gives the same, and a number for what is none

    def apply(x):
        from tvm import tirx

        y = x if high is None else tirx.min(x, _f(high))
        return y if low is None else tirx.max(y, _f(low))

    return apply


def leaky_relu_of(alpha: float) -> Callable:
    """x where x is positive, alpha * x elsewhere."""

    def apply(x):
        from tvm import tirx

        if 0 <= alpha <= 1:  # no name for x: the vectoriser refuses one that inlining has bound to two values
            return tirx.max(x, x * _f(alpha))
        return _let(x, lambda x: tirx.Select(x > _f(0.0), x, x * _f(alpha)))

    return apply


def hard_sigmoid_of(alpha: float, beta: float) -> Callable:
    """max(0, min(1, alpha * x + beta))."""
    return lambda x: clip_of(0.0, 1.0)(x * _f(alpha) + _f(beta))


def hard_swish_of(x):
    """x * max(0, min(1, x / 6 + 1 / 2))."""
    return _let(x, lambda x: x * hard_sigmoid_of(1 / 6, 0.5)(x))


def quantize_of(scale: float, zero_point: int, dtype: str, *, divide: bool = True) -> Callable:
    """ONNX QuantizeLinear to an integer of at most 16 bits: divide, round half to even, shift, saturate.

    Without `divide` by a multiplication, where the reciprocal is a normal number: a tenth of the time with 16 lanes,
    and another level only where the quotient is within a unit in the last place of a tie.
    """
    info = np.iinfo(dtype)
    reciprocal = np.float32(1 / scale) if scale else np.float32(0)
    divide = divide or not np.finfo(np.float32).tiny <= reciprocal < np.inf

    def apply(x):
        from tvm import tirx

        level = x / _f(scale) if divide else x * _f(float(reciprocal))
        bounded: Any = tirx.max(tirx.min(level, _f(info.max - zero_point)), _f(info.min - zero_point))
        whole: Any = rounding.rounded(bounded)
        return (whole + zero_point if zero_point else whole).astype(dtype)

    return apply


def dequantize_of(scale: float, zero_point: int) -> Callable:
    """ONNX DequantizeLinear with one scale: (q - zero_point) * scale, the difference taken in int32."""
    return lambda q: (q.astype("int32") - zero_point).astype("float32") * _f(scale)


def mapped(function: Callable, name: str) -> Callable:
    """A tensor expression that applies `function` to every element."""

    def expression(data):
        from tvm import te

        return te.compute(data.shape, lambda *i: function(data[i]), name=name)

    return expression


def _let(value, body: Callable):
    """`body(value)` with the value named: inlining and code generation then see it once, not once a use.

    Names inside the value move outside: analyses of TVM visit the value of a name several times, so names within
    values within values would cost a power of their depth.
    """
    from tvm import tirx

    if isinstance(value, tirx.Let):
        return tirx.Let(value.var, value.value, _let(value.body, body))
    name = tirx.Var("t", "float32")
    return tirx.Let(name, value, body(name))


def _f(value: float):
    from tvm import tirx

    return tirx.const(float(np.float32(value)), "float32")


def _horner(coefficients, x):
    total = _f(coefficients[0])
    for c in coefficients[1:]:
        total = total * x + _f(c)
    return total
