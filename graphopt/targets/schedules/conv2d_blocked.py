"""Direct convolution on blocked activations.

Idea: a tile of `columns` output positions x `outs` channel blocks stays in vector registers while all input channels
and kernel positions stream past; each step multiplies broadcast scalars of the input with vectors of the packed weight.

Loop order: n, out-block, row (parallel) / position tile / in-block, kh, in-lane, kw / outs, columns, lane. The last
three are unrolled and vectorised, kw too. A kernel of 1x1 with stride 1 reads the picture as one long row, so its tile
may cross rows. `order` says which of the out-blocks ("weights" stay in cache) and positions ("data" stays) is outer.

Register budget: columns * outs accumulators + columns broadcast scalars + outs weights <= registers. LLVM hoists the
broadcasts: past this sum it spills, and speed falls to a third.

Source: Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures, SC 2018,
section II (register and cache blocking); Liu et al., NeoCPU, USENIX ATC 2019, section 3.1 (NCHW[x]c).
"""

from __future__ import annotations

from graphopt.targets.relax.computes import ROW
from graphopt.targets.schedules.workload import (
    PARALLEL_WORK,
    Decision,
    Kernel,
    Workload,
    annotation,
    divisors,
    extents,
    inline_epilogue,
    loop_extents,
    new_schedule,
    schedule_padding,
    unique,
    work,
)

NAME = "conv2d_blocked"
VERSION = 2
FMA_PER_CYCLE = 2
LOADS_PER_CYCLE = 1.6
"""Two ports, less what address arithmetic and bank conflicts cost; fitted to measured tiles of Sapphire Rapids."""
FMA_LATENCY = 4
VECTOR_BYTES = 64
L1_BYTES = 32 << 10
L2_BYTES_PER_CYCLE = 28


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {columns, outs, order}, by predicted cycles."""
    block = workload.anchor("conv2d")
    if block is None:
        return None
    _, out_blocks, positions, _, ico, kh, ici, kw = extents(block)
    row = annotation(block, ROW)
    budget = workload.machine.registers
    weights = out_blocks * ico * ici * kh * kw * workload.machine.lanes * 4
    found: list[tuple[float, Decision]] = []
    for columns in divisors(row, budget):
        for outs in divisors(out_blocks, 4):
            scalars = columns if outs > 1 else columns // 2  # used once, a broadcast is an operand in memory
            if columns * outs + scalars + outs > budget:
                continue
            for order in ("weights", "data") if out_blocks // outs > 1 and positions // columns > 1 else ("weights",):
                cost = _cycles(columns, outs, outs * ico * ici * kh * kw * workload.machine.lanes * 4)
                if (order == "data") != (weights <= 1 << 19):
                    cost *= 1.01
                found.append((cost, {"columns": columns, "outs": outs, "order": order}))
    found.sort(key=lambda pair: pair[0])
    return unique(decision for _, decision in found)


def _cycles(columns: int, outs: int, weight_bytes: int) -> float:
    """Cycles for one multiply-accumulate of a vector, averaged over the tile.

    `weight_bytes` is what one tile reads of the weight: past the first-level cache it streams from the second.
    """
    accumulators = columns * outs
    arithmetic = accumulators / FMA_PER_CYCLE
    loads = (columns + outs) / LOADS_PER_CYCLE
    streaming = outs * VECTOR_BYTES / L2_BYTES_PER_CYCLE if weight_bytes > L1_BYTES else 0.0
    return max(arithmetic, loads, streaming, FMA_LATENCY) / accumulators * (1 + 0.2 / accumulators)


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `conv2d`."""
    columns, outs = decision["columns"], decision["outs"]
    block = workload.blocks["conv2d"]
    row = annotation(block, ROW)
    parallel = work(block) >= PARALLEL_WORK and workload.machine.threads != 1
    schedule = new_schedule(workload.func)
    schedule_padding(schedule, workload, parallel)
    out = inline_epilogue(schedule, "conv2d")
    n, o, p, lane = schedule.get_loops(out)
    positions = loop_extents(schedule, [p])[0]
    outer, inner = schedule.split(o, [None, outs])
    rows, tiles, column = schedule.split(p, [positions // row, row // columns, columns])
    if decision["order"] == "data":
        schedule.reorder(n, rows, tiles, outer, inner, column, lane)
        spread, at = schedule.fuse(n, rows, tiles), outer
    else:
        schedule.reorder(n, outer, rows, tiles, inner, column, lane)
        spread, at = schedule.fuse(n, outer, rows), tiles
    if parallel:
        schedule.parallel(spread)
    schedule.unroll(inner)
    schedule.unroll(column)
    schedule.vectorize(lane)
    conv = schedule.get_sblock("conv2d")
    schedule.compute_at(conv, at, preserve_unit_loops=True)
    n_, o_, p_, v_, ico, kh, ici, kw = schedule.get_loops(conv)[-8:]
    schedule.reorder(ico, kh, ici, kw, n_, o_, p_, v_)
    schedule.unroll(kw)
    schedule.unroll(o_)
    schedule.unroll(p_)
    schedule.vectorize(v_)
    init = schedule.decompose_reduction(conv, ico)
    *_, o_, p_, v_ = schedule.get_loops(init)
    schedule.unroll(o_)
    schedule.unroll(p_)
    schedule.vectorize(v_)
    return Kernel(schedule.mod["main"])
