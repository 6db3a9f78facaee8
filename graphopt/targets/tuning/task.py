"""One kernel to search: which candidates were tried, which is next, and what another one may bring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from graphopt.targets import schedules
from graphopt.targets.schedules import Choice
from graphopt.targets.schedules.workload import Workload
from graphopt.targets.tuning.cost_model import Cost, Roofline
from graphopt.targets.tuning.database import Key, Record

PATIENCE = 8
"""Candidates in a row that bring less than `WORTH` before a kernel's search ends."""
PATIENCE_AT_BOUND = 4
WORTH = 0.01
WORTH_OF_RUN = 0.0005
"""A next candidate that may save less than this share of a run of the model is tried only for `PATIENCE_AT_BOUND`."""
_HOPE = 0.8
"""How much less a next candidate is expected to bring after one that brought nothing."""
_DISTANCE = 0.5
"""What one differing field of the decision counts, against the whole way through the ranking by prediction."""
_HOPELESS = 1.6
"""A template whose best is slower than the kernel's best by this much is left."""


@dataclass
class Task:
    """A workload of the model, all its kernels together."""

    names: list[str]
    workload: Workload
    constants: tuple[int, ...]
    choices: list[Choice]
    key: Key
    calls: int
    cost: Cost
    hints: list[int] = field(default_factory=list)
    """Positions in the space to try first: what an unfinished or a neighbouring record names."""
    times: dict[int, float] = field(default_factory=dict)
    """Microseconds by position."""
    failed: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    known: Record | None = None
    """A finished search's result."""
    prior_us: float | None = None
    """What an unfinished search had found."""
    best: int = 0
    fruitless: int = 0
    """Candidates in a row that brought less than `WORTH`."""
    run: Any = None
    """The best candidate, loaded, and its arguments: what the next one is compared with."""

    @property
    def plain_workload(self) -> Workload:
        """The workload without what was derived from it: for another process."""
        return Workload(self.workload.func, self.workload.machine)

    @property
    def choice(self) -> Choice:
        return self.choices[self.best]

    @property
    def time_us(self) -> float | None:
        """Of the best candidate; None where nothing was measured, now or before."""
        if self.best in self.times:
            return self.times[self.best]
        return self.prior_us if self.known is None else self.known.time_us

    @property
    def tried(self) -> set[int]:
        return self.failed | self.pending | set(self.times)

    def priority(self, roofline: Roofline) -> float:
        """Microseconds of a run of the model that the next candidate may save; more for a kernel without a time."""
        hope = _HOPE ** (self.fruitless + len(self.pending))
        if self.time_us is None or not self.times:
            return 1e9 * hope + self.calls * self.cost.macs * 1e-6
        bound_us = roofline.bound_us(self.cost, self._arithmetic())
        headroom = max(self.time_us - bound_us, 0.03 * self.time_us)
        return self.calls * headroom * hope

    def _arithmetic(self) -> float:
        """The share of the direct method's arithmetic that the next candidate's template needs."""
        if len(self.tried) == len(self.choices):
            return 1.0
        return schedules.arithmetic_share(self.choices[self.next_position()])

    def finished(self, roofline: Roofline, run_us: float = 0.0) -> bool:
        """True when no further candidate is worth a trial in a model whose run takes `run_us`."""
        if self.known is not None or len(self.tried) == len(self.choices):
            return True
        if self._first_guesses():
            return False
        bound_us = roofline.bound_us(self.cost, self._arithmetic())
        near = self.time_us is not None and self.time_us <= 1.04 * bound_us
        little = self.priority(roofline) < WORTH_OF_RUN * run_us
        return self.fruitless + len(self.pending) >= (PATIENCE_AT_BOUND if near or little else PATIENCE)

    def next_position(self) -> int:
        """The candidate to try next: hints, each template's first guess, then what lies near the best and early in the
        ranking of the most promising template."""
        return (self._first_guesses() or self._promising())[0]

    def _first_guesses(self) -> list[int]:
        tried = self.tried
        heads = [positions[0] for positions in self._templates().values()]
        return [p for p in (*self.hints, *heads) if p not in tried]

    def _promising(self) -> list[int]:
        tried = self.tried
        templates = {name: p for name, p in self._templates().items() if not tried.issuperset(p)}
        fastest = {name: min((self.times[p] for p in all_ if p in self.times), default=None)
                   for name, all_ in self._templates().items()}  # fmt: skip
        best = self.times.get(self.best)

        def rank(name: str) -> float:
            time = fastest[name]
            if time is None:  # nothing of it could be built yet
                return 2 * _HOPELESS
            attempts = sum(p in tried for p in templates[name])
            slower = time / best if best else 1.0
            return slower * (1 + 0.02 * attempts) + (_HOPELESS if slower > _HOPELESS else 0)

        positions = templates[min(templates, key=rank)]
        measured = [p for p in positions if p in self.times]
        centre = self.choices[min(measured, key=lambda p: self.times[p])].decision if measured else {}
        order = {p: i / len(positions) + _DISTANCE * _differing(self.choices[p].decision, centre)
                 for i, p in enumerate(positions) if p not in tried}  # fmt: skip
        return sorted(order, key=lambda p: order[p])

    def _templates(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for position, choice in enumerate(self.choices):
            found.setdefault(choice.template, []).append(position)
        return found

    def settle(self, position: int, time_us: float, best_us: float | None, run: Any) -> bool:
        """Take in a measurement, and the best one's time as measured beside it. True when it is the new best."""
        self.pending.discard(position)
        self.times[position] = time_us
        if best_us is not None:
            self.times[self.best] = best_us
        before = self.times.get(self.best) if self.run is not None else None
        gained = before is None or time_us < before
        self.fruitless = 0 if before is None or time_us < (1 - WORTH) * before else self.fruitless + 1
        if gained:
            self.best, self.run = position, run
        return gained

    def fail(self, position: int) -> None:
        """A candidate could not be built."""
        self.pending.discard(position)
        self.failed.add(position)
        self.fruitless += bool(self.times)

    def record(self, version: int, tvm: str, complete: bool, measured_on: str = "") -> Record:
        """What the database keeps. Call only when something was measured."""
        tried = () if complete else tuple(sorted(self.failed | set(self.times)))
        return Record(
            self.choice.template, version, dict(self.choice.decision), round(self.times[self.best], 3),
            len(self.failed) + len(self.times), complete, self.names[0], tried, tvm, measured_on,
        )  # fmt: skip

    def start_from(self, record: Record) -> None:
        """Try a record's decision first: what another thread count or an unfinished search found."""
        position = self.position(record)
        if position is not None:
            self.hints, self.best = [position], position

    def borrow(self, record: Record) -> None:
        """Start from a record of another thread count. The space here may not offer its decision, which is as valid,
        so it joins the choices where it has the fields that its template's decisions have."""
        wanted = Choice(record.template, dict(record.decision))
        alike = any(c.template == wanted.template and c.decision.keys() == wanted.decision.keys() for c in self.choices)
        if self.position(record) is None and alike:
            self.choices = [*self.choices, wanted]
        self.start_from(record)

    def suggest(self, choice: Choice) -> None:
        """Try what the kernel was best with at another size, or what differs from it in one field; where nothing else
        is known, it stands even if there is no time to try it. Only what this space offers: not every tile fits.
        """
        near = [(_differing(each.decision, choice.decision), position) for position, each in enumerate(self.choices)
                if each.template == choice.template]  # fmt: skip
        if not near or min(near)[0] > 1:
            return
        position = min(near)[1]
        if not self.hints:
            self.best = position
        if position not in self.hints:
            self.hints.append(position)

    def resume(self, record: Record) -> None:
        """Go on from an unfinished record of this very key: what it tried stays tried, its best is timed again."""
        self.start_from(record)
        if self.hints:
            self.prior_us = record.time_us
            self.failed.update(p for p in record.tried if p != self.best and p < len(self.choices))

    def position(self, record: Record) -> int | None:
        """Where a record's decision stands in the space; None where it is no longer offered."""
        wanted = Choice(record.template, record.decision)
        return next((p for p, choice in enumerate(self.choices) if choice == wanted), None)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(one.get(k) != other.get(k) for k in one.keys() | other.keys()) if other else 0


def unfinished(tasks: Iterable[Task], roofline: Roofline, run_us: float = 0.0) -> list[Task]:
    """The tasks that are worth more trials in a model whose run takes `run_us`."""
    return [task for task in tasks if not task.finished(roofline, run_us)]
