"""Layer normalization between products: what it reads added on the way in, what it makes quantized on the way out.

A transformer's normalization reads the sum of a product and a residual, and makes numbers that are needed twice: in
float32 for the next residual, in 8 bits for the next products. `RowSum` and `Normalized` are values that wait until it
is known who reads them, so that all of this is one pass over a row that is in the first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax import elementwise
from graphopt.targets.relax.rows import Rows
from graphopt.targets.relax.values import ELEMENTWISE, OPAQUE, Builder, Deferred, Value


class RowSum(Deferred):
    """Rows in blocks plus a value of the same shape in ONNX's layout; added when somebody reads it."""

    def __init__(self, builder: Builder, rows: Rows, other: Value):
        self._builder, self.rows, self.other = builder, rows, other
        super().__init__(rows.shape, "float32")

    def _made(self) -> Any:
        """The sum, as an operator of its own."""
        readable = self._builder.readable
        return self._builder.combine("add", readable(self.rows), readable(self.other))

    @property
    def waits(self) -> bool:
        """Whether nobody has read it yet, and its blocks are still there."""
        return super().waits and self.rows.in_blocks


def row_sum(builder: Builder, a: Value, b: Value) -> RowSum | None:
    """The sum of rows in blocks, which nobody else reads, and another value; None where it is something else."""
    if not supported(builder):
        return None
    for rows, other in ((a, b), (b, a)):
        if not isinstance(rows, Rows) or not rows.in_blocks or rows.readers != 1 or rows.encoded is not None:
            continue
        in_memory = other.dtype == "float32" and other.const is None and other.coded is None and not other.is_blocked
        if in_memory and not isinstance(other, Rows) and rows.shape == other.shape:
            return RowSum(builder, rows, other)
    return None


def supported(builder: Builder) -> bool:
    """Whether kernels read blocks of vectors and store float32."""
    return builder.lanes > 0 and not builder.narrows


@dataclass(frozen=True)
class Normalization:
    """What a LayerNormalization over the last axes reads."""

    data: Value
    rows: int
    columns: int
    scale: np.ndarray
    shift: np.ndarray
    epsilon: float


class Normalized(Deferred):
    """The result of a layer normalization, computed when somebody reads it."""

    def __init__(self, builder: Builder, made_by: Normalization, shape: tuple[int, ...]):
        self._builder, self._made_by = builder, made_by
        super().__init__(shape, "float32")

    def _made(self) -> Any:
        return self._shaped(self._emit(None))

    def quantized(self, factors: np.ndarray, zero_point: int, dtype: str) -> Value:
        """The result times one factor a column, (columns,), rounded to bytes."""
        if not self.waits:
            found = self._builder.call(
                quantized_rows, self.plain, self._vector(factors), scheme=(zero_point, dtype), pattern=ELEMENTWISE
            )
            return Value(self.shape, dtype, plain=found)
        numbers, bytes_ = self._emit((factors, zero_point, dtype))
        self._plain = self._shaped(numbers)
        return Value(self.shape, dtype, plain=self._shaped(bytes_))

    def _vector(self, numbers: np.ndarray) -> Any:
        return self._builder.constant(numbers.reshape(-1).astype(np.float32))

    def _shaped(self, matrix: Any) -> Any:
        assert self.shape is not None
        whole = (self._made_by.rows, self._made_by.columns)
        return matrix if self.shape == whole else self._builder.reshape(matrix, self.shape)

    def _emit(self, bytes_: tuple[np.ndarray, int, str] | None) -> Any:
        from tvm import relax

        builder, known = self._builder, self._made_by
        matrix = (known.rows, known.columns)
        data = known.data
        if isinstance(data, RowSum) and data.waits:
            other = builder.reshape(builder.plain(data.other), matrix)
            operands = [builder.blocked(data.rows.image), other]
        else:
            plain = builder.plain(data)
            operands = [plain if data.shape == matrix else builder.reshape(plain, matrix)]
        constants = [self._vector(known.scale), self._vector(known.shift)]
        scheme = None
        if bytes_ is not None:
            factors, zero_point, dtype = bytes_
            constants.append(self._vector(factors))
            scheme = (zero_point, dtype)
        made = builder.call(
            layer_norm_rows,
            operands,
            constants,
            epsilon=known.epsilon,
            scheme=scheme,
            pattern=OPAQUE,
            name="layer_norm",
        )
        if scheme is None:
            return made
        return tuple(builder.emit(relax.TupleGetItem(made, i)) for i in range(2))


class Scaled(Deferred):
    """A layer normalization's result times a constant for each column; multiplied when somebody reads it."""

    def __init__(self, builder: Builder, source: Normalized, factors: np.ndarray):
        self._builder, self.source, self.factors = builder, source, factors
        super().__init__(source.shape, "float32")

    def _made(self) -> Any:
        """The product, as an operator of its own."""
        builder = self._builder
        times = Value(self.factors.shape, "float32", const=self.factors)
        return builder.combine("multiply", builder.readable(self.source), builder.readable(times))


def scaled(builder: Builder, a: Value, b: Value) -> Value | None:
    """A layer normalization's result times a constant a column; None where it is something else."""
    for value, times in ((a, b), (b, a)):
        if not isinstance(value, Normalized) or times.const is None or not value.shape:
            continue
        one_a_column = times.const.shape[-1:] == (value.shape[-1],) == (times.const.size,)
        if one_a_column and times.const.ndim <= len(value.shape):
            return Scaled(builder, value, times.const.reshape(-1))
    return None


def quantized(value: Value, scale: float, zero_point: int, dtype: str) -> Value | None:
    """A layer normalization's result, scaled or not, as bytes; None where it is something else."""
    assert value.shape is not None
    reciprocal = np.float32(1.0 / scale) if scale else np.float32(np.inf)
    if dtype not in ("uint8", "int8") or not np.finfo(np.float32).tiny <= reciprocal < np.inf:
        return None
    if isinstance(value, Normalized):
        return value.quantized(np.full(value.shape[-1], reciprocal, np.float32), zero_point, dtype)
    if isinstance(value, Scaled):
        factors = value.factors.astype(np.float64) / scale
        return value.source.quantized(factors, zero_point, dtype) if np.isfinite(factors).all() else None
    return None


def layer_norm_rows(operands, constants, *, epsilon: float, scheme: tuple[int, str] | None = None):
    """(x - mean) / sqrt(variance + epsilon) * scale + shift over the last axis of x, (rows, columns).

    x: one operand, or the sum of two, of which the first is in blocks (1, columns / b, rows, b); constants: scale and
    shift, and with `scheme` (zero point, element type) what the result is multiplied by to be rounded to bytes, which
    are then a second result. The variance is the mean of the squared differences from the mean: no cancellation.
    """
    from tvm import te, tirx

    data: Any = operands[-1]
    rows, columns = (int(d) for d in data.shape)
    if len(operands) == 2:
        blocked = operands[0]
        lanes = int(blocked.shape[3])

        def summed(i, c):
            return blocked[0, c // lanes, i, c % lanes] + operands[1][i, c]

        data = te.compute((rows, columns), summed, name="row_data")
    scale, shift = constants[:2]
    share = tirx.const(float(np.float32(1 / columns)), "float32")
    k, j = te.reduce_axis((0, columns), "k"), te.reduce_axis((0, columns), "j")
    total: Any = te.compute((rows,), lambda i: te.sum(data[i, k], axis=k), name="row_sum")

    def square(i):
        difference = data[i, j] - total[i] * share
        return te.sum(difference * difference, axis=j)

    squares: Any = te.compute((rows,), square, name="row_squares")
    slack, one = tirx.const(float(np.float32(epsilon)), "float32"), tirx.const(1.0, "float32")

    def cell(i, c):
        factor = one / tirx.sqrt(squares[i] * share + slack)
        return (data[i, c] - total[i] * share) * factor * scale[c] + shift[c]

    done: Any = te.compute((rows, columns), cell, name="layer_norm")
    if scheme is None:
        return done
    zero_point, dtype = scheme
    round_ = elementwise.quantize_of(1.0, zero_point, dtype, divide=False)
    bytes_ = te.compute((rows, columns), lambda i, c: round_(done[i, c] * constants[2][c]), name="row_bytes")
    return [done, bytes_]


def quantized_rows(data, factors, *, scheme: tuple[int, str]):
    """Numbers times one factor a column of the last axis, rounded to bytes."""
    from tvm import te

    zero_point, dtype = scheme
    round_ = elementwise.quantize_of(1.0, zero_point, dtype, divide=False)
    return te.compute(data.shape, lambda *i: round_(data[i] * factors[i[-1]]), name="quantize")
