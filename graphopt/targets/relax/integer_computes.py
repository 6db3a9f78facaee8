"""Tensor expressions of the integer kernels: bytes in, 32-bit sums out, and the way back to float32.

Channels are taken in fours, the *quads* that a dot-product instruction multiplies at a time: activations keep the
blocked form of `computes` with a block of whole quads, weights are packed so that the quads of neighbouring outputs lie
side by side.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, section 2 (sums of products in 32 bits; zero points as a correction).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.targets.relax import elementwise, narrowing, rounding
from graphopt.targets.relax.borders import Border, borders
from graphopt.targets.relax.computes import ROW, WINDOW

PAIRS = "graphopt.pairs"
"""Annotation of a block that multiplies bytes: 1 where two products always fit 16 bits; see `fits_pairs`."""
START = "start"
"""The block behind an integer anchor that adds what its sums start from."""
PIXELS, SCALE = "graphopt.pixels", "graphopt.scale"
"""Annotations of `pixels`."""
QUAD = 4
"""Products that one lane of a dot-product instruction adds up."""


def conv2d(
    data,
    weight,
    start,
    *,
    size: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
    out_size: tuple[int, int],
    pairs: bool,
):
    """2-D convolution of bytes: `start` plus sums of products of what is stored, zero points not regarded.

    data: (N, C / icb, H * W, icb) uint8 or int8; weight: (M / ocb, C / groups / icb, kH, kW, icb / 4, ocb * 4) int8;
    start: (1, M / ocb, 1, ocb) int32, or (1, M / ocb, classes, ocb) with a number for each class of outputs that see
    the same taps (see `borders`) -> (N, M / ocb, oH * oW, ocb) int32. `pads` (top, left, bottom, right) are positions
    whose bytes are 0. `pairs`: what `fits_pairs` says of the weight.
    """
    from tvm import te

    from graphopt.targets.relax import computes

    batch = int(data.shape[0])
    out_blocks, in_blocks, k_h, k_w, quads, wide = (int(d) for d in weight.shape)
    out_h, out_w = out_size
    padded = computes.padded(data, size, pads, 0)
    per_group = out_blocks // groups
    ico = te.reduce_axis((0, in_blocks), "ico")
    ici: Any = te.reduce_axis((0, quads), "ici")
    kh, kw = te.reduce_axis((0, k_h), "kh"), te.reduce_axis((0, k_w), "kw")
    four: Any = te.reduce_axis((0, QUAD), "four")

    def cell(n, o, p, v):
        block = ico if groups == 1 else (o // per_group) * in_blocks + ico
        y, x = computes.position(p, out_w, strides, dilations, kh, kw)
        product = _wide(padded(n, block, y, x, ici * QUAD + four)) * _wide(weight[o, ico, kh, kw, ici, v * QUAD + four])
        return te.sum(product, axis=[ico, kh, ici, kw, four])

    dense = (k_h, k_w) == (1, 1) and strides == (1, 1) and not any(pads)
    sums: Any = te.compute(
        (batch, out_blocks, out_h * out_w, wide // QUAD),
        cell,
        name="conv2d_int8",
        attrs={
            ROW: out_h * out_w if dense else out_w,
            WINDOW: [*size, *out_size, *strides, *pads[:2], *dilations, groups],
            PAIRS: int(pairs),
        },
    )
    return _started(sums, start, borders(size, (k_h, k_w), strides, dilations, pads[:2], out_size))


def depthwise(
    data,
    weight,
    start,
    *,
    size: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    out_size: tuple[int, int],
    pairs: bool,
):
    """Depthwise convolution of bytes: `start` plus sums of products of what is stored, zero points not regarded.

    data: (N, C / b, H * W, b) int8; weight: (C / b, kH, kW, b) int8; start: (1, C / b, classes, b) int32, as `conv2d`
    has it -> (N, C / b, oH * oW, b) int32. `pairs`: whether two products always fit 16 bits.
    """
    from tvm import te

    from graphopt.targets.relax import computes

    batch, blocks, _, lanes = (int(d) for d in data.shape)
    _, k_h, k_w, _ = (int(d) for d in weight.shape)
    frame = computes.padded(data, size, pads, 0)
    kh, kw = te.reduce_axis((0, k_h), "kh"), te.reduce_axis((0, k_w), "kw")

    def cell(n, c, p, v):
        y, x = computes.position(p, out_size[1], strides, dilations, kh, kw)
        return te.sum(_wide(frame(n, c, y, x, v)) * _wide(weight[c, kh, kw, v]), axis=[kh, kw])

    described = {WINDOW: [*size, *out_size, *strides, *pads[:2], *dilations, blocks], ROW: out_size[1]}
    shape = (batch, blocks, out_size[0] * out_size[1], lanes)
    sums: Any = te.compute(shape, cell, name="depthwise_int8", attrs={**described, PAIRS: int(pairs)})
    return _started(sums, start, borders(size, (k_h, k_w), strides, dilations, pads[:2], out_size))


def _started(sums, start, around: tuple[Border, Border]):
    """Sums plus the number of their class, or the only one."""
    from tvm import te

    down, across = around
    varies = int(start.shape[2]) > 1

    def cell(n, o, p, v):
        row, column = p // across.extent, p % across.extent
        seen: Any = down.class_of(row) * across.classes + across.class_of(column) if varies else 0
        return sums[n, o, p, v] + start[0, o, seen, v]

    return te.compute(sums.shape, cell, name=START)


def start_from(sums, start):
    """Sums plus one number a channel, (1, C / b, 1, b)."""
    from tvm import te

    return te.compute(sums.shape, lambda n, o, p, v: sums[n, o, p, v] + start[0, o, 0, v], name=START)


def rescale(sums, factor, offset, *, low: float | None, high: float | None):
    """float32 sums * factor + offset, with one of each a channel, (1, M / ocb, 1, ocb), between `low` and `high`."""
    from tvm import te

    clip = elementwise.clip_of(low, high)

    def cell(n, o, p, v):
        number: Any = sums[n, o, p, v].astype("float32")
        return clip(number * factor[0, o, 0, v] + offset[0, o, 0, v])

    return te.compute(sums.shape, cell, name="rescale")


def requantize(sums, factor, *offset, scheme: tuple[int, int, int], dtype: str):
    """Bytes of sums * factor (+ offset, where there is one), rounded half to even, plus a zero point, saturated.

    `scheme`: the zero point, the least byte and the largest one. |sums * factor + offset| must be below 2^31. The
    product is rounded to float32 before it is rounded to an integer, as in ONNX Runtime's kernels.
    """
    from tvm import te

    def cell(n, o, p, v):
        number: Any = sums[n, o, p, v].astype("float32") * factor[0, o, 0, v]
        if offset:
            number = number + offset[0][0, o, 0, v]
        return saturated(number, scheme, dtype)

    return te.compute(sums.shape, cell, name="requantize")


def saturated(number, scheme: tuple[int, int, int], dtype: str):
    """A float32 expression as a byte: rounded half to even, plus the zero point, within the bounds of `scheme`."""
    from tvm import tirx

    zero_point, least, largest = scheme
    whole: Any = rounding.rounded(number)
    if dtype == "int8":
        return narrowing.narrowed(whole, zero_point, least, largest)
    bounded: Any = tirx.min(tirx.max(whole + zero_point if zero_point else whole, least), largest)
    return bounded.astype(dtype)


def add_bytes(a, b, *, factors: tuple[float, float], offset: float, bounds: tuple[int, int], dtype: str):
    """Bytes of a * factors[0] + (b * factors[1] + offset), rounded half to even and saturated; b may broadcast.

    Two fused multiply-adds in this order, with both zero points and that of the result in the offset: as ONNX Runtime's
    QLinearAdd computes on x86.
    """
    from tvm import te, tirx

    first, second, rest = (tirx.const(float(np.float32(x)), "float32") for x in (*factors, offset))

    def cell(*i):
        left, right = (x[_within(x, i)].astype("float32") for x in (a, b))
        return saturated(left * first + (right * second + rest), (0, *bounds), dtype)

    return te.compute(_whole(a, b), cell, name="add_bytes")


def multiply_bytes(a, b, *, zero_points: tuple[int, int], factor: float, scheme: tuple[int, int, int], dtype: str):
    """Bytes of (a - zero_points[0]) * (b - zero_points[1]) * factor, rounded half to even, plus a zero point,
    saturated; b may broadcast."""
    from tvm import te, tirx

    times = tirx.const(float(np.float32(factor)), "float32")

    def cell(*i):
        left, right = (
            (x[_within(x, i)].astype("int32") - z).astype("float32") for x, z in zip((a, b), zero_points, strict=True)
        )
        return saturated(left * right * times, scheme, dtype)

    return te.compute(_whole(a, b), cell, name="multiply_bytes")


def _whole(a, b) -> tuple[int, ...]:
    shapes = [tuple(int(d) for d in x.shape) for x in (a, b)]
    return np.broadcast_shapes(*shapes)


def _within(tensor, indices):
    """Indices of the element that broadcasts to `indices`."""
    return tuple(0 if int(d) == 1 else i for d, i in zip(tensor.shape, indices, strict=True))


def less_zero_point(sums, weights, zero_point):
    """int32 sums (N, M / ocb, P, ocb) less `zero_point` (one element) times the weights' sums (1, M / ocb, 1, ocb)."""
    from tvm import te

    zero = (0,) * len(zero_point.shape)

    def cell(n, o, p, v):
        point: Any = zero_point[zero].astype("int32")
        return sums[n, o, p, v] - point * weights[0, o, 0, v]

    return te.compute(sums.shape, cell, name="less_zero_point")


def shift(data):
    """int8 -> uint8, 128 more; uint8 -> int8, 128 less."""
    from tvm import te

    more, dtype = (128, "uint8") if str(data.dtype) == "int8" else (-128, "int8")
    return te.compute(data.shape, lambda *i: (data[i].astype("int32") + more).astype(dtype), name="shift")


def pad_cells(data, filler, *, size: tuple[int, int], pads: tuple[int, int, int, int]):
    """Blocked activations in a frame of the one element of `filler`: (N, C / b, H * W, b) -> (N, C / b, H' * W', b)."""
    from tvm import te, tirx

    batch, blocks, _, lanes = (int(d) for d in data.shape)
    (height, width), (top, left, bottom, right) = size, pads
    high, wide = height + top + bottom, width + left + right

    def cell(n, c, p, v):
        y, x = p // wide - top, p % wide - left
        inside = tirx.all(y >= 0, y < height, x >= 0, x < width)
        return tirx.if_then_else(inside, data[n, c, y * width + x, v], filler[(0,) * len(filler.shape)])

    return te.compute((batch, blocks, high * wide, lanes), cell, name="pad_cells")


def pixels(data, *, scale: float, zero_point: int, pads: tuple[int, int, int, int], dtype: str):
    """A picture (N, C, H, W) of at most four channels as blocked bytes, (N, 1, H' * W', 4), in a frame of zeros.

    Absent channels are 0. `graphopt.pixels` tells its template H, W, pads (4) and the zero point.
    """
    from tvm import te, tirx

    batch, channels, height, width = (int(d) for d in data.shape)
    top, left, bottom, right = pads
    high, wide = height + top + bottom, width + left + right
    quantize = elementwise.quantize_of(scale, zero_point, dtype)

    def cell(n, c, p, v):
        y, x = p // wide - top, p % wide - left
        inside = tirx.all(y >= 0, y < height, x >= 0, x < width)
        source = data[
            n,
            tirx.min(v, channels - 1),
            tirx.max(tirx.min(y, height - 1), 0),
            tirx.max(tirx.min(x, width - 1), 0),
        ]
        level = tirx.if_then_else(inside, quantize(source), tirx.const(zero_point, dtype))
        return level if channels == QUAD else tirx.if_then_else(v < channels, level, tirx.const(0, dtype))

    described = {PIXELS: [height, width, *pads, zero_point], SCALE: float(np.float32(scale)).hex()}
    return te.compute((batch, 1, high * wide, QUAD), cell, name="pixels", attrs=described)


def pad_rows(data, *, depth: int):
    """(..., K) -> (..., depth), zeros behind."""
    from tvm import te, tirx

    lead, columns = tuple(data.shape)[:-1], int(data.shape[-1])

    def cell(*i):
        return tirx.if_then_else(
            i[-1] < columns, data[(*i[:-1], tirx.min(i[-1], columns - 1))], tirx.const(0, data.dtype)
        )

    return te.compute((*lead, depth), cell, name="pad_rows")


def block_rows(data, *, block: int):
    """(..., K) -> (1, ceil(K / block), M, block) with M the product of the leading extents; zeros where padded."""
    from tvm import te, tirx

    lead, depth = [int(d) for d in data.shape[:-1]], int(data.shape[-1])
    rows = math.prod(lead)

    def cell(_n, chunk, row, lane):
        at = chunk * block + lane
        place: list[Any] = []
        rest: Any = row
        for extent in reversed(lead):
            place.insert(0, rest % extent if len(place) < len(lead) - 1 else rest)
            rest = rest // extent
        value = data[(*place, tirx.min(at, depth - 1) if depth % block else at)]
        return tirx.if_then_else(at < depth, value, tirx.const(0, data.dtype)) if depth % block else value

    return te.compute((1, -(-depth // block), rows, block), cell, name="block_rows")


def unblock_rows(data, *, shape: tuple[int, ...]):
    """Products of rows, (1, N / block, M, block), as `shape` (..., N) with M the product of the leading extents."""
    from tvm import te

    block = int(data.shape[3])

    def cell(*i):
        row: Any = 0
        for index, extent in zip(i[:-1], shape[:-1], strict=True):
            row = row * extent + index
        return data[0, i[-1] // block, row, i[-1] % block]

    return te.compute(shape, cell, name="unblock_rows")


def pack_weight(kernel: np.ndarray, lanes_in: int, lanes_out: int) -> np.ndarray:
    """(M, C / groups, kH, kW) int8 -> (M / ocb, C / groups / icb, kH, kW, icb / 4, ocb * 4), zeros where padded."""
    out_channels, channels, k_h, k_w = kernel.shape
    rows, columns = -(-out_channels // lanes_out), -(-channels // lanes_in)
    padded = np.zeros((rows * lanes_out, columns * lanes_in, k_h, k_w), np.int8)
    padded[:out_channels, :channels] = kernel
    split = padded.reshape(rows, lanes_out, columns, lanes_in // QUAD, QUAD, k_h, k_w).transpose(0, 2, 5, 6, 3, 1, 4)
    return np.ascontiguousarray(split).reshape(rows, columns, k_h, k_w, lanes_in // QUAD, lanes_out * QUAD)


def fits_pairs(weight: np.ndarray, byte_type: str) -> bool:
    """Whether packed weights (..., 4 * n) times bytes add up within 16 bits: those of neighbours for unsigned bytes,
    those that are a pair apart for signed ones. These are the sums that processors make."""
    quads = weight.reshape(-1, 2, 2).astype(np.int32)
    if byte_type == "int8":
        return int(quads.sum(axis=1).min(initial=0)) > -256
    largest = np.maximum(quads, 0).sum(axis=2).max(initial=0)
    least = np.minimum(quads, 0).sum(axis=2).min(initial=0)
    return 255 * int(largest) <= 32767 and 255 * int(least) >= -32768


def _wide(x):
    return x.astype("int32")
