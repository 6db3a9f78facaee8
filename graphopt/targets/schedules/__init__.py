"""Kernel templates, one a file, and the alternatives they offer for a kernel.

A template is a module with `NAME`, `VERSION`, `match(workload) -> None | space` and
`apply(workload, decision) -> Kernel`. A space is a list of decisions, best guess first: applying the first needs no
search. `None` means not applicable. All templates that match a workload compete; `generic` stands in where none does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from graphopt.targets.relax import stack_buffers
from graphopt.targets.schedules import (
    attention,
    batch_matmul,
    concat_lanes,
    conv2d_amx,
    conv2d_blocked,
    conv2d_int8,
    depthwise,
    depthwise_int8,
    generic,
    matmul_amx,
    matmul_blocked,
    matmul_int4,
    matmul_packed,
    matmul_row,
    pixels,
    rowwise,
    window,
    winograd,
)
from graphopt.targets.schedules.workload import Decision, Kernel, Workload

TEMPLATES: tuple[ModuleType, ...] = (
    conv2d_amx,
    matmul_row,
    matmul_amx,
    conv2d_blocked,
    conv2d_int8,
    winograd,
    depthwise,
    depthwise_int8,
    window,
    matmul_blocked,
    matmul_packed,
    batch_matmul,
    attention,
    matmul_int4,
    rowwise,
    pixels,
    concat_lanes,
)
"""In the order of their first guesses: the first template that matches gives a kernel's decision without a search."""


@dataclass(frozen=True)
class Choice:
    """One way to schedule a kernel."""

    template: str
    decision: Decision


def choices(workload: Workload) -> list[Choice]:
    """Every decision of every template that matches, in turns, so that the first few hold each template's best guess.

    The order of templates is that of `TEMPLATES`, but those that predict their cycles (`predicted_cycles(workload,
    decision)`) stand in the order of what they predict, in the places they have among themselves. Templates named in
    `workload.machine.without` are left out.
    """
    without = workload.machine.without
    spaces = [(t.NAME, t.match(workload) or []) for t in TEMPLATES if t.NAME not in without]
    spaces = _by_prediction(workload, [(name, space) for name, space in spaces if space])
    longest = max((len(space) for _, space in spaces), default=0)
    found = [Choice(name, space[i]) for i in range(longest) for name, space in spaces if i < len(space)]
    return found or [Choice(generic.NAME, decision) for decision in generic.match(workload)]


def arithmetic_share(choice: Choice) -> float:
    """Multiplications of a choice's template as a share of those that a workload's direct form has; 1 for most."""
    return getattr(template_named(choice.template), "ARITHMETIC", 1.0)


def _by_prediction(workload: Workload, spaces: list[tuple[str, list[Decision]]]) -> list[tuple[str, list[Decision]]]:
    places = [i for i, (name, _) in enumerate(spaces) if hasattr(template_named(name), "predicted_cycles")]
    ranked = sorted(places, key=lambda i: template_named(spaces[i][0]).predicted_cycles(workload, spaces[i][1][0]))
    order = dict(zip(places, ranked, strict=True))
    return [spaces[order.get(i, i)] for i in range(len(spaces))]


def schedule(workload: Workload, choice: Choice) -> Kernel:
    """The kernel that a choice makes. Raises what TVM raises where the schedule cannot be applied.

    From the first call on, this process compiles so that tiles stay in registers (`stack_buffers`).
    """
    stack_buffers.register()
    return template_named(choice.template).apply(workload, dict(choice.decision))


def template_named(name: str) -> ModuleType:
    """The template a recorded decision belongs to. Raises KeyError for one that does not exist (any more)."""
    for template in (*TEMPLATES, generic):
        if name == template.NAME:
            return template
    raise KeyError(name)
