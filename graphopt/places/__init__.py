"""Where candidates run: on this machine, or in an emulator of the target's processor."""

from __future__ import annotations

from graphopt.errors import TargetError
from graphopt.places.base import Place
from graphopt.places.here import Here
from graphopt.targets.base import Target


def place_for(target: Target) -> Place:
    """This machine where the target's code may run on it, else an emulator. Raises TargetError where there is none."""
    if target.runs_here:
        return Here()
    from graphopt.places.emulated import Emulated
    from graphopt.targets.llvm import LlvmTarget

    if not isinstance(target, LlvmTarget):
        raise TargetError(
            f"{target} is not the kind of processor this machine has: nothing can be measured on it from here",
            hint=f"build for it from Python: see docs/{target.name}.md",
        )
    return Emulated(target.arch, target.llvm_cpu, target.features)


__all__ = ["Here", "Place", "place_for"]
