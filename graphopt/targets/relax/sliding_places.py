"""Windows that remember or restore places: MaxPool with its Indices, MaxUnpool, Col2Im.

Any number of spatial axes. An index of MaxPool counts elements of the whole input: row by row, or with storage_order=1
column by column within a picture; of equal elements the first in the window wins. MaxUnpool puts elements where their
indices say, the rest is zeros; an index counts elements of the shape that was pooled, and a larger output_shape has
more zeros behind it. Col2Im adds the elements of columns (N, C * prod(block), L) where their windows overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.targets.relax import index_bounds
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import OPAQUE, Builder, Value, known


def max_pool_with_places(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """Both outputs of MaxPool."""
    data = inputs[0]
    if data is None or data.shape is None or len(data.shape) < 3:
        return None
    size, kernel = data.shape[2:], tuple(node.get("kernel_shape", ()))
    ones = (1,) * len(size)
    strides, dilations = tuple(node.get("strides", ones)), tuple(node.get("dilations", ones))
    pads = _pads(node, size, kernel, strides, dilations)
    out = []
    for axis, n in enumerate(size):
        span = n + pads[axis] + pads[axis + len(size)] - (kernel[axis] - 1) * dilations[axis] - 1
        steps = -(-span // strides[axis]) if node.get("ceil_mode", 0) else span // strides[axis]
        if node.get("ceil_mode", 0) and steps * strides[axis] >= n + pads[axis]:
            steps -= 1  # a window that starts in the far padding is not counted
        out.append(steps + 1)
    made = builder.call(
        _largest,
        builder.plain(data),
        out=out,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        before=pads[: len(size)],
        by_column=bool(node.get("storage_order", 0)),
        pattern=OPAQUE,
        name="max_pool_places",
    )
    from tvm import relax

    shape = (*data.shape[:2], *out)
    values, places = (builder.emit(relax.TupleGetItem(made, i)) for i in range(2))
    return [Value(shape, data.dtype, plain=values), Value(shape, "int64", plain=places)]


def _pads(node: Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]):
    mode = node.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if not mode.startswith("SAME"):
        return tuple(node.get("pads", (0,) * 2 * len(size))) if mode != "VALID" else (0,) * 2 * len(size)
    before, after = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        before.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        after.append(total - before[-1])
    return (*before, *after)


def _largest(data: Any, *, out, kernel, strides, dilations, before, by_column: bool) -> Any:
    from tvm import te, tirx

    size = [int(n) for n in data.shape[2:]]
    channels, dtype = int(data.shape[1]), str(data.dtype)
    least: Any = tirx.min_value(dtype) if "int" in dtype else tirx.const(-np.inf, dtype)
    weights = [math.prod(size[i + 1 :]) for i in range(len(size))]
    if by_column:
        weights = [math.prod(size[:i]) for i in range(len(size))]

    def larger(a: Any, b: Any) -> Any:
        first = tirx.any(a[0] > b[0], tirx.all(a[0] == b[0], a[2] <= b[2]))
        return tuple(tirx.Select(first, x, y) for x, y in zip(a, b, strict=True))

    none = np.iinfo(np.int64).max
    choose = te.comm_reducer(larger, lambda v, p, o: (least, tirx.const(none, p), tirx.const(none, o)), name="largest")
    steps: list[Any] = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]

    def element(n: Any, c: Any, *where: Any) -> Any:
        places = [w * s - b + k * d for w, s, b, k, d in zip(where, strides, before, steps, dilations, strict=True)]
        inside = [tirx.all(p >= 0, p < extent) for p, extent in zip(places, size, strict=True)]
        there = inside[0] if len(inside) == 1 else tirx.all(*inside)
        value = tirx.if_then_else(there, data(n, c, *places), least)
        picture = (n.astype("int64") * channels + c) * math.prod(size)
        index: Any = sum((p.astype("int64") * w for p, w in zip(places, weights, strict=True)), picture)
        turns: Any = (k.astype("int64") * math.prod(kernel[i + 1 :]) for i, k in enumerate(steps))
        order: Any = sum(turns, tirx.const(0, "int64"))
        far: Any = tirx.const(none, "int64")
        return choose((value, tirx.Select(there, index, far), tirx.Select(there, order, far)), axis=steps)

    found = te.compute((*data.shape[:2], *out), element, name="largest")
    return [found[0], found[1]]


@emits("MaxUnpool")
def max_unpool(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, places, wanted = [*inputs, None][:3]
    if data is None or data.shape is None or places is None or (wanted is not None and wanted.const is None):
        return None
    size, kernel = data.shape[2:], node.get("kernel_shape", ())
    strides, pads = node.get("strides", (1,) * len(size)), node.get("pads", (0,) * 2 * len(size))
    out = [(n - 1) * strides[i] + kernel[i] - pads[i] - pads[i + len(size)] for i, n in enumerate(size)]
    shape = (*data.shape[:2], *out)
    count = math.prod(data.shape)
    whole: Any = (math.prod(shape),)
    flat = builder.reshape(builder.plain(places), (count,))
    inside = index_bounds.clipped(builder, flat, np.asarray(whole[0]), "int64")
    zeros = builder.emit(relax.op.zeros(whole, data.dtype))
    values = builder.reshape(builder.plain(data), (count,))
    done = builder.reshape(builder.emit(relax.op.scatter_elements(zeros, inside, values, axis=0)), shape)
    if wanted is None or wanted.const is None:
        return [Value(shape, data.dtype, plain=done)]
    larger = tuple(int(n) for n in wanted.const.reshape(-1))
    if len(larger) != len(shape) or any(n < m for n, m in zip(larger, shape, strict=True)):
        raise ValueError(f"error: output_shape {list(larger)} is smaller than what was pooled")
    behind = [n for a, b in zip(larger, shape, strict=True) for n in (0, a - b)]
    return [Value(larger, data.dtype, plain=builder.emit(relax.op.nn.pad(done, behind, pad_value=0.0)))]


@emits("Col2Im")
def col2im(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, image, block = inputs[0], known(inputs[1]), known(inputs[2])
    if data is None or data.shape is None or image is None or block is None:
        return None
    size, kernel = [int(n) for n in image], [int(n) for n in block]
    ones = (1,) * len(size)
    strides, dilations = node.get("strides", ones), node.get("dilations", ones)
    pads = node.get("pads", (0,) * 2 * len(size))
    counts = [
        (n + pads[i] + pads[i + len(size)] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i, n in enumerate(size)
    ]
    channels = data.shape[1] // math.prod(kernel)
    columns = builder.reshape(builder.plain(data), (data.shape[0], channels, *kernel, *counts))
    made = builder.call(
        _overlapped,
        columns,
        size=size,
        strides=strides,
        dilations=dilations,
        before=pads[: len(size)],
        pattern=OPAQUE,
        name="col2im",
    )
    return [Value((data.shape[0], channels, *size), data.dtype, plain=made)]


def _overlapped(columns: Any, *, size, strides, dilations, before) -> Any:
    """For each place the sum over the taps k of the windows l with l * stride - before + k * dilation there."""
    from tvm import te, tirx

    rank = len(size)
    kernel, counts = ([int(n) for n in columns.shape[i : i + rank]] for i in (2, 2 + rank))
    taps = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]

    def element(n: Any, c: Any, *where: Any) -> Any:
        windows, fits = [], []
        for i, place in enumerate(where):
            shifted = place + before[i] - taps[i] * dilations[i]
            window = tirx.floordiv(shifted, strides[i])
            windows.append(window)
            fits += [tirx.floormod(shifted, strides[i]) == 0, window >= 0, window < counts[i]]
        zero = tirx.const(0, str(columns.dtype))
        return te.sum(tirx.if_then_else(tirx.all(*fits), columns(n, c, *taps, *windows), zero), axis=taps)

    return te.compute((*columns.shape[:2], *size), element, name="col2im")
