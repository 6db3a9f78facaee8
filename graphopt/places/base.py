"""Where candidates run: on this machine, in an emulator, or on a device over RPC."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.measure import Contender, Counts, PairedResult
from graphopt.progress import Progress
from graphopt.targets.base import Devices, Target
from graphopt.verify import Feeds, Runner

Unit = Literal["seconds", "instructions", "nothing"]


class Place(abc.ABC):
    """Runs what was built for a target, and compares candidates in its unit. A context: what it starts ends with it."""

    kind: ClassVar[Literal["here", "emulated", "device", "unmeasured"]]
    unit: ClassVar[Unit] = "seconds"
    runs: ClassVar[bool] = True
    """Whether anything can be run there: where not, it is built only."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """For people."""

    @property
    def is_here(self) -> bool:
        """Whether it is this process's machine: only there ONNX Runtime runs, and kernels are timed one by one."""
        return self.kind == "here"

    def completed(self, target: Target) -> Target:
        """The target, what it leaves open taken from the device."""
        return target

    @abc.abstractmethod
    def open(self, contender: Contender, threads: int | None) -> AbstractContextManager[Runner]:
        """Open a contender for running; None threads: all. Raises TargetError and ArtifactError."""

    @abc.abstractmethod
    def race(
        self,
        contenders: Sequence[Contender],
        feeds: Sequence[Feeds],
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Progress,
    ) -> PairedResult | Counts:
        """Compare contenders. Raises MeasurementError where none is left, TargetError."""

    @property
    def devices(self) -> Devices | None:
        """What times candidates of the tuner; None: this machine."""
        return None

    def evaluation_limit(self, model: ir.Model) -> int | None:
        """On how many samples accuracy through an engine is measured at most; None: on all."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """For reports: kind, label, unit, and what else there is to say."""
        return {"kind": self.kind, "label": self.label, "unit": self.unit}

    def warnings(self) -> list[str]:
        """What a reader of the figures must know."""
        return []

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End what was started."""
