"""64-bit ARM processors under Linux, compiled for from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt import capabilities
from graphopt.arm_cores import ARM_FEATURES, find_board, find_core
from graphopt.capabilities import Capabilities
from graphopt.targets.llvm import LlvmTarget

USUAL_CORES = 4


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
        return "aarch64"

    @property
    def features(self) -> frozenset[str]:
        return ARM_FEATURES[self.llvm_cpu]

    @property
    def capabilities(self) -> Capabilities:
        return capabilities.arm_capabilities(self.features)

    @property
    def thread_count(self) -> int:
        return self.threads or (find_board(self.device).cores if self.device else USUAL_CORES)
