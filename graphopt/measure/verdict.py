"""The decision rule of the latency gate: pure arithmetic on rounds, so that its error rates can be simulated.

Each round times the base twice, in two processes, and the new model once. Against each of the two base processes
an interval of the median ratio new/base is formed by inverting the sign test; what counts is the envelope of both
intervals. Two processes of one program differ by a per cent or so for as long as they live (placement of memory),
which no number of rounds averages out: the new model is called slower only when it is slower than both.

Looking often at data that accumulate inflates false alarms. Looks are taken after 8, 12, 18, 27 ... rounds and look
k may err with probability 6 alpha / (pi k)^2; these sum to alpha over all looks, however many (Bonferroni; compare
Lan and DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 1983).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.measure.stats import Ratio, sign_interval

ALPHA = 0.05
FIRST_LOOK = 8
_GROWTH = 1.5

Round = tuple[float, float, float]
"""Seconds of the base, of the base's second process, and of the new model."""


class Verdict(str, enum.Enum):
    """What can be said of NEW against BASE."""

    FASTER = "faster"
    """By more than the bound, and significantly."""
    SAME = "same"
    """Not slower by more than the bound."""
    SLOWER = "slower"
    """By more than the bound, significantly, and again on a rerun."""
    INCONCLUSIVE = "inconclusive"
    """The interval still straddles the bound when the time is up, or two runs disagree."""


@dataclass(frozen=True)
class Judgement:
    """One run's verdict; `ratio` is new/base, `control` is base/base: what this machine shows for no difference."""

    verdict: Verdict
    ratio: Ratio
    control: Ratio
    rounds: int
    reason: str

    @property
    def noise_floor(self) -> float:
        """The difference, as a fraction, up to which the base may differ from itself in this run."""
        if not (self.control.low > 0 and math.isfinite(self.control.high)):
            return math.inf
        return max(self.control.high, 1 / self.control.low) - 1

    def to_dict(self) -> dict[str, Any]:
        floor = self.noise_floor
        return {
            "verdict": self.verdict.value,
            "ratio": self.ratio.to_dict(),
            "control": self.control.to_dict(),
            "noise_floor": floor if math.isfinite(floor) else None,
            "rounds": self.rounds,
            "reason": self.reason,
        }


def judge(rounds: Iterable[Round], max_regression: float, alpha: float = ALPHA) -> Judgement:
    """Take rounds until the verdict is clear, or there are no more: at the end of the time, one last look."""
    taken: list[Round] = []
    look, due = 1, FIRST_LOOK
    for entry in rounds:
        taken.append(entry)
        if len(taken) == due:
            judgement = look_at(np.array(taken), max_regression, spend(alpha, look))
            if judgement.verdict is not Verdict.INCONCLUSIVE:
                return judgement
            look, due = look + 1, math.ceil(due * _GROWTH)
    if not taken:
        nothing = Ratio(math.nan, -math.inf, math.inf, 0, 1 - alpha)
        return Judgement(Verdict.INCONCLUSIVE, nothing, nothing, 0, "no round was completed")
    return look_at(np.array(taken), max_regression, spend(alpha, look))


def spend(alpha: float, look: int) -> float:
    """The error probability that look number `look` (from 1) may use."""
    return alpha * 6 / (math.pi * look) ** 2


def look_at(rounds: np.ndarray, max_regression: float, alpha: float) -> Judgement:
    """The verdict on rounds (n, 3) taken together, in columns base, base again, new."""
    base, again, new = rounds.T
    against = [sign_interval(new / base, alpha), sign_interval(new / again, alpha)]
    control = sign_interval(again / base, alpha)
    ratio = Ratio(
        math.sqrt(against[0].median * against[1].median),
        min(interval.low for interval in against),
        max(interval.high for interval in against),
        len(rounds),
        1 - alpha,
    )
    verdict, reason = _classify(ratio, 1 + max_regression)
    return Judgement(verdict, ratio, control, len(rounds), reason)


def _classify(ratio: Ratio, bound: float) -> tuple[Verdict, str]:
    if not math.isfinite(ratio.high):
        return Verdict.INCONCLUSIVE, f"{ratio.rounds} rounds are too few to tell anything: allow more seconds"
    if ratio.low > bound:
        return Verdict.SLOWER, f"the whole interval lies above the bound {bound:.3f}x"
    if ratio.high > bound:
        return (
            Verdict.INCONCLUSIVE,
            f"the interval straddles the bound {bound:.3f}x: allow more seconds or a wider bound",
        )
    if ratio.median >= 1 / bound:
        return Verdict.SAME, f"the whole interval lies below the bound {bound:.3f}x"
    if ratio.high < 1:
        return Verdict.FASTER, f"faster by more than the bound ({1 / bound:.3f}x), and significantly"
    return Verdict.INCONCLUSIVE, "not slower; whether it is faster is not significant yet: allow more seconds"


def confirmed(first: Judgement, rerun: Callable[[], Judgement] | None) -> tuple[Verdict, str, Judgement | None]:
    """Before calling it slower, measure again from the start. `rerun` None: there is no time left to."""
    if first.verdict is not Verdict.SLOWER:
        return first.verdict, first.reason, None
    if rerun is None:
        return Verdict.INCONCLUSIVE, "slower, but no time is left to confirm it: allow more seconds", None
    second = rerun()
    if second.verdict is Verdict.SLOWER:
        return Verdict.SLOWER, f"{second.reason}, in two runs", second
    return Verdict.INCONCLUSIVE, f"slower in the first run, {second.verdict.value} in the second", second
