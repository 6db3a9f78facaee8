"""Chains of elementwise operators, four neighbours a thread.

Idea: everything is inlined into the last operator, whose elements are shared out in fours: 16 bytes of float32, 8 of
16-bit floats, in one load of each operand that is contiguous.

Source: NVIDIA, CUDA C++ Best Practices Guide, section "Coalesced Access to Global Memory".
"""

from __future__ import annotations

from graphopt.targets.schedules.cuda.gpu import GpuWorkload
from graphopt.targets.schedules.workload import Decision, Kernel, extents, new_schedule

NAME = "elementwise"
VERSION = 1
TOGETHER = 4
THREADS = (256, 128)


def match(workload: GpuWorkload) -> list[Decision] | None:
    """Decisions {threads}; None where something is no elementwise operator, or the last axis is not whole fours."""
    blocks = list(workload.blocks.values())
    if not blocks or any(block.init is not None or not _in_order(block) for block in blocks):
        return None
    sizes = extents(blocks[-1])
    if not sizes or sizes[-1] % TOGETHER:
        return None
    return [{"threads": threads} for threads in THREADS]


def _in_order(block) -> bool:
    """Whether a block reads along its own last axis, or the same element for all of it."""
    from tvm import tirx
    from tvm.ir.expr import TensorLoad

    from graphopt.targets.schedules.workload import nodes

    if not isinstance(block.body, tirx.BufferStore) or any(int(v.iter_type) != 0 for v in block.iter_vars):
        return False
    if not block.iter_vars:
        return False
    last = block.iter_vars[-1].var

    def uses(expression) -> bool:
        return any(variable.same_as(last) for variable in nodes(expression, tirx.Var))

    loads = nodes(block.body.value, TensorLoad)
    straight = all(not any(map(uses, load.indices[:-1])) for load in loads)
    return straight and all(load.indices[-1].same_as(last) or not uses(load.indices[-1]) for load in loads)


def apply(workload: GpuWorkload, decision: Decision) -> Kernel:
    """The function on threads."""
    schedule = new_schedule(workload.func)
    names = list(workload.blocks)
    for name in names[:-1]:
        schedule.compute_inline(schedule.get_sblock(name))
    loops = schedule.get_loops(schedule.get_sblock(names[-1]))
    outer, together = schedule.split(loops[-1], [None, TOGETHER])
    whole = schedule.fuse(*loops[:-1], outer)
    grid, thread = schedule.split(whole, [None, decision["threads"]])
    schedule.bind(grid, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")
    schedule.vectorize(together)
    return Kernel(schedule.mod["main"])
