"""An emulated processor: right or wrong is found out by running, and instructions are counted in place of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import onnx_ir as ir

from graphopt.errors import MeasurementError, TargetError
from graphopt.inspection import inspect
from graphopt.measure import Contender, Counts
from graphopt.places.base import Place
from graphopt.progress import Progress
from graphopt.remote.address import Address
from graphopt.remote.emulator import emulated, qemu_cpu
from graphopt.verify import Feeds, Runner

EVALUATED_MACS = 5e9
"""Samples are evaluated in the emulator until they are about so many multiply-adds: about a minute."""
FEWEST_SAMPLES, MOST_SAMPLES = 4, 128


class Emulated(Place):
    """`core`: LLVM's name; `features`: what code for it may use, in /proc/cpuinfo's spelling."""

    kind = "emulated"
    unit = "instructions"

    def __init__(self, arch: str, core: str, features: frozenset[str]):
        self.arch, self.core = arch, core
        self.cpu = qemu_cpu(core, features)
        self._started = ExitStack()

    @property
    def label(self) -> str:
        stands_in = "" if self.cpu == self.core else f" as {self.cpu}"
        return f"{self.core}, emulated by QEMU{stands_in}"

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "cpu": self.cpu}

    @cached_property
    def _address(self) -> Address:
        return self._started.enter_context(emulated(self.arch, self.cpu))

    @contextmanager
    def open(self, contender: Contender, threads: int | None) -> Iterator[Runner]:
        from graphopt.remote.engine import RemoteEngine

        with RemoteEngine(contender.path, self._address) as engine:
            yield engine.run

    def race(
        self,
        contenders: Sequence[Contender],
        feeds: Sequence[Feeds],
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Progress,
    ) -> Counts:
        """Count the instructions of each contender for the first of `feeds`, on one thread."""
        from graphopt.remote.instructions import count_instructions

        totals: dict[str, int] = {}
        by_kernel: dict[str, Mapping[str, int]] = {}
        failed: dict[str, str] = {}
        with progress.task("counting instructions", len(contenders)) as advance:
            for contender in contenders:
                try:
                    found = count_instructions(contender.path, feeds[0], self.cpu)
                    totals[contender.name], by_kernel[contender.name] = found.total, found.by_kernel
                except TargetError as error:
                    failed[contender.name] = str(error)
                advance(1)
        if not totals:
            raise MeasurementError("; ".join(failed.values()))
        return Counts(totals, by_kernel, self.cpu, failed)

    def evaluation_limit(self, model: ir.Model) -> int:
        macs = inspect(model).macs or 0
        return max(FEWEST_SAMPLES, min(MOST_SAMPLES, int(EVALUATED_MACS / max(macs, 1))))

    def close(self) -> None:
        self._started.close()
