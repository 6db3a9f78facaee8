"""What the importer knows of each ONNX value: a constant, a plain Relax tensor, a blocked one, or several of these.

Precision. With precision `bfloat16`, float32 images are bfloat16 in memory and float32 in registers; with
`float16` likewise, and ARM computes some kernels in float16 afterwards (`half`). An emitter makes its result in
float32; who asks for the value decides what becomes of it:

- `Builder.wide`: an elementwise operator; where all the value's consumers are elementwise and end in one kernel
  (`Value.fuses`) it gets the producer's own float32 expression, which then never reaches memory;
- `Builder.blocked`, `moved`, `narrowed`: everything that reads memory; the value is narrowed once and stored;
- `Builder.plain`: operators that TVM lowers by itself; float32 again.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.targets.relax import bfloat16, computes, elementwise, integer_computes
from graphopt.targets.relax.form import Form

ELEMENTWISE, BROADCAST, INJECTIVE, FUSABLE_ROOT, OPAQUE = 0, 1, 2, 4, 8
"""TVM's operator patterns, as `FuseOps` reads them from the attribute `op_pattern`."""


@dataclass(frozen=True)
class Operand:
    """A Relax expression that an elementwise operator reads, and what makes float32 of its elements; None: nothing."""

    expression: Any
    decode: Callable | None = None


@dataclass(frozen=True)
class Encoded:
    """Bytes that stand for float32 values: (source - zero_point) * scale."""

    source: Value
    """uint8 or int8."""
    scale: float
    zero_point: int

    @property
    def scheme(self) -> tuple[float, int]:
        """Scale and zero point."""
        return self.scale, self.zero_point

    @property
    def decode(self) -> Callable:
        """From an element of the source to the number it stands for."""
        return elementwise.dequantize_of(self.scale, self.zero_point)

    @property
    def levels(self) -> Levels | None:
        """The same as a function of bytes; None where the source is none of bytes."""
        if self.source.dtype not in computes.BYTES:
            return None
        bytes_ = np.arange(256, dtype=np.uint8).view(self.source.dtype).astype(np.float32)
        return Levels(self.source, self.decode, (bytes_ - np.float32(self.zero_point)) * np.float32(self.scale))


@dataclass(frozen=True)
class Levels:
    """float32 values that are a function of bytes."""

    source: Value
    """uint8 or int8."""
    decode: Callable
    """From an element of the source to the number it stands for."""
    table: np.ndarray
    """float32: that number for each of the 256 bytes, by what they are without a sign: of int8, -1 is the last."""


@dataclass(frozen=True)
class Origin:
    """What bytes were quantized from: a float32 Relax expression in ONNX's layout."""

    expression: Any
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Sums:
    """A layer's result before it is float32: sums * factors + offsets in each channel, then clipped."""

    sums: Any
    """A Relax expression in blocked form, int32 or float32."""
    factors: np.ndarray
    offsets: np.ndarray
    """float64, one a channel."""
    largest: np.ndarray
    """What no sum of a channel exceeds in magnitude."""
    divisor: float = 1.0
    """A mean's count: the result is divided by it."""
    low: float = -math.inf
    high: float = math.inf

    def clipped(self, low: float, high: float) -> Sums:
        """The same with a Relu or Clip behind it."""
        return replace(self, low=min(max(self.low, low), high), high=max(min(self.high, high), low))

    def plus(self, numbers: np.ndarray) -> Sums | None:
        """The same and a number a channel; None behind a Relu or Clip."""
        if not math.isinf(self.low) or not math.isinf(self.high) or self.divisor != 1.0:
            return None
        return replace(self, offsets=self.offsets + numbers.reshape(-1).astype(np.float64))


@dataclass(frozen=True)
class Joint:
    """Two dequantized values added or multiplied, before the result is float32, then clipped."""

    operation: str
    """`add` or `multiply`."""
    a: Encoded
    b: Encoded
    stored: tuple[Any, Any]
    """The bytes of each as Relax expressions in the same blocked form, or one that broadcasts to it."""
    low: float = -math.inf
    high: float = math.inf

    def clipped(self, low: float, high: float) -> Joint:
        """The same with a Relu or Clip behind it."""
        return replace(self, low=min(max(self.low, low), high), high=max(min(self.high, high), low))


@dataclass
class Value:
    """One ONNX value; at least one of `const`, `plain`, `blocked`, `encoded`, `sums` is there."""

    shape: tuple[int, ...] | None
    """Static shape in ONNX's layout; None when it depends on data."""
    dtype: str
    """ONNX's element type. The forms of a float32 value may be stored as bfloat16."""
    const: np.ndarray | None = None
    plain: Any = None
    """A Relax expression in ONNX's layout, float32 or as it is stored."""
    blocked: Any = None
    """A Relax expression (N, C / block, H * W, block), for values of shape (N, C, H, W); float32 or as it is stored."""
    block: int = 0
    fuses: bool = True
    """True when every consumer is elementwise and in one kernel with the producer, so that nothing is stored."""
    encoded: Encoded | None = None
    """Of a dequantized activation: the bytes. Nothing is computed until somebody asks for float32."""
    levels: Levels | None = None
    """Of what elementwise operators made of dequantized bytes: the function. Likewise; beside `encoded` where it is
    also what other bytes stand for."""
    made_of: Levels | None = None
    """Of bytes that were looked up in a table: what they were quantized from."""
    sums: Sums | None = None
    """Of an integer layer's result: what it is computed from. Likewise."""
    origin: Origin | None = None
    """Of a quantized picture of few channels that is not blocked yet: whoever blocks it quantizes on the way."""
    joint: Joint | None = None
    """Of two dequantized values' sum or product: what it is computed from. Likewise."""
    readers: int = 0
    """How many nodes read the value; an output of the graph counts as one."""

    @property
    def coded(self) -> Encoded | Levels | None:
        """The bytes that the value is a function of, and the function."""
        return self.encoded or self.levels

    @property
    def is_blocked(self) -> bool:
        """True when the value is in blocked form already."""
        if self.blocked is not None or self.sums is not None or self.joint is not None:
            return True
        return self.coded is not None and self.coded.source.blocked is not None

    @property
    def is_image(self) -> bool:
        return self.shape is not None and len(self.shape) == 4

    @property
    def channels(self) -> int:
        assert self.shape is not None
        return self.shape[1]

    @property
    def lanes(self) -> int:
        """Channels of a block, of the value or of the bytes it stands for; 0 where neither is blocked."""
        return self.block or (self.coded.source.block if self.coded is not None else 0)

    @property
    def has_filler(self) -> bool:
        """True when the blocked form has padded channels."""
        return self.lanes > 0 and self.channels % self.lanes != 0


class Deferred(Value, abc.ABC):
    """A value whose form in ONNX's layout is made when somebody reads it, once."""

    _plain: Any

    @property
    def plain(self) -> Any:  # type: ignore[override]
        """The value in ONNX's layout, as a Relax expression."""
        if self._plain is None:
            self._plain = self._made()
        return self._plain

    @plain.setter
    def plain(self, value: Any) -> None:
        self._plain = value

    @property
    def waits(self) -> bool:
        """Whether nobody has read it yet."""
        return self._plain is None

    @abc.abstractmethod
    def _made(self) -> Any:
        """The form in ONNX's layout."""


class Builder:
    """Emits Relax bindings and converts values between their forms, each at most once."""

    def __init__(self, block_builder, form: Form):
        self.bb = block_builder
        self.form = form
        self.lanes, self.precision, self.tiles, self.byte_type = form.lanes, form.precision, form.tiles, form.byte_type
        self.narrows, self.halves, self.block_for = form.narrows, form.halves, form.block_for
        self.layer = ""
        """Label of the ONNX node being emitted."""
        self.made_for: list[tuple[Any, str]] = []
        """Every constant made so far, and the node it was made for."""
        self._roots: dict[str, int] = {}

    @property
    def looks_up(self) -> bool:
        """True where a table of 256 bytes fits a few vector registers."""
        return self.form.tables

    def emit(self, expression, is_root: bool = False) -> Any:
        """Bind an expression; `is_root` when it starts a kernel that elementwise operators fuse into."""
        bound = self.bb.emit(expression)
        if self.narrows and element_type(bound) == "float32":
            root = len(self._roots) if is_root else self._root_of(expression)
            if root is not None:
                self._roots[str(bound.name)] = root
        return bound

    def _root_of(self, expression) -> int | None:
        """Which kernel an elementwise expression ends up in: that of the first operand that has one."""
        from tvm import relax

        pending = list(expression.args) if isinstance(expression, relax.Call) else []
        for operand in pending:
            if isinstance(operand, relax.Tuple):
                pending.extend(operand.fields)
            elif isinstance(operand, relax.Var) and str(operand.name) in self._roots:
                return self._roots[str(operand.name)]
        return None

    def call(self, function: Callable, *arguments, pattern: int | None = None, name: str = "", **options):
        """Emit a call of a tensor expression; its arguments are Relax expressions."""
        if pattern is not None:
            options["primfunc_attrs"] = {"op_pattern": pattern}
        hint = name or function.__name__
        made = self.bb.call_te(function, *arguments, primfunc_name_hint=hint, **options)
        return self.emit(made, pattern == FUSABLE_ROOT)

    def reshape(self, expression, shape: tuple[int, ...]) -> Any:
        """The same elements in the same order; no data moves."""
        from tvm import relax

        new_shape: Any = shape
        return self.emit(relax.op.reshape(expression, new_shape))

    def constant(self, array: np.ndarray):
        from tvm import relax

        array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar a vector
        made = relax.const(array, str(array.dtype))
        self.made_for.append((made, self.layer))
        return made

    def widened(self, expression) -> Any:
        """float32 of a Relax expression that may be stored in 16 bits."""
        if not self.narrows or element_type(expression) != self.precision:
            return expression
        return self.call(elementwise.mapped(bfloat16.widen, "widen"), expression, pattern=ELEMENTWISE, name="widen")

    def _stored(self, expression) -> Any:
        """What a float32 Relax expression is in memory."""
        if not self.narrows or element_type(expression) != "float32":
            return expression
        narrow = bfloat16.narrow if self.precision == bfloat16.DTYPE and self.lanes else bfloat16.cast(self.precision)
        return self.call(elementwise.mapped(narrow, "narrow"), expression, pattern=ELEMENTWISE, name="narrow")

    def plain(self, value: Value):
        """The value in ONNX's layout and element type."""
        return self.widened(self.moved(value))

    def moved(self, value: Value):
        """The value in ONNX's layout as it happens to be stored: for operators that only move elements."""

        if value.plain is None and value.const is not None:
            value.plain = self.constant(value.const) if value.const.size else self._empty(value.const)
        if value.plain is None and value.coded is not None:
            if value.coded.source.blocked is None:
                value.plain = self.decoded(value.coded, self.moved(value.coded.source))
            else:
                self.blocked(value)
        if value.plain is None:
            assert value.shape is not None and value.is_blocked
            _batch, channels, height, width = value.shape
            stored = self.blocked(value)
            if height * width == 1 and not value.has_filler:
                value.plain = self.reshape(stored, value.shape)
            else:
                value.plain = self.call(
                    computes.unblock_channels,
                    stored,
                    channels=channels,
                    size=(height, width),
                    pattern=INJECTIVE,
                )
        return value.plain

    def _empty(self, array: np.ndarray) -> Any:
        """A tensor with no elements, made at run time: a library's file has no form for a constant of these."""
        from tvm import relax

        shape: Any = array.shape
        return self.emit(relax.op.zeros(shape, str(array.dtype)))

    def decoded(self, encoded: Encoded | Levels, stored: Any) -> Any:
        """float32 of the bytes, as an operator of its own: for those who know of no bytes."""
        return self.call(
            elementwise.mapped(encoded.decode, "dequantize"), stored, pattern=ELEMENTWISE, name="dequantize"
        )

    def finished(self, result: Sums, block: int) -> Any:
        """float32 of a layer's sums, in registers."""
        divided = (x / result.divisor for x in (result.factors, result.offsets))
        along = [block_array(x.astype(np.float32).reshape(1, -1, 1, 1), block) for x in divided]
        bounds = [None if math.isinf(x) else x for x in (result.low, result.high)]
        constants = [self.constant(x) for x in along]
        return self.call(
            integer_computes.rescale, result.sums, *constants, low=bounds[0], high=bounds[1], pattern=ELEMENTWISE
        )

    def narrowed(self, value: Value):
        """The value in ONNX's layout, in 16 bits where the precision says so: an operand of a matrix product."""
        return self._stored(self.moved(value))

    def blocked(self, value: Value) -> Any:
        """The value (N, C, H, W) in blocked form as it is stored, or None when it has none."""

        self._finish(value)
        if value.blocked is not None:
            value.blocked = self._stored(value.blocked)
            return value.blocked
        if not value.is_image:
            return None
        if value.coded is not None:
            source = value.coded.source
            value.blocked = self._stored(self.decoded(value.coded, self.blocked(source)))
            value.block = source.block
            return value.blocked
        assert value.shape is not None
        batch, channels, height, width = value.shape
        block = self.block_for(channels)
        if value.const is not None:
            array = block_array(value.const, block)
            value.blocked = self.constant(self.narrow_constant(array))
        elif height * width == 1 and channels % block == 0:
            value.blocked = self._stored(self.reshape(self.moved(value), (batch, channels // block, 1, block)))
        else:
            made = self.call(computes.block_channels, self.moved(value), block=block, pattern=INJECTIVE)
            value.blocked = self._stored(made)
        value.block = block
        return value.blocked

    def wide(self, value: Value) -> Any:
        """The value in blocked form and float32, for an elementwise operator; None when it has no blocked form."""
        self._finish(value)
        if value.blocked is None or not value.fuses:
            self.blocked(value)
        return None if value.blocked is None else self.widened(value.blocked)

    def combine(self, operation: str, left: Operand, right: Operand) -> Any:
        """`left` and `right` in one broadcasting operation of TVM's `topi`.

        They are decoded inside: as an operator of its own that would be fused behind the operand's own kernel, and
        float32 be what is stored.
        """

        def combined(*stored):
            from tvm import topi

            operands = [
                x if operand.decode is None else elementwise.mapped(operand.decode, "decode")(x)
                for x, operand in zip(stored, (left, right), strict=True)
            ]
            return getattr(topi, operation)(*operands)

        expressions = left.expression, right.expression
        shapes = [tuple(int(d) for d in x.ty.shape.values) for x in expressions]
        whole = np.broadcast_shapes(*shapes)
        pattern = ELEMENTWISE if whole in shapes else BROADCAST
        if any(shape != whole and not _is_constant(x) for x, shape in zip(expressions, shapes, strict=True)):
            pattern = INJECTIVE  # fused into what computes the smaller operand it would compute that once a tile
        return self.call(combined, *expressions, pattern=pattern, name=operation)

    def meet(self, *values: Value) -> None:
        """Results of different kernels meet in one operator: all but the first go through memory, so are stored.

        The first is that of the kernel emitted first: it is the one the operator is fused into.
        """
        for value in values:
            self._finish(value)
        fresh = [v for v in values if v.blocked is not None and self._root_in(v) is not None]
        roots = {self._root_in(v) for v in fresh}
        for value in fresh:
            if len(roots) > 1 and self._root_in(value) != min(r for r in roots if r is not None):
                self.blocked(value)

    def _as_it_is(self, value: Value) -> Operand:
        """The value in blocked form, float32 where it is in registers, else as it is stored."""
        if value.coded is not None:
            return Operand(self.blocked(value.coded.source), value.coded.decode)
        self._finish(value)
        return _operand(value.blocked if value.blocked is not None and value.fuses else self.blocked(value))

    def _finish(self, value: Value) -> None:
        """Have a layer's result in blocked form, float32 in registers."""
        if value.blocked is None and value.sums is not None:
            value.blocked = self.finished(value.sums, value.block)
        if value.blocked is None and value.joint is not None:
            joint = value.joint
            left, right = (Operand(x, y.decode) for x, y in zip(joint.stored, (joint.a, joint.b), strict=True))
            value.blocked = self.combine(joint.operation, left, right)
            if not math.isinf(joint.low) or not math.isinf(joint.high):
                low, high = (None if math.isinf(x) else x for x in (joint.low, joint.high))
                clip = elementwise.mapped(elementwise.clip_of(low, high), "clip")
                value.blocked = self.call(clip, value.blocked, pattern=ELEMENTWISE, name="clip")

    def readable(self, value: Value) -> Operand:
        """The value in ONNX's layout, for `combine`."""
        if value.coded is not None:
            return Operand(self.moved(value.coded.source), value.coded.decode)
        return Operand(self.plain(value))

    def _root_in(self, value: Value) -> int | None:
        return self._roots.get(str(value.blocked.name))

    def narrow_constant(self, array: np.ndarray) -> np.ndarray:
        """A float array as it is stored: rounded to 16 bits where the precision says so."""
        narrow = self.narrows and array.dtype == np.float32
        return bfloat16.narrow_array(array, self.precision) if narrow else array

    def operand(self, value: Value, like: Value) -> Operand | None:
        """`value` in a blocked form that broadcasts against blocked `like`, or None where there is none."""

        if value.is_blocked and value.lanes == like.lanes and value.channels == like.channels:
            return self._as_it_is(value)
        if value.shape is None or len(value.shape) > 4:
            return None
        shape = (1,) * (4 - len(value.shape)) + value.shape
        assert like.shape is not None
        batch, channels, height, width = shape
        if channels not in (1, like.channels) or batch not in (1, like.shape[0]):
            return None
        if (height, width) not in ((1, 1), like.shape[2:]):
            return None
        if channels == 1 and like.channels != 1:
            if value.const is not None:
                return Operand(self.constant(value.const.reshape(batch, 1, height * width, 1)))
            return Operand(self.reshape(self.plain(value), (batch, 1, height * width, 1)))
        if value.const is not None:
            return Operand(self.constant(block_array(value.const.reshape(shape), like.lanes)))
        if len(value.shape) != 4 or self.block_for(channels) != like.lanes:
            return None
        return self._as_it_is(value)


def element_type(expression) -> str:
    """The element type of a Relax tensor expression; empty for a tuple."""
    return str(getattr(expression.ty, "dtype", ""))


def _operand(expression) -> Operand:
    return Operand(expression, bfloat16.widen if element_type(expression) in bfloat16.NARROW else None)


def _is_constant(expression) -> bool:
    import tvm

    return isinstance(expression, tvm.ir.GenericConst)


def block_array(array: np.ndarray, block: int) -> np.ndarray:
    """(N, C, H, W) -> (N, ceil(C / block), H * W, block) with zeros for padded channels."""
    batch, channels, height, width = array.shape
    blocks = -(-channels // block)
    padded = np.zeros((batch, blocks * block, height * width), array.dtype)
    padded[:, :channels] = array.reshape(batch, channels, height * width)
    return np.ascontiguousarray(padded.reshape(batch, blocks, block, -1).transpose(0, 1, 3, 2))


def known(value: Value | None) -> np.ndarray | None:
    return None if value is None else value.const


def constant(array: np.ndarray) -> Value:
    return Value(tuple(array.shape), str(array.dtype), const=array)
