"""The latency gate: is NEW slower than BASE by more than a bound? It answers only when it can tell."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.errors import EXIT_DONE, EXIT_INCONCLUSIVE, EXIT_REGRESSION, MeasurementError
from graphopt.measure.contenders import Contender
from graphopt.measure.environment import environment
from graphopt.measure.lineup import Lineup
from graphopt.measure.paired import TIMEOUT_S, Burst, PairedResult, turns
from graphopt.measure.stats import Ratio
from graphopt.measure.verdict import Judgement, Round, Verdict, confirmed, judge
from graphopt.progress import SILENT, Progress

SCHEMA = 1
FIRST_SHARE = 0.6
"""Share of the time after which a run that finds NEW slower could no longer be confirmed."""
BASE, AGAIN, NEW = "base", "base again", "new"


@dataclass(frozen=True)
class Comparison:
    """The verdict and all it rests on. `runs` are raw: names `base`, `base again` and `new`."""

    verdict: Verdict
    reason: str
    base: str
    new: str
    max_regression: float
    ratio: Ratio
    """Latency of new over base: above 1 is slower."""
    noise_floor: float | None
    """How far, as a fraction, the base may differ from itself here; None when unknown (saved latencies)."""
    judgements: tuple[Judgement, ...]
    runs: tuple[PairedResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return {Verdict.SLOWER: EXIT_REGRESSION, Verdict.INCONCLUSIVE: EXIT_INCONCLUSIVE}.get(self.verdict, EXIT_DONE)

    def describe(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.verdict.value.upper()}: {self.new} takes {self.ratio} the time of {self.base} "
            f"({self.ratio.rounds} rounds, bound {1 + self.max_regression:.3f}x)",
            f"  {self.reason}",
        ]
        if self.noise_floor is not None:
            known = math.isfinite(self.noise_floor)
            floor = f"{100 * self.noise_floor:.1f} %" if known else "unknown, too few rounds"
            lines.append(f"  the base measured against itself in the same run: differences up to {floor}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "graphopt.comparison",
            "verdict": self.verdict.value,
            "reason": self.reason,
            "base": self.base,
            "new": self.new,
            "max_regression": self.max_regression,
            "ratio": self.ratio.to_dict(),
            "noise_floor": self.noise_floor if self.noise_floor is None or math.isfinite(self.noise_floor) else None,
            "judgements": [judgement.to_dict() for judgement in self.judgements],
            "runs": [run.to_dict() for run in self.runs],
            "notes": list(self.notes),
        }


def compare(
    base: Contender,
    new: Contender,
    feeds: Mapping[str, np.ndarray],
    *,
    max_regression: float = 0.05,
    threads: int = 1,
    seconds: float = 60.0,
    seed: int = 0,
    progress: Progress = SILENT,
    timeout_s: float = TIMEOUT_S,
) -> Comparison:
    """Judge NEW against BASE on the same inputs; stops as soon as the verdict is clear.

    `max_regression` is a fraction: 0.05 allows 5 % more time. `seconds` caps the turns of both runs together;
    opening and warming up come on top. `graphopt.measure.verdict` has the rule.

    Raises MeasurementError when a contender does not start or crashes.
    """
    check_bound(max_regression)
    runs: list[PairedResult] = []
    spent = 0.0

    def measure(number: int, cap: float) -> Judgement:
        nonlocal spent
        label = "comparing" if number == 0 else "comparing again, to confirm"
        judgement, run, took = _one_run(
            base, new, feeds, max_regression, threads, cap, seed + number, progress, timeout_s, label
        )
        runs.append(run)
        spent += took
        return judgement

    first = measure(0, seconds)
    rerun = (lambda: measure(1, seconds - spent)) if spent <= FIRST_SHARE * seconds else None
    verdict, reason, second = confirmed(first, rerun)
    judgements = (first,) if second is None else (first, second)
    last = judgements[-1]
    return Comparison(
        verdict, reason, base.name, new.name, max_regression, last.ratio, last.noise_floor, judgements, tuple(runs)
    )


def _one_run(
    base: Contender,
    new: Contender,
    feeds: Mapping[str, np.ndarray],
    max_regression: float,
    threads: int,
    seconds: float,
    seed: int,
    progress: Progress,
    timeout_s: float,
    label: str,
) -> tuple[Judgement, PairedResult, float]:
    """Fresh processes, rounds until clear or for `seconds`; also returns the seconds that the rounds took."""
    lanes = [replace(base, name=BASE), replace(base, name=AGAIN), replace(new, name=NEW)]
    taken: dict[str, list[Burst]] = {lane.name: [] for lane in lanes}
    with (
        Lineup(lanes, feeds, threads=threads, timeout_s=timeout_s) as lineup,
        progress.task(label, seconds) as advance,
    ):

        def rounds() -> Iterator[Round]:
            _all_alive(lineup, base, new)
            start, told = time.monotonic(), 0.0
            for turn in turns(lineup, seed):
                _all_alive(lineup, base, new)
                for name, burst in turn.items():
                    taken[name].append(burst)
                yield tuple(float(np.median(turn[lane])) for lane in (BASE, AGAIN, NEW))  # type: ignore[misc]
                elapsed = time.monotonic() - start
                advance(min(elapsed, seconds) - told)
                told = min(elapsed, seconds)
                if elapsed >= seconds:
                    return

        begin = time.monotonic()
        judgement = judge(rounds(), max_regression)
        took = time.monotonic() - begin
    bursts = {name: tuple(turn) for name, turn in taken.items()}
    return judgement, PairedResult(bursts, threads, seed, environment(threads)), took


def _all_alive(lineup: Lineup, base: Contender, new: Contender) -> None:
    for lane, why in lineup.failed.items():
        raise MeasurementError(f"{(new if lane == NEW else base).path}: {why}")


def check_bound(max_regression: float) -> None:
    """Raises MeasurementError for what is no fraction."""
    if not (math.isfinite(max_regression) and max_regression >= 0):
        raise MeasurementError(f"max_regression must be a fraction of 0 or more, not {max_regression}")
