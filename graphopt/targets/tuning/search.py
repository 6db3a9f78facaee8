"""Choose a decision for every kernel: from the database, else by building and timing candidates.

Kernels are searched in the order of the arithmetic they do in one run of the model. Each gets the first candidates of
its template's space, which is ordered by prediction; the search of a kernel ends early when candidates stop helping.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.progress import Progress
from graphopt.targets import schedules
from graphopt.targets.base import TuningReport
from graphopt.targets.schedules import Choice
from graphopt.targets.tuning.database import Database, Key, Record

if TYPE_CHECKING:
    from graphopt.targets.cpu import Cpu, LoweredModel

MOST_CANDIDATES = 12
PATIENCE = 5
"""Candidates in a row that bring less than 1 % before a kernel's search ends."""


@dataclass
class Task:
    """One kernel with a space to search, and what is known of it."""

    names: list[str]
    workload: Any
    choices: list[Choice]
    key: Key
    calls: int
    macs: int
    choice: Choice
    time_us: float | None = None
    from_database: bool = False


class Search:
    """The tuner of one model."""

    def __init__(self, lowered: LoweredModel, target: Cpu, database: Path, seed: int, progress: Progress):
        self.lowered = lowered
        self.target = target
        self.seed = seed
        self.progress = progress
        self.database = Database(database)
        if self.database.skipped:
            progress.note(f"{self.database.skipped} unreadable lines of {database} skipped")
        self.trials = 0

    def run(self, seconds: float) -> TuningReport:
        """Search for at most about `seconds`; KeyboardInterrupt is raised again with the best so far recorded."""
        begin = time.perf_counter()
        deadline = begin + seconds
        tasks = self._tasks()
        stopped = False
        try:
            waiting = [t for t in tasks if not t.from_database and len(t.choices) > 1]
            if seconds > 0 and waiting:
                with self.progress.task("tune", len(waiting)) as advance:
                    for task in waiting:
                        if time.perf_counter() >= deadline:
                            stopped = True
                            break
                        stopped |= not self._search(task, deadline)
                        advance(1)
            elif waiting:
                stopped = True
        finally:
            for task in tasks:
                for name in task.names:
                    self.lowered.decisions[name] = (task.choice.template, task.choice.decision)
        return self._report(tasks, time.perf_counter() - begin, stopped)

    def _tasks(self) -> list[Task]:
        from graphopt.targets.relax import pipeline
        from graphopt.targets.schedules.workload import Workload

        counts = pipeline.call_counts(self.lowered.module)
        found: dict[Key, Task] = {}
        for name, func in pipeline.prim_funcs(self.lowered.module).items():
            workload = Workload(func.with_attr("global_symbol", "main"), self.target.machine())
            choices = schedules.choices(workload)
            if choices[0].template == "generic":
                continue
            key = Key(workload_digest(workload.func), self.target.llvm_cpu, self.target.thread_count)
            calls = counts.get(name, 1)
            if key in found:
                found[key].names.append(name)
                found[key].calls += calls
                continue
            task = Task([name], workload, choices, key, calls, _macs(workload), choices[0])
            known = self.database.find(key)
            if known is not None and _is_current(known) and Choice(known.template, known.decision) in choices:
                task.choice = Choice(known.template, known.decision)
                task.time_us, task.from_database = known.time_us, known.complete
            found[key] = task
        return sorted(found.values(), key=lambda t: -t.macs * t.calls)

    def _search(self, task: Task, deadline: float) -> bool:
        """Try candidates; record the best. False when time ran out before the search was done."""
        from tvm.error import InternalError
        from tvm.s_tir.schedule import ScheduleError

        from graphopt.targets.tuning import measure

        arguments = measure.arguments_for(task.workload.func, self.seed)
        target = self.target.tvm_target()
        best: tuple[float, Choice] | None = None
        since, tried, done = 0, 0, True
        try:
            for choice in task.choices[:MOST_CANDIDATES]:
                if tried and time.perf_counter() >= deadline:
                    done = False
                    break
                try:
                    kernel = schedules.schedule(task.workload, choice)
                    taken = measure.Candidate(kernel.func, target).time_us(measure.repacked(arguments, kernel))
                except (InternalError, ScheduleError) as error:
                    reason = str(error).splitlines()[-1][:80]
                    self.progress.note(f"{task.names[0]}: {choice} cannot be built ({reason})")
                    continue
                finally:
                    tried += 1
                    self.trials += 1
                since = 0 if best is None or taken < 0.99 * best[0] else since + 1
                if best is None or taken < best[0]:
                    best = taken, choice
                if since >= PATIENCE:
                    break
        except KeyboardInterrupt:
            done = False
            raise
        finally:
            if best is not None:
                task.time_us, task.choice = best
                version = schedules.template_named(task.choice.template).VERSION
                record = Record(task.choice.template, version, task.choice.decision, best[0], tried, done)
                self.database.add(task.key, record)
        return done

    def _report(self, tasks: list[Task], seconds: float, stopped: bool) -> TuningReport:
        rows: list[Mapping[str, Any]] = []
        for task in tasks:
            gflops = None if not task.time_us else round(2 * task.macs / task.time_us / 1e3, 1)
            rows.append(
                {
                    "workload": task.names[0],
                    "template": task.choice.template,
                    "decision": dict(task.choice.decision),
                    "time_us": None if task.time_us is None else round(task.time_us, 2),
                    "gflops": gflops,
                    "calls": task.calls,
                }
            )
        chosen = sorted(
            (t.key.workload, t.choice.template, json.dumps(t.choice.decision, sort_keys=True)) for t in tasks
        )
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        known = sum(t.from_database for t in tasks)
        return TuningReport(len(tasks), known, self.trials, seconds, digest, tuple(rows), stopped)


def workload_digest(func) -> str:
    """sha256 of the function's text: equal for equal computations, in every process."""
    return hashlib.sha256(func.script(show_meta=False).encode()).hexdigest()


def _is_current(record: Record) -> bool:
    """False where the template is gone or has changed since."""
    return any((record.template, record.version) == (t.NAME, t.VERSION) for t in schedules.TEMPLATES)


def _macs(workload) -> int:
    from graphopt.targets.schedules.workload import work

    return max(work(block) for block in workload.blocks.values())
