"""Choose a decision for every kernel: from the database, else by building and timing candidates.

Processes build candidates on all processors while this one times those that are done (they stop for as long as a timing
lasts), or while devices do. First every kernel gets a time, of its best guess, the largest kernels first. Then each
next trial goes to the kernel where it may save most in a run of the model: the kernel's share of the time, its distance
to the roofline, and how long its last candidates brought nothing. A kernel's search ends when candidates stop helping.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import guard
from graphopt.progress import Advance, Progress
from graphopt.targets import schedules
from graphopt.targets.base import TuningReport
from graphopt.targets.tuning import database as databases
from graphopt.targets.tuning.build_pool import BuildPool
from graphopt.targets.tuning.build_worker import Built, Order
from graphopt.targets.tuning.cost_model import Roofline
from graphopt.targets.tuning.database import Database
from graphopt.targets.tuning.measure import Bench
from graphopt.targets.tuning.task import Task, unfinished
from graphopt.targets.tuning.tasks import constant_bytes, find_tasks
from graphopt.targets.tuning.timers import DeviceTimer, LocalTimer, Timer, Timing, device_timer

if TYPE_CHECKING:
    from graphopt.remote.farm import RemoteDevices
    from graphopt.targets.llvm import LlvmTarget, LoweredModel

POLL_S = 0.05
"""How long to wait for a build while devices are timing, and the other way round."""
FLUSH_S = 20.0
"""Unfinished searches are recorded this often, so that a crash loses little."""


class Search:
    """The tuner of one model.

    `fresh` searches again what the database knows. `everything` also times kernels that have no choice, so that the
    report's rows add up to a run of the model. `devices` time candidates in this machine's place.
    `hints`: by kernel, the row of a report on the same kernels of other sizes: what to try first. `pool`: workers
    that serve further searches.
    """

    def __init__(
        self,
        lowered: LoweredModel,
        target: LlvmTarget,
        database: Path,
        seed: int,
        progress: Progress,
        *,
        fresh: bool = False,
        everything: bool = False,
        devices: RemoteDevices | None = None,
        hints: Mapping[str, Mapping[str, Any]] | None = None,
        pool: BuildPool | None = None,
    ):
        self.lowered = lowered
        self.target = target
        self.progress = progress
        self.database = Database(database)
        if self.database.skipped:
            progress.note(f"{self.database.skipped} unreadable lines of {database} skipped")
        self.everything = everything
        self.trials = 0
        self.roofline = Roofline()
        self.devices = devices
        self._device = "" if devices is None else devices.device.fingerprint
        self._device_name = "" if devices is None else devices.device.name
        self.tasks = find_tasks(lowered, target, None if fresh else self.database, everything, self._device)
        for task in self.tasks:
            row = next((hints[name] for name in task.names if name in hints), None) if hints else None
            if row is not None and row["time_us"] is not None and task.known is None:
                task.suggest(schedules.Choice(row["template"], row["decision"]))
        self._pool = pool
        self._seed = seed
        self._timer: Timer | None = None
        self._recorded: dict[int, int] = {}
        self._flushed = 0.0

    def run(self, seconds: float) -> TuningReport:
        """Search for at most about `seconds`; KeyboardInterrupt is raised again with the best so far recorded."""
        begin = time.perf_counter()
        self._flushed = begin
        stopped = False
        for task in self.tasks:
            if task.known is not None:
                self.roofline.observe(task.cost, task.known.time_us, schedules.arithmetic_share(task.choice))
        waiting = self._unfinished(self.tasks)
        try:
            if seconds > 0 and waiting:
                with self.progress.task("tune", len(waiting)) as advance:
                    stopped = not self._explore(begin + seconds, advance)
            elif waiting:
                stopped = True
        finally:
            self._record_all()
            for task in self.tasks:
                for name in task.names:
                    self.lowered.decisions[name] = (task.choice.template, task.choice.decision)
        return self._report(time.perf_counter() - begin, stopped)

    def _explore(self, deadline: float, advance: Advance) -> bool:
        """Build and time candidates; False when time ran out before all searches had ended."""
        open_tasks = self._unfinished(self.tasks)
        with self._workers() as pool, contextlib.closing(self._timing(pool)) as timer:
            self._timer = timer
            while True:
                left = deadline - time.perf_counter()
                while pool.has_room and timer.has_room and left > 0 and self._submit(pool, open_tasks):
                    pass
                if not pool.in_flight and not timer.in_flight:
                    return not self._unfinished(open_tasks)
                if left <= 0 and not timer.in_flight:
                    return False
                if left > 0 and pool.in_flight:
                    result = pool.next_result(POLL_S if timer.in_flight else left)
                    if result is not None:
                        (task, position), built = result
                        self._take(timer, task, position, built)
                for timing in timer.finished(0.0 if left > 0 and pool.in_flight else POLL_S):
                    self._settle(timing)
                for done in [t for t in open_tasks if not t.pending and not self._unfinished([t])]:
                    open_tasks.remove(done)
                    self._record(done, complete=True)
                    done.run = None
                    advance(1)
                if time.perf_counter() - self._flushed > FLUSH_S:
                    self._flushed = time.perf_counter()
                    self._record_all()

    @contextlib.contextmanager
    def _workers(self) -> Iterator[BuildPool]:
        if self._pool is None:
            with BuildPool(usable_processors()) as pool:
                yield pool
            return
        yield self._pool
        self._pool.drain()

    def _timing(self, pool: BuildPool) -> Timer:
        if self.devices is not None:
            return device_timer(self.devices, self.target.thread_count, self.progress.note)
        return LocalTimer(Bench(constant_bytes(self.lowered.module), self._seed), pool, self.target.thread_count)

    def _unfinished(self, tasks: list[Task]) -> list[Task]:
        run_us = sum(t.calls * (t.time_us or 0.0) for t in self.tasks)
        return unfinished(tasks, self.roofline, run_us)

    def _submit(self, pool: BuildPool, tasks: list[Task]) -> bool:
        """Give the pool the candidate that may save most; False when none is worth a trial."""
        worthy = self._unfinished(tasks)
        if not worthy:
            return False
        task = max(worthy, key=lambda t: t.priority(self.roofline))
        position = task.next_position()
        task.pending.add(position)
        order = Order(task.plain_workload, task.choices[position], task.constants, self._compiled_for, pool.library(),
                      self.target.arch)  # fmt: skip
        pool.submit((task, position), order)
        return True

    @property
    def _compiled_for(self) -> Any:
        return self.target.tvm_target()

    def _take(self, timer: Timer, task: Task, position: int, built: Built) -> None:
        """Have what was built timed."""
        self.trials += 1
        if built.problem:
            task.fail(position)
            self.progress.note(f"{task.names[0]}: {task.choices[position]} cannot be built ({built.problem})")
        else:
            guard.at(f"timing kernel {task.names[0]} with {task.choices[position]}")
            timer.submit(task, position, built)

    def _settle(self, timing: Timing) -> None:
        """Take in a measurement."""
        task, position = timing.task, timing.position
        if timing.problem:
            task.fail(position)
            self.progress.note(f"{task.names[0]}: {task.choices[position]} cannot run ({timing.problem})")
            return
        best_us = timing.best_us
        if best_us is not None and timing.rival is not None and timing.rival != task.best:
            task.times[timing.rival], best_us = best_us, None  # another one has become the best meanwhile
        task.settle(position, timing.time_us, best_us, timing.run)
        self.roofline.observe(task.cost, task.times[task.best], schedules.arithmetic_share(task.choice))

    def _record_all(self) -> None:
        for task in self.tasks:
            if task.times and task.known is None:
                self._record(task, complete=not task.pending and not self._unfinished([task]))

    def _record(self, task: Task, complete: bool) -> None:
        """Append what is new about a task to the database."""
        if not task.times or self._recorded.get(id(task)) == len(task.tried):
            return
        self._recorded[id(task)] = len(task.tried)
        version = schedules.template_named(task.choice.template).VERSION
        self.database.add(task.key, task.record(version, databases.compiler_version(), complete, self._device_name))

    def _report(self, seconds: float, stopped: bool) -> TuningReport:
        chosen = sorted(
            (t.key.workload, t.choice.template, json.dumps(t.choice.decision, sort_keys=True)) for t in self.tasks
        )
        digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
        known = sum(t.known is not None for t in self.tasks)
        rows = tuple(_row(task) for task in self.tasks)
        farm = self._timer.farm if isinstance(self._timer, DeviceTimer) else None
        devices = {} if farm is None else dict(farm.trials)
        losses = () if farm is None else tuple(map(str, farm.losses))
        return TuningReport(len(self.tasks), known, self.trials, seconds, digest, rows, stopped, devices, losses)


def usable_processors() -> list[int]:
    """The processors this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _row(task: Task) -> Mapping[str, Any]:
    gflops = None if not task.time_us else round(2 * task.cost.macs / task.time_us / 1e3, 1)
    return {
        "workload": task.names[0],
        "template": task.choice.template,
        "decision": dict(task.choice.decision),
        "time_us": None if task.time_us is None else round(task.time_us, 2),
        "gflops": gflops,
        "calls": task.calls,
        "trials": len(task.times) + len(task.failed) if task.known is None else task.known.trials,
        "from_database": task.known is not None,
        "kind": task.cost.kind,
    }
