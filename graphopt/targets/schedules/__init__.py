"""Kernel templates, one a file, and the list that is tried in order.

A template is a module with `NAME`, `VERSION`, `match(workload) -> None | space` and
`apply(workload, decision) -> PrimFunc`. A space is a list of decisions, best guess first: applying the first needs no
search. `None` means not applicable. `generic` matches everything, so it stands last.
"""

from __future__ import annotations

from types import ModuleType

from graphopt.targets.schedules import conv2d_blocked, generic, matmul_packed, window
from graphopt.targets.schedules.workload import Decision, Workload

TEMPLATES: tuple[ModuleType, ...] = (conv2d_blocked, window, matmul_packed, generic)


def choose(workload: Workload) -> tuple[ModuleType, list[Decision]]:
    """The first template that matches, and its space."""
    for template in TEMPLATES:
        space = template.match(workload)
        if space is not None:
            return template, space
    raise AssertionError("the generic template matches everything")


def template_named(name: str) -> ModuleType:
    """The template a recorded decision belongs to."""
    return next(t for t in TEMPLATES if name == t.NAME)
