"""Depthwise convolution and pooling on blocked activations: a window slides, channels do not mix.

Idea: the lane axis is the vector; `columns` neighbouring outputs accumulate in registers while the window's positions
are unrolled. Padding is copied `rows` output rows at a time: as many as the first-level cache holds beside the output.

Loop order: n, channel block, row group (parallel) / row / column tile / kh, kw unrolled / columns, lane.

Register budget: columns + the window's weights, as far as the compiler keeps them.

Source: Zhang, Lo, Lu: High Performance Depthwise and Pointwise Convolutions on Mobile Devices, AAAI 2020, section 3.
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
    work,
)

NAME = "window"
VERSION = 2
ANCHORS = ("depthwise", "window_max", "window_sum")
STRIP_BYTES = 18 << 10
"""Most bytes of padded input in a strip of rows. Fitted: strips of 30 KB cost half as much again on 28 x 28."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {columns, rows}: widest tile first, a few rows of padding at a time."""
    block = workload.anchor(*ANCHORS)
    if block is None:
        return None
    _, _, positions, _, _kh, _kw = extents(block)
    width = annotation(block, ROW)
    widths = list(divisors(width, workload.machine.registers * 3 // 4))[::-1]
    preferred = sorted(widths, key=lambda c: abs(c - workload.machine.registers // 4) if c > 3 else 99 - c)
    rows = list(divisors(positions // width, 64))[::-1]
    fits = _rows_that_fit(workload)
    near = sorted(rows, key=lambda r: (r > fits, abs(r - fits)))[:3]
    return [{"columns": c, "rows": r} for c in preferred[:4] for r in near]


def _rows_that_fit(workload: Workload) -> int:
    """Output rows whose padded input fills a strip; where nothing is padded, a number that shares work well."""
    if "pad" not in workload.blocks:
        return 14
    block = workload.anchor(*ANCHORS)
    assert block is not None
    _, _, height, width, lanes = extents(workload.blocks["pad"])
    rows = extents(block)[2] // annotation(block, ROW)
    return int(STRIP_BYTES / (width * lanes * 4 * height / rows))


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is one of ANCHORS."""
    block = workload.anchor(*ANCHORS)
    assert block is not None
    name = str(block.name_hint)
    positions = extents(block)[2]
    width = annotation(block, ROW)
    schedule = new_schedule(workload.func)
    out = inline_epilogue(schedule, name)
    n, c, p, lane = schedule.get_loops(out)
    groups = positions // width // decision["rows"]
    group, _, tile, column = schedule.split(
        p, [groups, decision["rows"], width // decision["columns"], decision["columns"]]
    )
    spread = schedule.fuse(n, c, group)
    if work(block) >= PARALLEL_WORK and workload.machine.threads != 1:
        schedule.parallel(spread)
    schedule.unroll(column)
    schedule.vectorize(lane)
    anchor = schedule.get_sblock(name)
    schedule.compute_at(anchor, tile, preserve_unit_loops=True)
    n_, c_, p_, v_, kh, kw = schedule.get_loops(anchor)[-6:]
    schedule.reorder(kh, kw, n_, c_, p_, v_)
    for loop in (kh, kw, p_) if loop_extents(schedule, [kh])[0] <= 7 else (kw, p_):
        schedule.unroll(loop)
    schedule.vectorize(v_)
    init = schedule.decompose_reduction(anchor, kh)
    *_, p_, v_ = schedule.get_loops(init)
    schedule.unroll(p_)
    schedule.vectorize(v_)
    if "pad" in workload.blocks:
        pad = schedule.get_sblock("pad")
        schedule.compute_at(pad, spread, preserve_unit_loops=True)
        schedule.vectorize(schedule.get_loops(pad)[-1])
    return Kernel(schedule.mod["main"])
