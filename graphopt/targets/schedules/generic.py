"""Everything no other template takes: elementwise chains, data movement, reductions.

Idea: inline what is cheap, run the outer axes in parallel, and keep the last axis of each block innermost so that it
vectorises: explicitly when it is one vector, else by the compiler. Reductions whose last output axis is contiguous
accumulate a vector at a time.

Loop order: outer spatial axes fused (parallel) / reduction axes / last spatial axis, in vectors.

Register budget: none is planned; one accumulator vector.

Source: the loop orders that compilers find for streaming kernels; McKinley, Carr, Tseng: Improving Data Locality with
Loop Transformations, ACM TOPLAS 18(4), 1996, section 3 (memory order).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax import lookup
from graphopt.targets.schedules.gemm import substitute
from graphopt.targets.schedules.workload import (
    PARALLEL_ELEMENTS,
    Decision,
    Kernel,
    Workload,
    extents,
    loop_extents,
    new_schedule,
    nodes,
)

NAME = "generic"
VERSION = 3
PARTITION = "pragma_loop_partition_hint"
"""On the loop over channel blocks: a concatenation becomes a loop for each of its parts, without a condition inside."""


def match(workload: Workload) -> list[Decision]:
    """One decision, for every function."""
    return [{}]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule any function; one with dynamic shapes, opaque blocks or no elements is left as it is."""
    from tvm.s_tir.schedule import ScheduleError

    has_root = getattr(getattr(workload.func.body, "block", None), "name_hint", "") == "root"
    if not has_root or any(0 in extents(block) for block in workload.blocks.values()):
        return Kernel(workload.func)
    schedule = new_schedule(workload.func)
    for name in list(workload.blocks)[:-1]:
        block = schedule.get_sblock(name)
        if _is_cheap(schedule.get(block)):
            trial = schedule.copy()
            try:
                trial.compute_inline(trial.get_sblock(name))
            except ScheduleError:
                continue  # it is read in a way that inlining does not know
            schedule = trial
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        trial = schedule.copy()
        try:
            _schedule_block(trial, trial.get_sblock(schedule.get(block).name_hint), workload)
        except ScheduleError:
            continue
        schedule = trial
    return Kernel(schedule.mod["main"])


def _is_cheap(block) -> bool:
    """No reduction, and little arithmetic: inlining may repeat it."""
    if any(v.iter_type != 0 for v in block.iter_vars) or block.init is not None:
        return False
    return all(_operator(call) in ("if_then_else", "likely") for call in _calls(block))


def _calls(block) -> list:
    from tvm.ir import Call

    return nodes(block.body, Call)


def _operator(call) -> str:
    """`if_then_else` of `tirx.if_then_else` or `prim.if_then_else`: the part before the dot says where it is kept."""
    return str(getattr(call.op, "name", "")).rpartition(".")[2]


def _schedule_block(schedule, block, workload: Workload) -> None:
    from tvm import tirx

    loops = schedule.get_loops(block)
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    if not loops or len(loops) != len(kinds):
        return
    if any(not isinstance(schedule.get(loop).extent, tirx.IntImm) for loop in loops):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
    if not spatial:
        return
    sizes = loop_extents(schedule, loops)
    total = 1
    for size in sizes:
        total *= size
    parallel = total >= PARALLEL_ELEMENTS and workload.machine.threads != 1
    lanes = workload.machine.lanes
    last = spatial[-1]
    width = loop_extents(schedule, [last])[0]
    if reduced and width >= 4 and _streams(schedule.get(block)):
        chunk = next((c for c in (4 * lanes, 2 * lanes, lanes, lanes // 2, 4) if width % c == 0), None)
        if chunk is None:
            outer, inner = None, last
            schedule.reorder(*spatial[:-1], *reduced, last)
        else:
            outer, inner = schedule.split(last, [None, chunk])
            schedule.reorder(*spatial[:-1], outer, *reduced, inner)
            schedule.vectorize(inner)
        front = spatial[:-1] + ([outer] if outer is not None else [])
        if front:
            whole = schedule.fuse(*front)
            if parallel:
                schedule.parallel(whole)
        init = schedule.decompose_reduction(block, reduced[0])
        if chunk is not None:
            schedule.vectorize(schedule.get_loops(init)[-1])
        return
    if reduced:
        schedule.reorder(*spatial, *reduced)
        whole = schedule.fuse(*spatial)
        if parallel:
            schedule.parallel(whole)
        schedule.decompose_reduction(block, reduced[0])
        return
    if any(_operator(call) == "lookup" for call in _calls(schedule.get(block))):
        lanes = max(lanes, lookup.LANES)
    if width <= 2 * lanes and width % 4 == 0 and _moves_vectors(schedule.get(block)):
        schedule.vectorize(last)
        front = spatial[:-1]
        if front and parallel:
            schedule.parallel(schedule.fuse(*front[:-1]) if len(front) > 1 else front[0])
        elif len(front) == 3 and any(_operator(call) == "if_then_else" for call in _calls(schedule.get(block))):
            schedule.annotate(front[1], PARTITION, 1)
        return
    if _reads_whole_vectors(schedule.get(block), lanes):
        pieces, inner = schedule.split(last, [None, lanes])
        schedule.vectorize(inner)
        if parallel:
            schedule.parallel(schedule.fuse(*spatial[:-1], pieces))
        return
    if len(spatial) > 1 and parallel:
        schedule.parallel(schedule.fuse(*spatial[:-1]))
    elif parallel and width >= PARALLEL_ELEMENTS:
        pieces, _ = schedule.split(last, [64, None]) if width % 64 == 0 else (last, None)
        schedule.parallel(pieces)


def _reads_whole_vectors(block, lanes: int) -> bool:
    """True when each vector along the last output axis reads neighbours, though the axis is not one of what it reads:
    channels that lie in blocks, or in another shape."""
    from tvm import tirx
    from tvm.ir import Range, Var
    from tvm.ir.expr import TensorLoad
    from tvm.sym import Analyzer

    axis = block.iter_vars[-1]
    width = axis.dom.extent
    if not isinstance(width, tirx.IntImm) or int(width) % lanes or int(width) <= lanes:
        return False
    analyzer = Analyzer()
    for each in block.iter_vars[:-1]:
        analyzer.bind(each.var, each.dom)
    kind: Any = axis.var.ty
    vector, lane = Var("vector", kind), Var("lane", kind)
    for counted, extent in ((vector, int(width) // lanes), (lane, lanes)):
        first, count = tirx.const(0, kind.dtype), tirx.const(extent, kind.dtype)
        analyzer.bind(counted, Range.from_min_extent(first, count))

    def steps(index) -> bool | None:
        """None where the index is one number for all lanes; True where it counts them."""
        found = analyzer.simplify(substitute(index, {axis.var: vector * lanes + lane}))
        if not any(node.same_as(lane) for node in nodes(found, Var)):
            return None
        rest = analyzer.simplify(found - lane)
        return not any(node.same_as(lane) for node in nodes(rest, Var))

    for load in nodes(block.body, TensorLoad):
        if any(steps(index) is not None for index in load.indices[:-1]):
            return False
        if load.indices and steps(load.indices[-1]) is False:
            return False
    return True


def _streams(block) -> bool:
    """True when neighbours along the last output axis read neighbouring elements."""
    return _last_axis_is_unit(block, [v.var for v in block.iter_vars if int(v.iter_type) == 0][-1])


def _moves_vectors(block) -> bool:
    return _last_axis_is_unit(block, block.iter_vars[-1].var)


def _last_axis_is_unit(block, axis) -> bool:
    from tvm.ir import Var
    from tvm.ir.expr import TensorLoad

    def uses(expression) -> bool:
        return any(node.same_as(axis) for node in nodes(expression, Var))

    for load in nodes(block.body, TensorLoad):
        if any(uses(i) for i in load.indices[:-1]):
            return False
        if load.indices and uses(load.indices[-1]) and not load.indices[-1].same_as(axis):
            return False
    return True
