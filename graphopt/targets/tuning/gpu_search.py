"""Choose GPU kernels by measuring them, on this machine's GPU or on devices over RPC; where there is none, by rule and
from what was measured.

The candidates of a kernel are the few that the templates' rules put first, compiled together here wherever they are
timed (`gpu_timing.py`). Records are kept in the schedule database under the architecture and the number of
multiprocessors, so that a machine without a GPU builds with what another one measured.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import DeviceError, TargetError
from graphopt.progress import Advance, Progress
from graphopt.remote.farm import Farm, RemoteDevices
from graphopt.runtime import gpu
from graphopt.targets.base import TuningReport
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import cuda
from graphopt.targets.schedules.cuda import GpuWorkload
from graphopt.targets.schedules.cuda.products import product_of
from graphopt.targets.tuning.database import Database, Key, Record, compiler_version
from graphopt.targets.tuning.gpu_timing import LIMIT_S, compile_candidates
from graphopt.targets.tuning.signature import workload_digest

if TYPE_CHECKING:
    from graphopt.targets.cuda import Cuda
    from graphopt.targets.llvm import LoweredModel

CANDIDATES = 8
"""Of a kernel that are measured."""
POLL_S = 0.2
"""How long to wait for devices before looking at the clock."""


@dataclass
class Task:
    """Kernels that are the same computation."""

    key: Key
    workload: GpuWorkload
    choices: list[cuda.Choice]
    names: list[str] = field(default_factory=list)
    calls: int = 0
    record: Record | None = None
    from_database: bool = False
    trials: int = 0

    @property
    def choice(self) -> cuda.Choice:
        if self.record is None:
            return self.choices[0]
        return cuda.Choice(self.record.template, dict(self.record.decision))

    @property
    def macs(self) -> int:
        """Multiply-adds of all calls in a run, of products; others count nothing."""
        product = product_of(self.workload)
        return 0 if product is None else product.rows * product.columns * product.depth * self.calls


class GpuSearch:
    """Tasks of a lowered model, and the search over them. `devices` time candidates in this machine's place."""

    def __init__(
        self,
        lowered: LoweredModel,
        target: Cuda,
        database: Path,
        progress: Progress,
        fresh: bool,
        devices: RemoteDevices | None = None,
    ):
        self.lowered, self.target, self.progress, self.devices = lowered, target, progress, devices
        self.database = Database(database)
        self.tasks = self._tasks(fresh)
        self._farm: Farm | None = None

    def _tasks(self, fresh: bool) -> list[Task]:
        calls = pipeline.call_counts(self.lowered.module)
        found: dict[str, Task] = {}
        for name, workload in self.target.workloads(self.lowered).items():
            digest = workload_digest(workload, without=self.target.switched_off)
            if digest not in found:
                key = Key(digest, self.target.gpu_arch, workload.gpu.multiprocessors)
                task = Task(key, workload, cuda.choices(workload))
                known = None if fresh else self.database.find(key)
                if known is not None and known.version == cuda.version_of(known.template):
                    task.record, task.from_database = known, True
                found[digest] = task
            found[digest].names.append(name)
            found[digest].calls += calls.get(name, 0)
        return list(found.values())

    def run(self, seconds: float) -> TuningReport:
        """Measure for about `seconds`, the largest products first; 0: what rules and records say.

        Raises TargetError where something is to be measured and this machine's GPU is not of the architecture,
        DeviceError where no device is left. KeyboardInterrupt keeps what was measured.
        """
        begun = time.perf_counter()
        waiting = [task for task in self.tasks if task.record is None and len(task.choices) > 1]
        waiting.sort(key=lambda task: -task.macs)
        stopped = False
        try:
            if seconds > 0 and waiting:
                with self.progress.task("tune", len(waiting)) as advance:
                    measure = self._measure_here if self.devices is None else self._measure_there
                    stopped = measure(waiting, begun + seconds, advance)
        finally:
            for task in self.tasks:
                for name in task.names:
                    self.lowered.decisions[name] = task.choice.template, dict(task.choice.decision)
        return self._report(time.perf_counter() - begun, stopped)

    def _require_gpu(self) -> None:
        lacking = gpu.missing()
        if lacking is None and gpu.architecture() != self.target.gpu_arch:
            lacking = f"this machine's GPU is {gpu.architecture()}"
        if lacking is not None:
            raise TargetError(f"{self.target} cannot be tuned here: {lacking}", hint="tune there, or for 0 seconds")

    def _measure_here(self, waiting: list[Task], deadline: float, advance: Advance) -> bool:
        """Whether time ran out."""
        self._require_gpu()
        for task in waiting:
            if time.perf_counter() > deadline:
                return True
            with tempfile.TemporaryDirectory(prefix="graphopt-tune-") as folder:
                compiled = compile_candidates(task.workload, task.choices[:CANDIDATES], self.target, Path(folder))
                self._take(task, compiled.time_here())
            advance(1)
        return False

    def _measure_there(self, waiting: list[Task], deadline: float, advance: Advance) -> bool:
        """Whether time ran out. Kernels are compiled here while devices are timing others."""
        assert self.devices is not None
        left = list(waiting)
        with (
            tempfile.TemporaryDirectory(prefix="graphopt-tune-") as folder,
            Farm(self.devices.address, LIMIT_S, lambda loss: self.progress.note(f"lost {loss}; its trial is repeated"))
            as self._farm,
        ):  # fmt: skip
            while self._farm.in_flight or (left and time.perf_counter() < deadline):
                while left and self._farm.has_room and time.perf_counter() < deadline:
                    task = left.pop(0)
                    own = Path(folder) / str(len(left))
                    own.mkdir()
                    compiled = compile_candidates(task.workload, task.choices[:CANDIDATES], self.target, own)
                    self._farm.submit(task, compiled.time_there)
                found = self._farm.next_outcome(POLL_S)
                if found is None:
                    continue
                task, outcome = found
                if outcome.unreached:
                    raise DeviceError(f"no device is left to time candidates: {outcome.problem}")
                if outcome.problem:
                    self.progress.note(f"{task.names[0]} cannot be timed ({outcome.problem})")
                else:
                    self._take(task, outcome.value)
                advance(1)
        return bool(left)

    def _take(self, task: Task, times: list[float | str]) -> None:
        """Keep the fastest."""
        task.trials = len(times)
        for choice, problem in ((c, t) for c, t in zip(task.choices, times, strict=False) if isinstance(t, str)):
            self.progress.note(f"{task.names[0]}: {choice} cannot run ({problem})")
        timed = [(t, i) for i, t in enumerate(times) if isinstance(t, float)]
        if not timed:
            return
        best_us, best = min(timed)
        choice = task.choices[best]
        task.record = Record(
            choice.template, cuda.version_of(choice.template) or 0, dict(choice.decision), best_us, len(timed), True,
            task.names[0], tvm=compiler_version(),
        )  # fmt: skip
        self.database.add(task.key, task.record)

    def _report(self, seconds: float, stopped: bool) -> TuningReport:
        rows, chosen = [], []
        for task in self.tasks:
            time_us = None if task.record is None else task.record.time_us
            rows.append(
                {"workload": task.names[0], "template": task.choice.template, "decision": dict(task.choice.decision),
                 "time_us": time_us, "gflops": None if not time_us else 2 * task.macs / task.calls / time_us / 1e3,
                 "calls": task.calls, "trials": task.trials, "from_database": task.from_database, "kind": "",
                 "share_of_peak": None}
            )  # fmt: skip
            chosen.append((task.key.workload, task.choice.template, json.dumps(task.choice.decision, sort_keys=True)))
        digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()
        known = sum(task.from_database for task in self.tasks)
        trials = sum(task.trials for task in self.tasks)
        devices = {} if self._farm is None else dict(self._farm.trials)
        losses = () if self._farm is None else tuple(map(str, self._farm.losses))
        return TuningReport(len(self.tasks), known, trials, seconds, digest, tuple(rows), stopped, devices, losses)
