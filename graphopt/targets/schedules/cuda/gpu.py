"""What a GPU template is given: a fused PrimFunc and the GPU it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphopt.gpu_names import ARCHITECTURES, Architecture
from graphopt.targets.schedules.workload import Machine, Workload

WARP = 32
"""Threads that run in step."""


@dataclass(frozen=True)
class Gpu:
    """The part of a CUDA target that schedules depend on."""

    arch: str
    multiprocessors: int
    without: frozenset[str] = frozenset()
    """Templates and ideas that are switched off, by name."""

    @property
    def limits(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    def allows(self, idea: str) -> bool:
        """Whether an idea is switched on."""
        return idea not in self.without


_NO_VECTORS = Machine(lanes=1, registers=0, threads=1)


@dataclass(frozen=True, eq=False)
class GpuWorkload(Workload):
    """One fused function to schedule for a GPU."""

    machine: Machine = field(default=_NO_VECTORS)
    gpu: Gpu = field(default=Gpu("sm_80", 108))
    target: Any = None
    """The `tvm.target.Target`."""
