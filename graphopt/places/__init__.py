"""Where candidates run: on this machine, in an emulator of the target's processor, or on a device over RPC."""

from __future__ import annotations

from graphopt.errors import TargetError
from graphopt.places.base import Place
from graphopt.places.here import Here
from graphopt.targets.base import Target


def place_for(target: Target, remote: str | None = None) -> Place:
    """The device at the address `remote`; else this machine where the target's code may run on it; else an emulator.

    Raises TargetError where there is none of these or the device lacks what the target needs, SpecError for an address
    that is none or a wrong key, DeviceError where nobody answers.
    """
    if target.runs_here and remote is None:
        return Here()
    from graphopt.targets.llvm import LlvmTarget

    if not isinstance(target, LlvmTarget):
        raise TargetError(
            f"{target} is not the kind of processor this machine has: nothing can be measured on it from here",
            hint=f"build for it from Python: see docs/{target.name}.md",
        )
    if remote is not None:
        from graphopt.places.device import OnDevice
        from graphopt.remote.address import parse_address

        return OnDevice(parse_address(remote), target)
    from graphopt.places.emulated import Emulated

    return Emulated(target.arch, target.llvm_cpu, target.features)


__all__ = ["Here", "Place", "place_for"]
