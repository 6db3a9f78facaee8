"""Everything no other template takes: TVM's own rules for GPUs (dlight), the last of which takes any function.

Idea: matrix products in register tiles, matrix-vector products and reductions across the threads of a block, everything
else one thread an element.

Source: `tvm.s_tir.dlight.gpu`.
"""

from __future__ import annotations

from typing import Any

from graphopt.errors import TargetError
from graphopt.targets.schedules.cuda.gpu import GpuWorkload
from graphopt.targets.schedules.workload import Decision, Kernel

NAME = "floor"
VERSION = 1


def match(workload: GpuWorkload) -> list[Decision]:
    """One decision, for every function."""
    return [{}]


def apply(workload: GpuWorkload, decision: Decision) -> Kernel:
    """Raises TargetError where none of the rules finds threads for the function."""
    import tvm
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    module = tvm.IRModule({"main": workload.func.with_attr("global_symbol", "main")})
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    with workload.target:
        scheduled: Any = dlight.ApplyDefaultSchedule(*rules)
        module = scheduled(module)
    func = module["main"]
    if not has_threads(func):
        raise TargetError(f"a kernel has no schedule for GPUs: {', '.join(workload.blocks) or 'no blocks'}")
    return Kernel(func)


def has_threads(func) -> bool:
    """Whether a function runs on a GPU's threads."""
    from tvm import tirx

    from graphopt.targets.schedules.workload import nodes

    return any(loop.thread_binding is not None for loop in nodes(func.body, tirx.For)) or any(
        each.attr_key == "thread_extent" for each in nodes(func.body, tirx.AttrStmt)
    )
