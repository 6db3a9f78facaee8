"""Where candidates run: on this machine, in an emulator of the target's processor, on a device over RPC; or nowhere."""

from __future__ import annotations

from graphopt.errors import SpecError
from graphopt.places.base import Place
from graphopt.places.here import Here
from graphopt.targets.base import Target


def place_for(target: Target, remote: str | None = None) -> Place:
    """The device at the address `remote`; else this machine where the target's code may run on it; else an emulator of
    a processor; a GPU that is not here is not measured.

    Raises TargetError where the device lacks what the target needs or there is no emulator, SpecError for an address
    that is none, a wrong key or a GPU that is neither here nor named, DeviceError where nobody answers.
    """
    if target.runs_here and remote is None:
        return Here()
    from graphopt.targets.cuda import Cuda
    from graphopt.targets.llvm import LlvmTarget

    if not isinstance(target, (LlvmTarget, Cuda)):
        raise SpecError(f"the target {target} neither runs here nor is one that graphopt runs elsewhere")
    if remote is not None:
        from graphopt.places.device import OnDevice
        from graphopt.remote.address import parse_address

        return OnDevice(parse_address(remote), target)
    if isinstance(target, Cuda):
        from graphopt.places.unmeasured import Unmeasured

        if not (target.arch or target.device):
            raise SpecError(
                "there is no GPU here, and the target does not say which to build for",
                hint="--target 'cuda{arch=sm_90}', or 'cuda{device=h100}'; --remote HOST:PORT/KEY asks a device",
            )
        return Unmeasured(f"{target.gpu_arch} GPU" + (f" ({target.device})" if target.device else ""))
    from graphopt.places.emulated import Emulated

    return Emulated(target.arch, target.llvm_cpu, target.features)


__all__ = ["Here", "Place", "place_for"]
