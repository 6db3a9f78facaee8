"""Paired, interleaved timing: contenders take turns in random order, ratios are taken round by round.

A machine that speeds up or slows down between rounds moves both sides of a ratio alike. The random order makes
the sign of each round's difference a fair coin when two contenders are equally fast, whatever the noise: what
the tests of significance rest on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from graphopt.errors import DataError, MeasurementError
from graphopt.measure.contenders import Contender, check_names
from graphopt.measure.environment import Environment, environment
from graphopt.measure.lineup import Lineup
from graphopt.measure.stats import LatencyStats, Ratio, bootstrap_ratio
from graphopt.progress import SILENT, Progress

SCHEMA = 1
KIND = "graphopt.latency"
MIN_ROUNDS = 5
TIMEOUT_S = 120.0

Burst = tuple[float, ...]


@dataclass(frozen=True)
class PairedResult:
    """Raw samples in seconds by contender: `bursts[name][round]` is what it took in its turn of that round."""

    bursts: Mapping[str, tuple[Burst, ...]]
    threads: int
    seed: int
    environment: Environment
    failed: Mapping[str, str] = field(default_factory=dict)
    """Contenders that are not among `bursts`, and why."""
    sessions: tuple[int, ...] = ()
    """Rounds of each session of fresh processes, in order; () where there was one."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the reference kernels on this machine then, by name; empty where they were not timed."""

    @property
    def names(self) -> tuple[str, ...]:
        """Contenders that ran, in the order they were given."""
        return tuple(self.bursts)

    @property
    def rounds(self) -> int:
        return min(len(turns) for turns in self.bursts.values())

    @cached_property
    def stats(self) -> dict[str, LatencyStats]:
        return {name: LatencyStats.of_bursts(turns) for name, turns in self.bursts.items()}

    def medians_s(self, name: str) -> np.ndarray:
        """The median of each round's burst, shape (rounds,). Raises MeasurementError if `name` did not run."""
        if name not in self.bursts:
            raise MeasurementError(f"no figures for {name!r}: {self.failed.get(name, 'it was not in the race')}")
        return np.array([np.median(burst) for burst in self.bursts[name]])

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Latency of one over latency of the other, paired by round: above 1 the `denominator` is faster."""
        return bootstrap_ratio(self.medians_s(numerator) / self.medians_s(denominator), self.seed)

    def session_ratios(self, numerator: str, denominator: str) -> tuple[Ratio, ...]:
        """`ratio`, session by session: where they differ, latency depends on the values fed or on the process."""
        ratios = self.medians_s(numerator) / self.medians_s(denominator)
        ends = np.cumsum(self.sessions or (self.rounds,))
        return tuple(bootstrap_ratio(part, self.seed) for part in np.split(ratios, ends[:-1]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "threads": self.threads,
            "seed": self.seed,
            "rounds": self.rounds,
            "sessions": list(self.sessions),
            "environment": self.environment.to_dict(),
            "contenders": {name: stats.to_dict() for name, stats in self.stats.items()},
            "failed": dict(self.failed),
            "reference_s": dict(self.reference),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PairedResult:
        """What `to_dict` gave. Raises DataError when it is something else."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise DataError("these are not saved latencies", hint="`graphopt bench -o` writes them")
        if data.get("schema") != SCHEMA:
            raise DataError(f"saved latencies have schema {data.get('schema')}, this version reads {SCHEMA}")
        try:
            bursts = {
                str(name): tuple(_split(LatencyStats.from_dict(entry))) for name, entry in data["contenders"].items()
            }
            conditions = Environment.from_dict(data["environment"])
            sessions = tuple(int(n) for n in data.get("sessions", ()))
            reference = {str(name): float(seconds) for name, seconds in data.get("reference_s", {}).items()}
            if not all(0 < seconds < math.inf for seconds in reference.values()):
                raise ValueError("times of reference kernels must be positive")
            failed = dict(data["failed"])
            result = cls(bursts, int(data["threads"]), int(data["seed"]), conditions, failed, sessions, reference)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"saved latencies are damaged: {type(error).__name__}: {error}") from error
        if len({len(turns) for turns in bursts.values()}) != 1:
            raise DataError("saved latencies are damaged: contenders have different numbers of rounds")
        return result


def race(
    contenders: Sequence[Contender],
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    seconds: float | None = None,
    rounds: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    timeout_s: float = TIMEOUT_S,
) -> PairedResult:
    """Time contenders against each other, each in a process of its own with `threads` threads.

    A turn is one run that is not counted, then runs for 60 ms and three at least. Give `rounds`, or `seconds` of
    turns (default 20; opening and warming up come on top, and at least 5 rounds are run). A contender that does
    not start, crashes, or leaves a request unanswered for `timeout_s` is left out and named in `failed`.

    Raises MeasurementError when none is left.
    """
    check_names(contenders)
    if rounds is None:
        seconds = 20.0 if seconds is None else seconds
    elif rounds < 1:
        raise MeasurementError(f"rounds must be at least 1, not {rounds}")
    with Lineup(contenders, feeds, threads=threads, timeout_s=timeout_s) as lineup:
        bursts = take_turns(lineup, seconds, rounds, seed, progress)
        if not bursts:
            raise MeasurementError("; ".join(lineup.failed.values()))
        return PairedResult(bursts, threads, seed, environment(threads), dict(lineup.failed))


class Racing(Protocol):
    """Whoever can take a turn."""

    def burst(self) -> Burst:
        """Latencies in seconds of one turn. Raises MeasurementError."""
        ...


class Field(Protocol):
    """Contenders that are open and warm, wherever they run."""

    @property
    def racers(self) -> Mapping[str, Racing]: ...

    def drop(self, name: str, error: MeasurementError) -> None:
        """Leave one out from here on."""
        ...


def take_turns(
    field: Field, seconds: float | None, rounds: int | None, seed: int, progress: Progress
) -> dict[str, tuple[Burst, ...]]:
    """Rounds for about `seconds`, at least MIN_ROUNDS, or so many `rounds`: the bursts of all that are left then."""
    names = list(field.racers)
    taken: dict[str, list[Burst]] = {name: [] for name in names}
    label = f"measuring {len(names)} contenders" if len(names) != 1 else f"measuring {names[0]}"
    total = float(rounds) if rounds is not None else float(seconds or 0)
    with progress.task(label, total) as advance:
        start, told = time.monotonic(), 0.0
        for done, turn in enumerate(turns(field, seed), start=1):
            for name, burst in turn.items():
                taken[name].append(burst)
            elapsed = time.monotonic() - start
            reached = min(float(done) if rounds is not None else elapsed, total)
            advance(reached - told)
            told = reached
            if done == rounds or (seconds is not None and done >= MIN_ROUNDS and elapsed >= seconds):
                break
    return {name: tuple(taken[name]) for name in names if name in field.racers}


def race_afresh(
    contenders: Sequence[Contender],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    threads: int = 1,
    seconds: float,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PairedResult:
    """`race` once for each of `feeds`, with new processes each, `seconds` in all: one result of all rounds.

    Where its memory happens to lie can make a process a few per cent faster or slower than another of the same
    program for as long as it lives: new processes draw anew. And some kernels branch on the values they are fed.
    A contender that failed once is left out.
    """
    runs = [
        race(contenders, each, threads=threads, seconds=seconds / len(feeds), seed=seed + number, progress=progress)
        for number, each in enumerate(feeds)
    ]
    return join_sessions(runs)


def join_sessions(runs: Sequence[PairedResult]) -> PairedResult:
    """One result of all rounds; a contender that failed once is left out. Raises MeasurementError when none is left."""
    failed = {name: why for run in runs for name, why in run.failed.items()}
    bursts = {
        name: tuple(burst for run in runs for burst in run.bursts[name]) for name in runs[0].names if name not in failed
    }
    if not bursts:
        raise MeasurementError("; ".join(failed.values()))
    first = runs[0]
    return PairedResult(bursts, first.threads, first.seed, first.environment, failed, tuple(run.rounds for run in runs))


def turns(lineup: Field, seed: int) -> Iterator[dict[str, Burst]]:
    """Rounds without end: a burst of every contender, in a new random order each; none when all have failed."""
    shuffle = random.Random(seed)
    while lineup.racers:
        order = list(lineup.racers)
        shuffle.shuffle(order)
        taken: dict[str, Burst] = {}
        for name in order:
            try:
                taken[name] = lineup.racers[name].burst()
            except MeasurementError as error:
                lineup.drop(name, error)
        yield taken


def _split(stats: LatencyStats) -> Iterator[Burst]:
    first = 0
    for length in stats.bursts:
        yield stats.samples_s[first : first + length]
        first += length
