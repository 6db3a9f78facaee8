"""DeformConv: each tap of each output reads its own place of the input, between four elements; then a product.

    column[n, c, k, y]  = mask * bilinear(X[n, c], y * stride - pad + k * dilation + offset), zero outside of X
    Y[n, m, y]          = sum over c, k of W[m, c, k] column[n, c, k, y] + B[m]

Two spatial axes, float32 or float64.

Source: Dai et al., "Deformable Convolutional Networks" (2017); with a mask, Zhu et al. (2019).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import OPAQUE, Builder, Value


@emits("DeformConv")
def deform_conv(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, weight, offset, bias, mask = [*inputs, None, None][:5]
    if data is None or weight is None or offset is None or data.dtype not in ("float32", "float64"):
        return None
    if data.shape is None or weight.shape is None or offset.shape is None or len(data.shape) != 4:
        return None
    batch = data.shape[0]
    outs, each, *kernel = weight.shape
    groups, own = int(node.get("group", 1)), int(node.get("offset_group", 1))
    out = offset.shape[2:]
    taps, places = kernel[0] * kernel[1], out[0] * out[1]
    offsets = builder.reshape(builder.plain(offset), (batch, own, taps, 2, *out))
    operands = [builder.plain(data), offsets]
    if mask is not None:
        operands.append(builder.reshape(builder.plain(mask), (batch, own, taps, *out)))
    columns = builder.call(
        _sampled,
        *operands,
        width=kernel[1],
        strides=node.get("strides", (1, 1)),
        dilations=node.get("dilations", (1, 1)),
        before=node.get("pads", (0, 0, 0, 0))[:2],
        pattern=OPAQUE,
        name="deform_columns",
    )
    columns = builder.reshape(columns, (batch, groups, each * taps, places))
    matrix = builder.reshape(builder.plain(weight), (1, groups, outs // groups, each * taps))
    done = builder.reshape(builder.emit(relax.op.matmul(matrix, columns)), (batch, outs, *out))
    if bias is not None:
        done = builder.emit(relax.op.add(done, builder.reshape(builder.plain(bias), (1, outs, 1, 1))))
    return [Value((batch, outs, *out), data.dtype, plain=done)]


def _sampled(data: Any, offsets: Any, mask: Any = None, *, width: int, strides, dilations, before) -> Any:
    """(N, C, taps, oH, oW)."""
    from tvm import te, tirx

    batch, channels, *size = (int(n) for n in data.shape)
    dtype, own = str(data.dtype), int(offsets.shape[1])
    taps, out = int(offsets.shape[2]), [int(n) for n in offsets.shape[4:]]

    def element(n: Any, c: Any, k: Any, *y: Any) -> Any:
        group = tirx.floordiv(c, channels // own)
        tap = (tirx.floordiv(k, width), tirx.floormod(k, width))
        cells, parts = [], []
        for a in range(2):
            fixed = y[a] * strides[a] - before[a] + tap[a] * dilations[a]
            place: Any = fixed.astype(dtype) + offsets(n, group, k, a, *y)
            # Beyond the neighbours of the picture everything is zero: no place is too far for an integer.
            near: Any = tirx.max(tirx.min(place, tirx.const(size[a] + 1, dtype)), tirx.const(-2, dtype))
            low: Any = tirx.floor(near)
            cells.append(low.astype("int32"))
            parts.append(near - low)
        total = tirx.const(0, dtype)
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            at = [cells[a] + corner[a] for a in range(2)]
            inside = tirx.all(at[0] >= 0, at[0] < size[0], at[1] >= 0, at[1] < size[1])
            share = [parts[a] if corner[a] else tirx.const(1, dtype) - parts[a] for a in range(2)]
            total = total + tirx.if_then_else(inside, data(n, c, *at), tirx.const(0, dtype)) * share[0] * share[1]
        return total if mask is None else total * mask(n, group, k, *y)

    return te.compute((batch, channels, taps, *out), element, name="deform_columns")
