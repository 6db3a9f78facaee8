"""Kernel templates for GPUs, one a file, and the alternatives they offer for a kernel.

A template is a module with `NAME`, `match(workload) -> None | space` and `apply(workload, decision) -> Kernel`, as
those for processors are (`graphopt.targets.schedules`). `floor` takes every function.
"""

from __future__ import annotations

from types import ModuleType

from graphopt.targets.schedules import Choice
from graphopt.targets.schedules.cuda import elementwise, floor, tensor_cores, windows
from graphopt.targets.schedules.cuda.gpu import Gpu, GpuWorkload
from graphopt.targets.schedules.workload import Kernel

TEMPLATES: tuple[ModuleType, ...] = (tensor_cores, windows, elementwise)
"""In the order of their first guesses."""

__all__ = ["Choice", "Gpu", "GpuWorkload", "choices", "schedule", "version_of"]


def choices(workload: GpuWorkload) -> list[Choice]:
    """Every decision of every template that matches, in turns; `floor` where none does."""
    spaces = [(t.NAME, t.match(workload) or []) for t in TEMPLATES if t.NAME not in workload.gpu.without]
    longest = max((len(space) for _, space in spaces), default=0)
    found = [Choice(name, space[i]) for i in range(longest) for name, space in spaces if i < len(space)]
    return found or [Choice(floor.NAME, decision) for decision in floor.match(workload)]


def schedule(workload: GpuWorkload, choice: Choice) -> Kernel:
    """The kernel that a choice makes. Raises TargetError where it has no threads, else what TVM raises."""
    return _named(choice.template).apply(workload, dict(choice.decision))


def version_of(template: str) -> int | None:
    """A template's version; None where there is none of this name (any more)."""
    return next((each.VERSION for each in (*TEMPLATES, floor) if template == each.NAME), None)


def _named(name: str) -> ModuleType:
    for template in (*TEMPLATES, floor):
        if name == template.NAME:
            return template
    raise KeyError(name)
