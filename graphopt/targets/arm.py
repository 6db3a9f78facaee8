"""64-bit ARM processors under Linux, compiled for from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt import capabilities
from graphopt.arm_cores import ARM_FEATURES, find_board, find_core
from graphopt.capabilities import Capabilities
from graphopt.targets.base import Diagnosis
from graphopt.targets.llvm import LlvmTarget
from graphopt.targets.relax import link

ARCH = "aarch64"
USUAL_CORES = 4
"""Where no device says how many."""


@dataclass(frozen=True)
class Arm(LlvmTarget):
    """`arm{mcpu=cortex-a72}`, or `arm{device=rpi4}`: LLVM's name of the core (its family may be left out: `a72`), or
    something that has it; by default any ARMv8-A. `threads` 0 means the cores of the device, or four.

    `precision` and `without`: see `LlvmTarget`.
    """

    name: ClassVar[str] = "arm"
    mcpu: str = ""
    device: str = ""
    threads: int = 0
    precision: str = "float32"
    without: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.mcpu and self.device:
            raise ValueError("mcpu and device both name a core: give one of them")
        if self.device:
            find_board(self.device)
        elif self.mcpu:
            object.__setattr__(self, "mcpu", find_core(self.mcpu))

    @property
    def llvm_cpu(self) -> str:
        """LLVM's name of the core."""
        return find_board(self.device).core if self.device else self.mcpu or "generic"

    @property
    def arch(self) -> str:
        return ARCH

    @property
    def features(self) -> frozenset[str]:
        return ARM_FEATURES[self.llvm_cpu]

    @property
    def capabilities(self) -> Capabilities:
        return capabilities.arm_capabilities(self.features)

    @property
    def thread_count(self) -> int:
        return self.threads or (find_board(self.device).cores if self.device else USUAL_CORES)


def doctor() -> list[Diagnosis]:
    """What there is to compile for ARM with, and to run it in."""
    from graphopt.remote import emulator

    linker = link.find_linker(ARCH)
    rows = [
        Diagnosis("linker for ARM", linker is not None, " ".join(linker) if linker else "none", link.cross_remedy(ARCH))
    ]
    if capabilities.host_arch() != ARCH:
        found = emulator.find_emulator(ARCH) if emulator.find_system(ARCH) else None
        rows.append(Diagnosis("emulator of ARM", found is not None, found or "none", emulator.remedy(ARCH)))
    return rows
