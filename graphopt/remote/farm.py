"""Trials on all devices of a key, or on one server: a device that dies loses one trial, which another one repeats.

A trial is a session of its own, from the tracker: whichever device is free takes it, and the server ends it when its
time is over. A server that does not even do that (it hangs, or the network is cut) is left alone after some grace.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import DeviceError, GraphoptError, SpecError, TargetError
from graphopt.remote.address import Address
from graphopt.remote.device import Device
from graphopt.remote.session import WAIT_S, Session, connected
from graphopt.remote.tracker import Tracker

ATTEMPTS = 3
"""Devices that one trial may lose before it counts as its own fault."""
GRACE_S = 10.0
"""Beyond its time, before a trial is given up from this side."""
PAUSE_S = 1.0
"""After a loss, so that a server can start its next session and the tracker can notice a death."""
RETURN_S = 30.0
"""How long nobody may be reachable: a device that was lost may be starting again."""

Job = Callable[[Session], Any]


@dataclass(frozen=True)
class RemoteDevices:
    """Devices of one kind behind an address, of which one was asked what it is."""

    address: Address
    device: Device


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: the job's result, or a problem in one line. `where`: the server that told, empty where the
    trial lost every one. `unreached`: nobody was there to be asked."""

    value: Any
    problem: str
    where: str
    attempts: int
    unreached: bool = False


@dataclass(frozen=True)
class Loss:
    """A device that was lost in a trial."""

    where: str
    why: str
    after_s: float
    """Since the farm began."""

    def __str__(self) -> str:
        return f"{self.where}: {self.why}, {self.after_s:.0f} s after the beginning"


@dataclass(eq=False)
class _Trial:
    tag: Any
    job: Job
    attempts: int = 0
    where: str = ""
    since: float = 0.0
    """When its present attempt began; 0 while it waits."""
    generation: int = 0
    """Raised when an attempt is given up: what it then says comes too late."""


@dataclass
class Farm:
    """A context. `limit_s`: the time of one trial. `on_loss` is called for each device that is lost.

    Raises DeviceError where no tracker or server answers, SpecError for a wrong key.
    """

    address: Address
    limit_s: float
    on_loss: Callable[[Loss], None] = lambda loss: None
    losses: list[Loss] = field(default_factory=list, init=False)
    trials: Counter[str] = field(default_factory=Counter, init=False)
    """By server, how many trials it finished."""

    def __post_init__(self) -> None:
        self.devices = 1
        if self.address.tracker:
            with Tracker(self.address.host, self.address.port) as tracker:
                self.devices = len(tracker.of_key(self.address.key).devices)
        self._began = time.monotonic()
        self._waiting: queue.Queue[_Trial | None] = queue.Queue()
        self._done: queue.Queue[tuple[_Trial, Outcome]] = queue.Queue()
        self._open: list[_Trial] = []
        self._lock = threading.Lock()
        for _ in range(self.devices):
            self._hire()

    @property
    def in_flight(self) -> int:
        return len(self._open)

    @property
    def has_room(self) -> bool:
        """Whether a device waits for work, or soon will."""
        return len(self._open) < self.devices + 1

    def submit(self, tag: Any, job: Job) -> None:
        """`job` is called with a session on some device; `tag` comes back with its outcome."""
        trial = _Trial(tag, job)
        self._open.append(trial)
        self._waiting.put(trial)

    def next_outcome(self, timeout_s: float) -> tuple[Any, Outcome] | None:
        """Wait for any; None when time passes first or nothing is in flight."""
        end = time.monotonic() + timeout_s
        while self._open:
            self._give_up_overdue()
            try:
                trial, outcome = self._done.get(timeout=max(min(end - time.monotonic(), 0.5), 0.001))
            except queue.Empty:
                if time.monotonic() >= end:
                    return None
                continue
            self._open.remove(trial)
            self.trials[outcome.where] += bool(outcome.where)
            return trial.tag, outcome
        return None

    def close(self) -> None:
        """Let the workers end; one that hangs in a session ends with the process."""
        for _ in range(self.devices):
            self._waiting.put(None)

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hire(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="device").start()

    def _work(self) -> None:
        while (trial := self._waiting.get()) is not None:
            generation = trial.generation
            outcome = self._attempt(trial, generation)
            with self._lock:
                late = trial.generation != generation
                if outcome is not None and not late:
                    trial.generation += 1
                    self._done.put((trial, outcome))
            if late:
                return  # another worker has taken this one's place

    def _attempt(self, trial: _Trial, generation: int) -> Outcome | None:
        """The outcome, or None where this attempt was given up meanwhile."""
        unreached_since = None
        while trial.generation == generation:
            trial.since, trial.where = time.monotonic(), ""
            try:
                with connected(self.address, limit_s=self.limit_s, wait_s=WAIT_S) as session:
                    trial.attempts += 1
                    trial.since, trial.where, unreached_since = time.monotonic(), session.where, None
                    return Outcome(trial.job(session), "", session.where, trial.attempts)
            except (DeviceError, SpecError) as error:
                if trial.generation != generation:
                    return None
                if trial.where and time.monotonic() - trial.since >= 0.95 * self.limit_s:
                    return Outcome(None, f"not done within {self.limit_s:.0f} s", trial.where, trial.attempts)
                if trial.where:
                    self._lose(trial, error)
                    if trial.attempts >= ATTEMPTS:
                        problem = f"{trial.attempts} devices were lost in it, at last: {error.what}"
                        return Outcome(None, problem, "", trial.attempts)
                else:
                    unreached_since = unreached_since or time.monotonic()
                    if time.monotonic() - unreached_since > RETURN_S:
                        return Outcome(None, error.what, "", trial.attempts, unreached=True)
                time.sleep(PAUSE_S)
            except TargetError as error:
                return Outcome(None, error.what, trial.where, trial.attempts)
        return None

    def _lose(self, trial: _Trial, error: GraphoptError) -> None:
        where = trial.where or str(self.address)
        loss = Loss(where, error.what.removeprefix(where).strip(), time.monotonic() - self._began)
        self.losses.append(loss)
        self.on_loss(loss)

    def _give_up_overdue(self) -> None:
        """Trials whose server neither answers nor ends them go to another worker."""
        now = time.monotonic()
        for trial in self._open:
            limit = (self.limit_s if trial.where else WAIT_S) + GRACE_S
            with self._lock:
                if not trial.since or now - trial.since < limit:
                    continue
                trial.generation += 1
                trial.since = 0.0
            self._lose(trial, DeviceError(f"no answer within {limit:.0f} s"))
            self._hire()
            if trial.attempts < ATTEMPTS:
                self._waiting.put(trial)
            else:
                self._done.put((trial, Outcome(None, f"no answer in {trial.attempts} attempts", "", trial.attempts)))
