"""What a target is: it lowers a model, tunes and builds it, and says what it can do."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from graphopt import spec
from graphopt.capabilities import Capabilities
from graphopt.progress import SILENT, Progress


@dataclass(frozen=True)
class TuningReport:
    """What the tuner decided and what it cost."""

    tasks: int
    """Distinct workloads that a schedule template matches."""
    from_database: int
    """Of these, how many needed no search."""
    trials: int
    seconds: float
    digest: str
    """sha256 of the decisions, in a canonical order: equal digests build equal code."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """One per task: workload, template, decision, time_us, gflops, calls, trials, from_database, kind (the element
    type of its constants), and where peaks are known share_of_peak: from 0 to 1; above 1 where an algorithm does less
    arithmetic than it is credited with (Winograd); None for kinds without a peak."""
    stopped_early: bool = False
    """True when the time budget ended before every task was searched; the best so far was kept."""
    devices: Mapping[str, int] = field(default_factory=dict)
    """Remote devices and how many trials each finished; empty where this machine timed."""
    losses: tuple[str, ...] = ()
    """Devices that were lost in a trial: which, when and why. Their trials were repeated on others."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """By kind, GFLOP/s (GOP/s of bytes) that one core of this machine reached; empty where nothing was timed."""
    unit: str = "microseconds"
    """What candidates were chosen by; "instructions" where the processor is not at hand: rows then have `instructions`
    of a call, as counted in the emulator, and `model_cycles` and `share_of_peak` by llvm-mca."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TuningReport:
        """What `dataclasses.asdict` made of a report, and JSON of that."""
        return cls(**{**content, "rows": tuple(content["rows"]), "losses": tuple(content["losses"])})

    @property
    def kernels_us(self) -> float:
        """The kernels' times, each as often as a run of the model calls it; those without a time count nothing."""
        return sum((row["time_us"] or 0.0) * row["calls"] for row in self.rows)


@dataclass(frozen=True)
class TensorType:
    """Element type, as numpy names it, and static shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """What a target makes of the nodes of a model, each on its own."""

    refused: Mapping[str, str]
    """By an output of a node: why it cannot be translated."""
    types: Mapping[str, TensorType]
    """By name: what is known of values."""
    constants: Mapping[str, np.ndarray]
    """By name: values that depend on shapes and constants only."""


class Devices(Protocol):
    """Remote devices of one kind, that time candidates: `graphopt.remote.farm.RemoteDevices`."""


class Lowered(Protocol):
    """A model in a target's own form; opaque to everybody but the target that made it."""


@dataclass(frozen=True)
class Target(abc.ABC):
    """Base of every target: a frozen dataclass whose fields are its options, e.g. `cpu{mcpu=cascadelake}`."""

    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What passes may count on."""

    @property
    def runs_here(self) -> bool:
        """Whether this machine may run what is built, as far as its kind of processor goes."""
        return True

    @property
    def times_kernels(self) -> bool:
        """Whether the kernels of a run can be timed one by one, on a machine that runs them."""
        return True

    @property
    def runs_in_parts(self) -> bool:
        """Whether compiled parts of a model and ONNX Runtime can take turns on the same tensors: a GPU has its own."""
        return True

    @abc.abstractmethod
    def lower(self, model: ir.Model) -> Lowered:
        """Translate a model with static input shapes.

        Raises UnsupportedOperatorError naming every operator (and one node each) that cannot be translated.
        """

    def survey(self, model: ir.Model, known: Mapping[str, TensorType]) -> Survey | None:
        """Which nodes of a model with static input shapes and no functions `lower` would refuse; `known`: types of
        values where they are static. None: this target cannot tell. Raises TargetError where it is no node that is
        refused.
        """
        return None

    @abc.abstractmethod
    def tune(
        self,
        lowered: Lowered,
        *,
        seconds: float,
        database: Path,
        seed: int = 0,
        progress: Progress = SILENT,
        fresh: bool = False,
        everything: bool = False,
        devices: Devices | None = None,
    ) -> TuningReport:
        """Choose a schedule for every workload, within `seconds`, starting from `database` and adding to it.

        `fresh` searches again what the database knows; `everything` also times kernels that have only one schedule;
        `devices` are where candidates are timed, if not on this machine.
        KeyboardInterrupt keeps the best so far in the database and is raised again.
        """

    @abc.abstractmethod
    def build(self, lowered: Lowered, folder: Path) -> tuple[str, ...]:
        """Compile with the decisions that `tune` made; write into `folder`, return the names of the files."""

    def __str__(self) -> str:
        return str(spec.unbind(self.name, self))


@dataclass(frozen=True)
class Diagnosis:
    """A row of `graphopt doctor`."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
