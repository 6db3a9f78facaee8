"""Depthwise convolutions and pooling: every channel by itself.

Idea: a thread computes four neighbouring channels of one position, all taps unrolled; neighbouring threads have
neighbouring channels, so that a warp reads and writes whole lines, and positions that windows share come from the
first-level cache. Padding is a condition, not a copy; the chain after the window runs in registers.

Source: Zhang et al., High Performance Depthwise and Pointwise Convolutions on Mobile Devices, AAAI 2020, section 3
(depthwise convolution is bound by memory, so a direct form that reads each line once suffices).
"""

from __future__ import annotations

from graphopt.targets.schedules.cuda.gpu import GpuWorkload
from graphopt.targets.schedules.workload import Decision, Kernel, extents, inline_epilogue, new_schedule

NAME = "windows"
VERSION = 1
ANCHORS = ("depthwise", "window_max", "window_sum")
TOGETHER = 4
"""Channels of a thread."""
THREADS = (128, 64, 256)
MOST_TAPS = 64
"""Above these the window is a loop."""


def match(workload: GpuWorkload) -> list[Decision] | None:
    """Decisions {threads}: of a block."""
    block = workload.anchor(*ANCHORS)
    if block is None:
        return None
    names = list(workload.blocks)
    if set(names[: names.index(str(block.name_hint))]) - {"pad"} or extents(block)[3] % TOGETHER:
        return None
    last = workload.blocks[names[-1]]
    if last.init is not None and names[-1] != block.name_hint:
        return None
    if extents(last)[:4] != extents(block)[:4] or len(last.iter_vars) != 4 + (last is block) * 2:
        return None
    return [{"threads": threads} for threads in THREADS]


def apply(workload: GpuWorkload, decision: Decision) -> Kernel:
    """The function on threads."""
    block = workload.anchor(*ANCHORS)
    assert block is not None
    taps = 1
    for extent in extents(block)[4:]:
        taps *= extent
    schedule = new_schedule(workload.func)
    if "pad" in workload.blocks:
        schedule.compute_inline(schedule.get_sblock("pad"))
    last = inline_epilogue(schedule, str(block.name_hint))
    window = schedule.get_sblock(str(block.name_hint))
    loops = schedule.get_loops(last)
    outer, together = schedule.split(loops[-1], [None, TOGETHER])
    whole = schedule.fuse(*loops[:-1], outer)
    grid, thread = schedule.split(whole, [None, decision["threads"]])
    schedule.bind(grid, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    schedule.vectorize(together)
    schedule.set_scope(window, 0, "local")
    schedule.compute_at(window, thread, preserve_unit_loops=True)
    *_, channel, down, across = schedule.get_loops(window)
    schedule.reorder(down, across, channel)
    schedule.vectorize(channel)
    start = schedule.decompose_reduction(window, down)
    schedule.vectorize(schedule.get_loops(start)[-1])
    if taps <= MOST_TAPS:
        schedule.unroll(down)
        schedule.unroll(across)
    return Kernel(schedule.mod["main"])
