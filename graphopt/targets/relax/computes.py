"""Tensor expressions of the kernels graphopt schedules itself.

Activations of images are kept in *blocked* form: (N, C / block, H * W, block), channels padded with finite filler up
to a multiple of `block`. The block is one vector register, so every kernel vectorises over it; H and W stay one axis,
so a register tile of a 1x1 convolution may cross rows and an elementwise epilogue tiles exactly like its producer.

Operands may be float32, bfloat16 or float16 (see `bfloat16`); sums, and so results, are float32.

Block names are what schedule templates match on: `conv2d`, `depthwise`, `window_max`, `window_sum`, `packed_matmul`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.targets.relax.bfloat16 import DTYPE, NARROW, widen

ROW = "graphopt.row"
"""Block annotation: how many positions in a row read neighbouring positions of the input."""
WINDOW = "graphopt.window"
"""Block annotation of `conv2d`, `depthwise`, `window_max`, `window_sum`: H, W, oH, oW, strides (2), pads (top, left),
dilations (2), groups (blocks of channels where these do not mix)."""
PARTS = "graphopt.parts"
"""Block annotation of `concat_lanes`: the channels of each part."""
BYTES = ("uint8", "int8")
"""Element types of quantized activations."""
COLUMNS = "graphopt.columns"
"""Block annotation: columns of the packed weight's block."""


def conv2d(
    data,
    weight,
    *,
    size: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    groups: int,
    out_size: tuple[int, int],
):
    """2-D convolution on blocked activations.

    data: (N, C / icb, H * W, icb); weight: (M / ocb, C / groups / icb, kH, kW, icb, ocb) ->
    (N, M / ocb, oH * oW, ocb). `pads` is (top, left, bottom, right). With `icb` 1, data is a plain NCHW tensor.
    """
    from tvm import te

    batch, _, _, _ = _dims(data)
    out_blocks, in_blocks, k_h, k_w, lanes_in, lanes = _dims(weight)
    kernel = (k_h, k_w)
    out_h, out_w = out_size
    frame = padded(data, size, pads, 0.0)
    per_group = out_blocks // groups
    ico = te.reduce_axis((0, in_blocks), "ico")
    ici = te.reduce_axis((0, lanes_in), "ici")
    kh = te.reduce_axis((0, k_h), "kh")
    kw = te.reduce_axis((0, k_w), "kw")

    def cell(n, o, p, v):
        block = ico if groups == 1 else (o // per_group) * in_blocks + ico
        y, x = position(p, out_w, strides, dilations, kh, kw)
        return te.sum(
            widen(frame(n, block, y, x, ici)) * widen(weight[o, ico, kh, kw, ici, v]), axis=[ico, kh, ici, kw]
        )

    dense = kernel == (1, 1) and strides == (1, 1) and not any(pads)
    return te.compute(
        (batch, out_blocks, out_h * out_w, lanes),
        cell,
        name="conv2d",
        attrs={
            ROW: out_h * out_w if dense else out_w,
            WINDOW: [*size, *out_size, *strides, *pads[:2], *dilations, groups],
        },
    )


def depthwise(
    data,
    weight,
    *,
    size: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    out_size: tuple[int, int],
    zero_point: int = 0,
):
    """Depthwise convolution (one filter a channel): data (N, C / b, H * W, b), weight (C / b, kH, kW, b).

    Bytes are multiplied as float32 after their zero point is taken away: exact, as long as a window has no more than
    500 positions.
    """
    from tvm import te

    batch, blocks, _, lanes = _dims(data)
    _, k_h, k_w, _ = _dims(weight)
    frame = padded(data, size, pads, zero_point)
    kh = te.reduce_axis((0, k_h), "kh")
    kw = te.reduce_axis((0, k_w), "kw")

    def cell(n, c, p, v):
        y, x = position(p, out_size[1], strides, dilations, kh, kw)
        return te.sum(number(frame(n, c, y, x, v), zero_point) * weight[c, kh, kw, v], axis=[kh, kw])

    shape = (batch, blocks, out_size[0] * out_size[1], lanes)
    described = [*size, *out_size, *strides, *pads[:2], *dilations, blocks]
    return te.compute(shape, cell, name="depthwise", attrs={ROW: out_size[1], WINDOW: described})


def pool2d(
    data,
    *,
    kind: str,
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    out_size: tuple[int, int],
    count_include_pad: bool = False,
    zero_point: int = 0,
):
    """Max or average pooling on blocked activations; `pads` already covers ceil mode's extra columns.

    The average of bytes is that of their differences from `zero_point`; sums of up to 65 000 are exact.
    """
    from tvm import te, tirx

    batch, blocks, _, lanes = _dims(data)
    kh = te.reduce_axis((0, kernel[0]), "kh")
    kw = te.reduce_axis((0, kernel[1]), "kw")
    out_shape = (batch, blocks, out_size[0] * out_size[1], lanes)
    described = {ROW: out_size[1], WINDOW: [*size, *out_size, *strides, *pads[:2], *dilations, blocks]}
    if kind == "max":
        lowest = _lowest(str(data.dtype))
        frame = padded(data, size, pads, lowest)

        def largest(n, c, p, v):
            y, x = position(p, out_size[1], strides, dilations, kh, kw)
            return te.max(_computed(frame(n, c, y, x, v), str(data.dtype)), axis=[kh, kw])

        return te.compute(out_shape, largest, name="window_max", attrs=described)
    frame = padded(data, size, pads, zero_point)

    def total(n, c, p, v):
        y, x = position(p, out_size[1], strides, dilations, kh, kw)
        return te.sum(number(frame(n, c, y, x, v), zero_point), axis=[kh, kw])

    sums: Any = te.compute(out_shape, total, name="window_sum", attrs=described)
    area = kernel[0] * kernel[1]

    def inside(p, axis) -> Any:
        start = (p // out_size[1] if axis == 0 else p % out_size[1]) * strides[axis] - pads[axis]
        end: Any = tirx.min(start + kernel[axis], size[axis])
        begin: Any = tirx.max(start, 0)
        return tirx.max(end - begin, 1)

    if count_include_pad or not any(pads):
        return te.compute(out_shape, lambda n, c, p, v: sums[n, c, p, v] * np.float32(1 / area), name="average")
    return te.compute(
        out_shape,
        lambda n, c, p, v: sums[n, c, p, v] * (np.float32(1) / (inside(p, 0) * inside(p, 1)).astype("float32")),
        name="average",
    )


def spatial_sum(data, *, mean: bool, zero_point: int = 0):
    """Sum or mean over H * W of blocked activations, or of bytes less `zero_point` -> (N, C / b, 1, b)."""
    from tvm import te

    batch, blocks, area, lanes = _dims(data)
    p = te.reduce_axis((0, area), "p")
    total: Any = te.compute(
        (batch, blocks, 1, lanes),
        lambda n, c, one, v: te.sum(number(data[n, c, p, v], zero_point), axis=p),
        name="spatial_sum",
    )
    if not mean:
        return total
    return te.compute(
        (batch, blocks, 1, lanes), lambda n, c, one, v: total[n, c, one, v] * np.float32(1 / area), name="average"
    )


def spatial_max(data):
    """Maximum over H * W of blocked activations -> (N, C / b, 1, b)."""
    from tvm import te

    batch, blocks, area, lanes = _dims(data)
    p = te.reduce_axis((0, area), "p")
    return te.compute(
        (batch, blocks, 1, lanes),
        lambda n, c, one, v: te.max(_computed(data[n, c, p, v], str(data.dtype)), axis=p),
        name="spatial_max",
    )


def matmul(data, weight, *, columns: int):
    """data (..., M, K) times a constant packed as (N / nb, K, nb) -> (..., M, N); `columns` is N before padding."""
    from tvm import te

    tiles, depth, block = _dims(weight)
    k = te.reduce_axis((0, depth), "k")
    lead = _dims(data)[:-1]
    product: Any = te.compute(
        (*lead, tiles * block),
        lambda *i: te.sum(widen(data[(*i[:-1], k)]) * widen(weight[i[-1] // block, k, i[-1] % block]), axis=k),
        name="packed_matmul",
        attrs={COLUMNS: block},
    )
    if tiles * block == columns:
        return product
    return te.compute((*lead, columns), lambda *i: product[i], name="packed_crop")


def block_channels(data, *, block: int):
    """(N, C, H, W) -> (N, ceil(C / block), H * W, block), zeros where there is no channel."""
    from tvm import te, tirx

    batch, channels, _, width = _dims(data)
    area = _dims(data)[2] * width

    def cell(n, o, p, v):
        value = data[n, o * block + v, p // width, p % width]
        if channels % block == 0:
            return value
        return tirx.if_then_else(o * block + v < channels, value, tirx.const(0, data.dtype))

    return te.compute((batch, -(-channels // block), area, block), cell, name="block_channels")


def unblock_channels(data, *, channels: int, size: tuple[int, int]):
    """(N, C / block, H * W, block) -> (N, C, H, W), dropping padded channels."""
    from tvm import te

    batch, _, _, block = _dims(data)
    return te.compute(
        (batch, channels, *size),
        lambda n, c, y, x: data[n, c // block, y * size[1] + x, c % block],
        name="unblock_channels",
    )


def concat_lanes(*parts, channels: Sequence[int], block: int):
    """Blocked activations (N, C_i / b_i, H * W, b_i) one behind the other -> (N, sum(C_i) / block, H * W, block)."""
    from tvm import te, tirx

    batch, _, area, _ = _dims(parts[0])
    ends = [sum(channels[: i + 1]) for i in range(len(channels))]

    def cell(n, o, p, v):
        channel = o * block + v
        value: Any = tirx.const(0, parts[0].dtype)
        for part, count, end in reversed(list(zip(parts, channels, ends, strict=True))):
            lanes, local = _dims(part)[3], channel - (end - count)
            value = tirx.if_then_else(channel < end, part[n, local // lanes, p, local % lanes], value)
        return value

    shape = (batch, -(-ends[-1] // block), area, block)
    return te.compute(shape, cell, name="concat_lanes", attrs={PARTS: list(channels)})


def dilate(data, *, size: tuple[int, int], strides: tuple[int, int]):
    """Blocked activations with `strides - 1` zeros between neighbours: what a transposed convolution with a dilated
    kernel reads."""
    from tvm import te, tirx

    batch, blocks, _, lanes = _dims(data)
    (height, width), (s_h, s_w) = size, strides
    wide, high = (width - 1) * s_w + 1, (height - 1) * s_h + 1
    zero = tirx.const(0, data.dtype)

    def cell(n, c, p, v):
        y, x = p // wide, p % wide
        there = tirx.all(y % s_h == 0, x % s_w == 0)
        return tirx.if_then_else(there, data[n, c, (y // s_h) * width + x // s_w, v], zero)

    return te.compute((batch, blocks, high * wide, lanes), cell, name="dilate")


def interleave(*parts, size: tuple[int, int], strides: tuple[int, int]):
    """Blocked activations whose cell (y, x) is that of part (y % s_h, x % s_w): the phases of a transposed convolution.

    Part (p, q), the (p * s_w + q)-th, holds the rows y and columns x of `size` with y % s_h == p and x % s_w == q.
    """
    from tvm import te, tirx

    batch, blocks, _, lanes = _dims(parts[0])
    (height, width), (s_h, s_w) = size, strides

    def cell(n, c, p, v):
        y, x = p // width, p % width
        found = None
        for i, part in reversed(list(enumerate(parts))):
            row, column = i // s_w, i % s_w
            here = part[n, c, (y // s_h) * len(range(column, width, s_w)) + x // s_w, v]
            there = tirx.all(y % s_h == row, x % s_w == column)
            found = here if found is None else tirx.if_then_else(there, here, found)
        return found

    return te.compute((batch, blocks, height * width, lanes), cell, name="interleave")


def gather_cells(data, rows, columns, *, width: int):
    """Blocked activations (N, C / b, H * W, b) at `rows` x `columns` (int32 vectors) of pictures `width` wide."""
    from tvm import te

    batch, blocks, _, lanes = _dims(data)
    (high,), (wide,) = _dims(rows), _dims(columns)

    def cell(n, c, p, v):
        return data[n, c, rows[p // wide] * width + columns[p % wide], v]

    return te.compute((batch, blocks, high * wide, lanes), cell, name="gather_cells")


def blend_cells(data, tops, bottoms, down, lefts, rights, along, *, width: int):
    """Bilinear interpolation of blocked activations between rows `tops` and `bottoms`, columns `lefts` and `rights`
    (int32 vectors); `down` and `along` (float32) say how far towards the second of each."""
    from tvm import te

    batch, blocks, _, lanes = _dims(data)
    (high,), (wide,) = _dims(tops), _dims(lefts)

    def cell(n, c, p, v):
        y, x = p // wide, p % wide
        near, far = (
            _computed(data[n, c, row * width + lefts[x], v], data.dtype) * (1.0 - along[x])
            + _computed(data[n, c, row * width + rights[x], v], data.dtype) * along[x]
            for row in (tops[y], bottoms[y])
        )
        return near * (1.0 - down[y]) + far * down[y]

    return te.compute((batch, blocks, high * wide, lanes), cell, name="blend_cells")


def number(x, zero_point: int = 0):
    """An element in float32: 16-bit floats widened, a byte less its zero point."""
    if str(x.dtype) not in BYTES:
        return widen(x)
    whole: Any = x.astype("int32")
    return (whole - zero_point if zero_point else whole).astype("float32")


def _computed(x, dtype: str):
    """An element as it is computed with: 16-bit floats in float32, integers as they are."""
    return widen(x) if dtype in NARROW else x


def _lowest(dtype: str) -> float:
    """The least finite number of a type."""
    if dtype == DTYPE:
        return -3.3895313892515355e38
    return float(np.finfo(dtype).min) if "float" in dtype else float(np.iinfo(dtype).min)


def _dims(tensor) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape)


def padded(data, size: tuple[int, int], pads: Sequence[int], filler: float):
    """A reader `(n, block, y, x, lane)` of the padded picture; no copy where there is nothing to pad."""
    from tvm import te, tirx

    height, width = size
    top, left, bottom, right = pads
    if not any(pads):
        return lambda n, c, y, x, v: data[n, c, y * width + x, v]
    batch, blocks, _, lanes = _dims(data)

    def cell(n, c, y, x, v):
        inside = tirx.all(y >= top, y < height + top, x >= left, x < width + left)
        return tirx.if_then_else(inside, data[n, c, (y - top) * width + x - left, v], tirx.const(filler, data.dtype))

    framed: Any = te.compute((batch, blocks, height + top + bottom, width + left + right, lanes), cell, name="pad")
    return lambda n, c, y, x, v: framed[n, c, y, x, v]


def position(p, out_w: int, strides, dilations, kh, kw):
    """Row and column of the padded picture that output `p` reads at tap (kh, kw)."""
    return p // out_w * strides[0] + kh * dilations[0], p % out_w * strides[1] + kw * dilations[1]
