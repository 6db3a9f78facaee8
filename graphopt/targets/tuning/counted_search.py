"""Choose a decision for every kernel of a model without the hardware: by the instructions that candidates execute.

The model is built with one candidate for each kernel and run once in the emulator, where the instructions of each
kernel are counted: a round tries one candidate of every kernel at a time. The first round is of the templates' first
decisions, and a kernel's search ends after `PATIENCE` candidates that bring nothing.

A count knows nothing of caches, which the order of decisions (each template's prediction) does. So a candidate takes
the place of one that is ahead of it only if it saves `WORTH` of its instructions: among near equals the prediction
stands.

What was found is not recorded in the schedule database, whose figures are times.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import TargetError
from graphopt.progress import Progress
from graphopt.remote.emulator import qemu_cpu
from graphopt.remote.instructions import InstructionCounts, count_instructions
from graphopt.runtime.tvm_engine import LIBRARY
from graphopt.targets.base import TuningReport
from graphopt.targets.tuning.database import Database
from graphopt.targets.tuning.pipeline_model import PipelineModel, find_tools
from graphopt.targets.tuning.task import Task
from graphopt.targets.tuning.tasks import find_tasks

if TYPE_CHECKING:
    from graphopt.targets.llvm import LlvmTarget, LoweredModel

PATIENCE = 3
WORTH = 0.03
"""Share of a kernel's instructions that a candidate must save."""
WORTH_OF_RUN = 0.002
"""Kernels with a smaller share of the model's instructions are not searched."""
UNIT = "instructions"


@dataclass
class _Kernel:
    """A task, and what its candidates took."""

    task: Task
    counts: dict[int, int] = field(default_factory=dict)
    """By position in the space: instructions of all calls in a run of the model."""
    best: int = 0
    fruitless: int = 0

    @property
    def next_position(self) -> int | None:
        """None where the search has ended."""
        following = len(self.counts)
        if self.task.known is not None or self.fruitless >= PATIENCE or following >= len(self.task.choices):
            return None
        return following

    def settle(self, position: int, count: int | None) -> None:
        """`count` is None for a candidate that cannot be built."""
        better = position == 0 or (count is not None and count < (1 - WORTH) * self.counts[self.best])
        self.counts[position] = self.counts[self.best] if count is None and position else count or 0
        if better:
            self.best, self.fruitless = position, 0
        else:
            self.fruitless += 1


class CountedSearch:
    """The tuner of a model for a processor that only the emulator has.

    Raises TargetError where nothing can be counted.
    """

    def __init__(self, lowered: LoweredModel, target: LlvmTarget, database: Path, seed: int, progress: Progress):
        self.lowered, self.target, self.progress = lowered, target, progress
        self.cpu = qemu_cpu(target.llvm_cpu, target.features)
        self.kernels = [_Kernel(task) for task in find_tasks(lowered, target, Database(database), everything=True)]
        for kernel in self.kernels:
            kernel.best = kernel.task.best if kernel.task.known is not None else 0
        self.trials = 0
        rng = np.random.default_rng(seed)
        self.feeds = {str(spec["name"]): _sample(spec, rng) for spec in lowered.inputs}

    def run(self, seconds: float) -> TuningReport:
        """Rounds for about `seconds`: none begins that would probably end later, but for the first."""
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="graphopt-counted-") as name:
            folder = Path(name)
            counts = self._round(folder, {})
            rows, total, stopped = self._rows(folder, counts), counts.total, False
            with self.progress.task("tune by instructions", len(self._candidates(total))) as advance:
                while candidates := self._candidates(total):
                    spent = time.perf_counter() - begin
                    if spent + spent / (1 + self.trials) > seconds:
                        stopped = True
                        break
                    self._try(folder, candidates)
                    advance(len(candidates) - len(candidates.keys() & self._candidates(total).keys()))
            if any(kernel.best for kernel in self.kernels if kernel.task.known is None):
                rows = self._rows(folder, self._round(folder, {}))
        chosen = sorted(
            (k.task.key.workload, c.template, json.dumps(c.decision, sort_keys=True))
            for k in self.kernels
            for c in (k.task.choices[k.best],)
        )
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        known = sum(k.task.known is not None for k in self.kernels)
        return TuningReport(
            len(self.kernels), known, self.trials, time.perf_counter() - begin, digest, rows, stopped, unit=UNIT
        )

    def _candidates(self, total: int) -> dict[int, int]:
        """The next position of each kernel whose search has not ended, by the kernel's index."""
        found = {}
        for index, kernel in enumerate(self.kernels):
            position = kernel.next_position
            if position is not None and kernel.counts[kernel.best] >= WORTH_OF_RUN * total:
                found[index] = position
        return found

    def _try(self, folder: Path, candidates: dict[int, int]) -> None:
        """A round; where the build fails, none of its candidates is taken."""
        self.trials += 1
        try:
            counts = self._round(folder, candidates)
        except TargetError as error:
            self.progress.note(f"candidates {self.trials} cannot be built or run: {error}")
            for index, position in candidates.items():
                self.kernels[index].settle(position, None)
            return
        found = counts.by_kernel
        for index, position in candidates.items():
            kernel = self.kernels[index]
            kernel.settle(position, sum(found.get(name, 0) for name in kernel.task.names))

    def _round(self, folder: Path, candidates: Mapping[int, int]) -> InstructionCounts:
        """Build and count the model with the best decisions so far, but for the candidates."""
        for index, kernel in enumerate(self.kernels):
            choice = kernel.task.choices[candidates.get(index, kernel.best)]
            for name in kernel.task.names:
                self.lowered.decisions[name] = (choice.template, choice.decision)
        try:
            self.target.build(self.lowered, folder)
            counts = count_instructions(folder, self.feeds, self.cpu)
        finally:  # what stands when this is left, however that happens
            for kernel in self.kernels:
                choice = kernel.task.choices[kernel.best]
                for name in kernel.task.names:
                    self.lowered.decisions[name] = (choice.template, choice.decision)
        if not candidates:
            for kernel in self.kernels:
                kernel.counts.setdefault(kernel.best, sum(counts.by_kernel.get(n, 0) for n in kernel.task.names))
        return counts

    def _rows(self, folder: Path, counts: InstructionCounts) -> tuple[Mapping[str, Any], ...]:
        """What became of each kernel; with llvm-mca, its cycles in LLVM's model of the core, and share of the peak."""
        cycles: Mapping[str, float] = {}
        peaks: dict[str, float | None] = {}
        if find_tools() is None:
            self.progress.note("no share of the core's peak: llvm-mca is not installed (`apt install llvm`)")
        else:
            model = PipelineModel(self.target.arch, self.target.llvm_cpu, self.target.features)
            cycles = model.kernel_cycles(folder / LIBRARY, counts.blocks)
            peaks = {kind: model.peak(kind) for kind in {k.task.cost.kind for k in self.kernels}}
        found = []
        for kernel in self.kernels:
            task, choice = kernel.task, kernel.task.choices[kernel.best]
            executed = sum(counts.by_kernel.get(name, 0) for name in task.names)
            modelled = sum(cycles.get(name, 0.0) for name in task.names)
            peak = peaks.get(task.cost.kind)
            share = task.calls * task.cost.macs / modelled / peak if modelled and peak else None
            found.append(
                {
                    "workload": task.names[0],
                    "template": choice.template,
                    "decision": dict(choice.decision),
                    "time_us": None,
                    "gflops": None,
                    "instructions": executed // max(task.calls, 1),
                    "model_cycles": round(modelled / task.calls) if modelled else None,
                    "calls": task.calls,
                    "trials": len(kernel.counts),
                    "from_database": task.known is not None,
                    "kind": task.cost.kind,
                    "share_of_peak": None if share is None else round(share, 3),
                }
            )
        return tuple(found)


def _sample(spec: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Numbers for an input: what is counted hardly depends on them."""
    dtype = np.dtype(spec["dtype"])
    if dtype.kind == "f":
        return rng.uniform(0.1, 1.0, spec["shape"]).astype(dtype)
    return rng.integers(0, 2, spec["shape"]).astype(dtype)
