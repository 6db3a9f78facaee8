"""Winograd convolution: dense, 3x3, unit stride and dilation, on blocked activations, with fewer multiplications.

Idea: a tile of 4x4 outputs takes 36 products instead of 144, one of 2x2 takes 16 instead of 36. Squares of the input
are transformed, multiplied with transformed weights (36 or 16 independent matrix products over tiles and channels), and
transformed back. The weight is stored transformed, 4 or 1.8 times its size: where there are few tiles, reading it
takes longer than the arithmetic, and the smaller tile, or direct convolution, wins. Measurement decides.

Loop order: chunk of tiles (parallel) / three stages: in-block, tile, transform of the data / point, panel of `vectors`
output blocks, `rows` tiles, channels / out-block, tile, transform of the result with the epilogue. With one chunk,
which reads the weight exactly once, the outer loops of the stages are parallel instead. `order` "outs" has the panel
outermost: less is kept between the last two stages, and the data is read again for each panel.

Register budget: rows * vectors accumulators + rows broadcast scalars + vectors weights <= registers; with one vector
and AVX-512 the scalars are operands in memory. Transforms keep a square of (tile + 2)^2 and spill a little.

In float16 (`half`) sums over many channels are cut into runs, as a direct sum's are.

Numerics: the transforms cancel digits. Against float64, the root mean square error of float32 is at most `error_factor`
times that of a direct sum; see `winograd_transforms` for the points that keep it small.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.winograd_loops import Epilogue, Nest, Shape, applies
from graphopt.targets.schedules.winograd_transforms import TAPS, transformed_weight
from graphopt.targets.schedules.workload import (
    Decision,
    Kernel,
    Workload,
    extents,
    inline_epilogue,
    new_schedule,
    nodes,
    unique,
)

NAME = "winograd"
VERSION = 1
SIDES = (4, 2)
CHUNK_BYTES = (1 << 19, 1 << 20)
"""Transformed data and products of a chunk: shares of a second-level cache."""
L1_BYTES = 32 << 10
L2_BYTES = 3 << 19
L2_BYTES_PER_CYCLE = 28
MEMORY_BYTES_PER_CYCLE = 8
LOADS_PER_CYCLE = 1.8
TILE_CYCLES = 30
"""Starting and draining the pipeline of a register tile."""
TRANSFORM_CYCLES = {4: 110, 2: 40}
"""Of one tile and one block of channels, either way."""
TRANSFORM_INSTRUCTIONS = {4: 300, 2: 90}
"""The same, counted."""
MOST_DECISIONS = 8
ARITHMETIC = 0.3
"""Of the direct method's time, at its peak, what the best case takes: 36 products instead of 144, and transforms."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {tile, chunk, rows, vectors, order, prefetch}, by predicted cycles."""
    machine = workload.machine
    if not machine.allows(NAME) or not machine.features & {"fma", "asimd"}:
        return None
    shape = _shape(workload)
    if shape is None or _epilogue(workload) is None:
        return None
    found: list[tuple[float, Decision]] = []
    elements = machine.lanes if applies(shape, machine) else 0
    for side in SIDES:
        high, wide = shape.tiles(side)
        tiles = shape.batch * high * wide
        for chunk in _chunks(shape, side, tiles, machine.threads):
            for vectors in (v for v in ((1, 2, 3, 4) if elements else (1, 2, 4)) if shape.out_blocks % v == 0):
                rows = _rows(chunk, vectors, machine, elements)
                for order in ("points", "outs"):
                    cost = _cycles(shape, side, tiles, chunk, rows, vectors, order, elements)
                    decision = {"tile": side, "chunk": chunk, "rows": rows, "vectors": vectors, "order": order}
                    found.append((cost, {**decision, "prefetch": int(chunk == tiles)}))
    found.sort(key=lambda pair: pair[0])
    ranked = unique(decision for _, decision in found)
    first = [next(d for d in ranked if d["tile"] == side) for side in SIDES]
    first.sort(key=ranked.index)
    return unique([*first, *ranked])[:MOST_DECISIONS]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Code for a function whose anchor block is `conv2d`; the weight is wanted transformed, as a flat array."""
    from tvm import tirx

    shape, epilogue, operands = _shape(workload), _epilogue(workload), _operands(workload)
    assert shape is not None and epilogue is not None and operands is not None
    data, weight = operands
    params = list(workload.func.params)
    nest = Nest(shape, decision, epilogue, params[data], workload.machine, workload.number)
    body = nest.body()
    params[weight] = nest.weight
    func = tirx.PrimFunc(params, body).with_attr("tirx.noalias", True).with_attr("global_symbol", "main")
    layout = {key: decision[key] for key in ("tile", "vectors", "order")}
    return Kernel(func, {weight: partial(packed_weight, **layout)})


def predicted_cycles(workload: Workload, decision: Decision) -> float:
    """Of one image, on one core: comparable with the other templates' predictions."""
    shape = _shape(workload)
    assert shape is not None
    side = decision["tile"]
    high, wide = shape.tiles(side)
    tiles = shape.batch * high * wide
    elements = workload.machine.lanes if applies(shape, workload.machine) else 0
    chunk, rows, vectors, order = (decision[key] for key in ("chunk", "rows", "vectors", "order"))
    return _cycles(shape, side, tiles, chunk, rows, vectors, order, elements) / shape.batch


def packed_weight(weight: np.ndarray, tile: int, vectors: int, order: str) -> np.ndarray:
    """(O, I, 3, 3, icb, ocb) -> flat [point][group][input channel][vector][lane]; "outs": [group][point]..."""
    out_blocks, in_blocks, _, _, icb, ocb = weight.shape
    grouped = (
        transformed_weight(weight, tile)
        .astype(weight.dtype)
        .reshape(-1, out_blocks // vectors, vectors, in_blocks, icb, ocb)
    )
    axes = (0, 1, 3, 4, 2, 5) if order == "points" else (1, 0, 3, 4, 2, 5)
    return np.ascontiguousarray(grouped.transpose(axes)).reshape(-1)


def error_factor(decision: Decision) -> float:
    """How many times the root mean square error of a direct float32 sum this decision's may be."""
    return ERROR_FACTOR[decision["tile"]]


ERROR_FACTOR = {4: 4.0, 2: 1.5}
"""By tile. Measured on normal data, 16 to 256 channels: 1.8 to 2.1, and 0.6 to 0.7 (fewer products to add)."""


def _shape(workload: Workload) -> Shape | None:
    """The convolution's shape, or None where it is none of this template's."""
    block = workload.anchor("conv2d")
    if block is None or _operands(workload) is None:
        return None
    batch, out_blocks, _, ocb, in_blocks, k_h, icb, k_w = extents(block)
    height, width, out_h, out_w, *window = (int(n) for n in block.annotations[WINDOW])
    strides, (top, left), dilations, groups = window[:2], window[2:4], window[4:6], window[6]
    plain = (k_h, k_w) == (TAPS, TAPS) and strides == [1, 1] and dilations == [1, 1] and groups == 1
    if (
        not plain
        or icb < 4
        or ocb < 4
        or any(str(r.source.ty.dtype) != workload.number for r in (*block.reads, *block.writes))
    ):
        return None
    return Shape(batch, in_blocks, out_blocks, icb, ocb, (height, width), (out_h, out_w), (top, left))


def _operands(workload: Workload) -> tuple[int, int] | None:
    """Indices of the data and the weight among the parameters; None where another block than padding comes first."""
    names = list(workload.blocks)
    before = names[: names.index("conv2d")]
    if before not in ([], ["pad"]):
        return None
    weight = next(r.source for r in workload.blocks["conv2d"].reads if len(r.source.ty.shape) == 6)
    data = next(r.source for r in workload.blocks[names[0]].reads if len(r.source.ty.shape) == 4)
    params = list(workload.func.params)
    places = [i for source in (data, weight) for i, p in enumerate(params) if p.same_as(source)]
    return (places[0], places[1]) if len(places) == 2 else None


def _epilogue(workload: Workload) -> Epilogue | None:
    """What follows the convolution, where each of its elements depends on the same element of the convolution only."""
    from tvm import tirx
    from tvm.ir.expr import TensorLoad

    conv = workload.blocks["conv2d"]
    source = conv.writes[0].source
    if list(workload.blocks)[-1] == "conv2d":
        axes = [v.var for v in conv.iter_vars][:4]
        return Epilogue(axes, tirx.BufferLoad(source, axes), source, axes, source)
    schedule = new_schedule(workload.func)
    last = schedule.get(inline_epilogue(schedule, "conv2d"))
    axes = [v.var for v in last.iter_vars]
    if last.init is not None or extents(last) != extents(conv)[:4]:
        return None
    for load in nodes(last.body.value, TensorLoad):
        if load.source.same_as(source) and not all(i.same_as(a) for i, a in zip(load.indices, axes, strict=True)):
            return None
    return Epilogue(axes, last.body.value, source, list(last.body.indices), last.body.buffer)


def _chunks(shape: Shape, side: int, tiles: int, threads: int) -> list[int]:
    """Tiles of a chunk: all, or as many as a share of the cache holds, a number of chunks that the threads divide."""
    tile_bytes = 4 * (side + 2) ** 2 * (shape.in_blocks * shape.icb + shape.out_blocks * shape.ocb)
    found = [tiles]
    for budget in CHUNK_BYTES:
        number = -(-tiles * tile_bytes // budget)
        number = min(-(-number // threads) * threads, tiles)
        if number > 1:
            found.append(-(-tiles // number))
    return found


def _rows(chunk: int, vectors: int, machine: Any, elements: int) -> int:
    """Rows of the register tile that take the fewest cycles for a chunk, within the register budget."""
    budget = machine.registers
    folded = vectors == 1 and machine.lanes == 16
    most = budget - 4 if folded else max((budget - vectors) // (vectors + 1), 1)
    if elements:
        most = by_element.most_positions(vectors, elements)
    return min(range(1, min(most, chunk) + 1), key=lambda rows: _multiply_cycles(chunk, rows, vectors, 64, elements))


def _multiply_cycles(chunk: int, rows: int, vectors: int, depth: int, elements: int) -> float:
    """Of one panel and all tiles of a chunk; instructions, where numbers are multiplied as `elements` of vectors."""
    steps, rest = divmod(chunk, rows)

    def tile(r: int) -> float:
        if elements and r:
            return depth / elements * by_element.instructions(elements, r, vectors, True) + 2 * r * vectors + 20
        return depth * max(r * vectors / 2, (r + vectors) / LOADS_PER_CYCLE, 4) + TILE_CYCLES if r else 0.0

    return steps * tile(rows) + tile(rest)


def _cycles(
    shape: Shape, side: int, tiles: int, chunk: int, rows: int, vectors: int, order: str, elements: int
) -> float:
    """Predicted cycles of the whole convolution on one core."""
    points, chunks = (side + 2) ** 2, -(-tiles // chunk)
    groups, depth = shape.out_blocks // vectors, shape.in_blocks * shape.icb
    multiply = chunks * points * groups * _multiply_cycles(chunk, rows, vectors, depth, elements)
    weight = 4 * points * shape.out_blocks * shape.ocb * depth
    data, product = (4 * points * chunk * c for c in (depth, shape.out_blocks * shape.ocb))
    kept = data + (product if order == "points" else product // groups)
    reads = chunks if weight + kept > L2_BYTES else 1
    again = groups if order == "outs" or data // points > L1_BYTES else 1
    fast = L2_BYTES_PER_CYCLE if kept < L2_BYTES else MEMORY_BYTES_PER_CYCLE
    traffic = chunks * ((1 + again) * data / fast + 2 * product / fast + weight / L2_BYTES_PER_CYCLE)
    stream = reads * weight / MEMORY_BYTES_PER_CYCLE
    each = TRANSFORM_INSTRUCTIONS if elements else TRANSFORM_CYCLES
    transforms = chunks * chunk * (shape.in_blocks + shape.out_blocks) * each[side]
    return max(multiply, stream) + 0.5 * min(multiply, stream) + 0.5 * traffic + transforms
