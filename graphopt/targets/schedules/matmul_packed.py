"""Matrix product with a constant, packed weight.

Idea: a tile of `rows` x one packed column block stays in registers while the common axis streams; the packed block
(K, nb) is read once, front to back. One row is a stream of the weight at memory speed, requested a page ahead.

Loop order: batch, column block, row tile (parallel) / k / rows, vectors unrolled, lane.

Register budget: rows * nb / lanes accumulators + nb / lanes weights + 1 scalar <= registers.

Source: Goto and van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008, section 4.
"""

from __future__ import annotations

from graphopt.targets.relax.computes import COLUMNS
from graphopt.targets.schedules import matmul_row, prefetch
from graphopt.targets.schedules.workload import (
    PARALLEL_ELEMENTS,
    Decision,
    Kernel,
    Workload,
    annotation,
    divisors,
    extents,
    inline_epilogue,
    loop_extents,
    new_schedule,
    nodes,
    work,
)

NAME = "matmul_packed"
VERSION = 2
AHEAD_BYTES = 4096
"""A page: the time of 4 KB at memory speed exceeds the time of one access."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, steps}: rows of the register tile, and how far k is unrolled.

    For one row, also {ahead}: how many bytes of the weight ahead are requested.
    """
    block = workload.anchor("packed_matmul")
    if block is None or matmul_row.takes(workload) or workload.number != "float32":
        return None
    nb = annotation(block, COLUMNS)
    *lead, _columns, depth = extents(block)
    vectors = -(-nb // workload.machine.lanes)
    most = max((workload.machine.registers - vectors - 1) // vectors, 1)
    rows = divisors(lead[-1], most)[::-1] if lead else [1]
    steps = [s for s in (4, 1) if depth % s == 0]
    if rows == [1] and nb * 4 >= prefetch.LINE_BYTES and workload.machine.allows("prefetch"):
        return [{"rows": 1, "steps": s, "ahead": AHEAD_BYTES} for s in steps]
    return [{"rows": r, "steps": s} for r in rows[:5] for s in steps]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `packed_matmul`."""
    block = workload.blocks["packed_matmul"]
    nb = annotation(block, COLUMNS)
    lanes = workload.machine.lanes
    parallel = work(block) >= PARALLEL_ELEMENTS and workload.machine.threads != 1
    schedule = new_schedule(workload.func)
    after = list(workload.blocks)[list(workload.blocks).index("packed_matmul") + 1 :]
    anchor = schedule.get_sblock("packed_matmul")
    if "packed_crop" in after:  # padded columns: the product is stored whole, then cropped into the epilogue
        for name in after[:-1]:
            schedule.compute_inline(schedule.get_sblock(name))
        out = schedule.cache_write(anchor, 0, "local")
        anchor = schedule.get_sblock("packed_matmul")
    else:
        out = inline_epilogue(schedule, "packed_matmul")
    *lead, m, j = schedule.get_loops(out)
    column, inner = schedule.split(j, [None, nb])
    tile, row = schedule.split(m, [None, decision["rows"]])
    schedule.reorder(*lead, column, tile, row, inner)
    spread = schedule.fuse(*lead, column)
    if parallel:
        schedule.parallel(spread)
    _vectors(schedule, inner, nb, lanes)
    schedule.unroll(row)
    schedule.compute_at(anchor, tile, preserve_unit_loops=True)
    *_, row_, inner_, k = schedule.get_loops(anchor)
    step, unrolled = schedule.split(k, [None, decision["steps"]])
    schedule.reorder(step, unrolled, row_, inner_)
    ahead = decision.get("ahead", 0)
    if ahead:
        schedule.annotate(step, prefetch.STREAM, ahead)
    schedule.unroll(unrolled)
    schedule.unroll(row_)
    _vectors(schedule, inner_, nb, lanes)
    init = schedule.decompose_reduction(anchor, step)
    loops = schedule.get_loops(init)
    width = loop_extents(schedule, loops)
    split = nb > lanes and nb % lanes == 0
    schedule.unroll(loops[-3 if split else -2])
    if split:
        schedule.unroll(loops[-2])
    if width[-1] > 1:
        schedule.vectorize(loops[-1])
    func = schedule.mod["main"]
    if ahead:
        func = prefetch.stream(func, _weight(block))
    return Kernel(func)


def _weight(block):
    """The packed operand: the one that is read last in the product."""
    from tvm.ir.expr import TensorLoad

    return nodes(block.body.value.b, TensorLoad)[-1].source


def _vectors(schedule, loop, nb: int, lanes: int) -> None:
    if nb > lanes and nb % lanes == 0:
        vector, lane = schedule.split(loop, [None, lanes])
        schedule.unroll(vector)
        schedule.vectorize(lane)
    elif nb > 1:
        schedule.vectorize(loop)
