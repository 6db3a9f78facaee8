"""Who times candidates that were built: this machine, which stops building for as long, or devices, which do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graphopt.errors import DeviceError
from graphopt.remote.farm import Farm, Loss, RemoteDevices
from graphopt.remote.session import Session
from graphopt.runtime.tvm_engine import last_line, set_threads
from graphopt.targets.tuning.build_pool import BuildPool
from graphopt.targets.tuning.build_worker import Built
from graphopt.targets.tuning.device_timing import LIMIT_S, DeviceKernel, timed
from graphopt.targets.tuning.measure import Bench
from graphopt.targets.tuning.task import Task

CLOSE = 1.06
"""A candidate within this factor of the best is timed again, in turns with the best."""


@dataclass(frozen=True)
class Timing:
    """What came of a candidate: its time and, where both were timed in turns, the best one's; or a problem."""

    task: Task
    position: int
    time_us: float = 0.0
    best_us: float | None = None
    rival: int | None = None
    """The position of the best one then."""
    run: Any = None
    """What the next close candidate is timed against."""
    problem: str = ""


class Timer(Protocol):
    """Times candidates of one search."""

    @property
    def in_flight(self) -> int:
        """Candidates that are being timed."""
        ...

    @property
    def has_room(self) -> bool: ...

    def submit(self, task: Task, position: int, built: Built) -> None: ...

    def finished(self, timeout_s: float) -> Iterator[Timing]:
        """Those that are done; where none is yet, wait for one so long. Raises DeviceError when no device is left."""
        ...

    def close(self) -> None: ...


class LocalTimer:
    """This machine: one candidate at a time, while the pool is quiet."""

    in_flight = 0
    has_room = True

    def __init__(self, bench: Bench, pool: BuildPool, threads: int):
        self._bench, self._pool, self._threads = bench, pool, threads
        self._done: list[Timing] = []
        set_threads(threads)

    def submit(self, task: Task, position: int, built: Built) -> None:
        with self._pool.quiet(self._threads):
            self._done.append(self._time(task, position, built))

    def finished(self, timeout_s: float) -> Iterator[Timing]:
        done, self._done = self._done, []
        yield from done

    def close(self) -> None: ...

    def _time(self, task: Task, position: int, built: Built) -> Timing:
        try:
            run = _load(built.library)["main"], self._bench.arguments(built.parameters)
            time_us, best_us = self._bench.time_us(*run), None
            if task.run is not None and time_us < CLOSE * (task.time_us or 0.0):
                best_us, time_us = self._bench.duel(task.run, run)
        except (RuntimeError, ValueError, TypeError) as error:  # what a kernel's own checks raise
            return Timing(task, position, problem=last_line(error))
        return Timing(task, position, time_us, best_us, task.best, run)


class DeviceTimer:
    """All devices of a key, each candidate on whichever is free; close ones are timed beside the best on one device."""

    def __init__(self, farm: Farm, threads: int):
        self.farm = farm
        self._threads = threads

    @property
    def in_flight(self) -> int:
        return self.farm.in_flight

    @property
    def has_room(self) -> bool:
        return self.farm.has_room

    def submit(self, task: Task, position: int, built: Built) -> None:
        kernel = DeviceKernel(Path(built.library), built.parameters, self._threads)
        rival, rival_us, best = task.run, task.time_us, task.best

        def job(session: Session) -> tuple[float, float | None]:
            return timed(session, kernel, rival, CLOSE, rival_us)

        self.farm.submit((task, position, best, kernel), job)

    def finished(self, timeout_s: float) -> Iterator[Timing]:
        found = self.farm.next_outcome(timeout_s)
        while found is not None:
            (task, position, best, kernel), outcome = found
            if outcome.unreached:
                raise DeviceError(f"no device is left to time candidates: {outcome.problem}")
            if outcome.problem:
                yield Timing(task, position, problem=outcome.problem)
            else:
                time_us, best_us = outcome.value
                yield Timing(task, position, time_us, best_us, best, kernel)
            found = self.farm.next_outcome(0.0)

    def close(self) -> None:
        self.farm.close()


def device_timer(devices: RemoteDevices, threads: int, note: Any) -> DeviceTimer:
    """Raises DeviceError where nobody answers."""

    def told(loss: Loss) -> None:
        note(f"lost {loss}; its trial is repeated")

    return DeviceTimer(Farm(devices.address, LIMIT_S, told), threads)


def _load(library: str) -> Any:
    import tvm

    module = tvm.runtime.load_module(library)
    with contextlib.suppress(OSError):
        os.unlink(library)  # it stays mapped
    return module
