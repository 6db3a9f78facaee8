"""Error rates of the latency gate on simulated machines: pure numpy, the very code that judges real rounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from graphopt.measure.verdict import ALPHA, Judgement, Round, Verdict, confirmed, judge, spend

BOUND = 0.05


class Machine:
    """Rounds as a noisy machine gives them, all in logarithms of seconds.

    `jitter`: skewed noise of each burst. `drift`: a random walk that the whole machine takes from burst to burst.
    `hits`: probability that a competing load slows a burst by up to a half. `placement`: spread of the constant
    difference between processes of one program, drawn anew for each run.
    """

    def __init__(self, seed: int, ratio: float, jitter=0.02, drift=0.01, hits=0.1, placement=0.005) -> None:
        self.rng = np.random.default_rng(seed)
        self.ratio, self.jitter, self.drift, self.hits, self.placement = ratio, jitter, drift, hits, placement

    def run(self, count: int = 100) -> Iterator[Round]:
        rng = self.rng
        places = rng.normal(0, self.placement, 3) + np.log([1, 1, self.ratio])
        order = np.argsort(rng.random((count, 3)), axis=1)
        walk = np.cumsum(rng.normal(0, self.drift, 3 * count)).reshape(count, 3)
        noise = self.jitter * rng.exponential(size=(count, 3))
        noise += (rng.random((count, 3)) < self.hits) * rng.uniform(0, 0.4, (count, 3))
        walk = np.take_along_axis(walk, order, axis=1)  # the machine's state belongs to the time of the turn
        for row in np.exp(walk + noise + places):
            yield float(row[0]), float(row[1]), float(row[2])

    def compare(self) -> Verdict:
        first = judge(self.run(), BOUND)
        return confirmed(first, lambda: judge(self.run(), BOUND))[0]


def rate(verdict: Verdict, ratio: float, machines: int, **noise) -> float:
    return sum(Machine(seed, ratio, **noise).compare() is verdict for seed in range(machines)) / machines


def test_equal_models_are_never_called_slower():
    assert rate(Verdict.SLOWER, 1.0, 300) == 0
    assert rate(Verdict.FASTER, 1.0, 300) == 0
    assert rate(Verdict.SAME, 1.0, 300) >= 0.95


def test_a_real_slowdown_is_found():
    assert rate(Verdict.SLOWER, 1.15, 300) >= 0.95
    assert rate(Verdict.SAME, 1.15, 300) == 0


def test_a_real_gain_is_found():
    assert rate(Verdict.FASTER, 0.85, 300) >= 0.95


def test_a_slowdown_of_exactly_the_bound_is_seldom_called_either_way():
    """At the bound itself one run errs to each side with probability alpha/2 at most, however often it looks.

    Of 600 such runs, more than 30 (5 %, twice the promise) to one side has probability below 1e-3.
    """
    runs = [judge(Machine(seed, 1 + BOUND, placement=0.0).run(), BOUND).verdict for seed in range(600)]
    assert runs.count(Verdict.SLOWER) <= 30
    assert runs.count(Verdict.SAME) + runs.count(Verdict.FASTER) <= 30


def test_looking_often_without_paying_for_it_would_err_more():
    """The same data with 5 % spent at every look: shows that the simulation can catch peeking."""
    from graphopt.measure.verdict import look_at

    naive = 0
    for seed in range(600):
        taken = np.array(list(Machine(seed, 1 + BOUND, placement=0.0).run()))
        looks = (look_at(taken[:n, [0, 0, 2]], BOUND, ALPHA).verdict for n in (8, 12, 18, 27, 41, 62, 93))
        naive += next((v for v in looks if v is not Verdict.INCONCLUSIVE), None) is Verdict.SLOWER
    assert naive > 30


def test_a_badly_placed_process_is_not_called_a_slowdown():
    """Processes of one program that differ by 4 % for as long as they live, near a bound of 5 %."""
    assert rate(Verdict.SLOWER, 1.0, 400, placement=0.04) <= 0.02


def test_a_very_noisy_machine_says_that_it_cannot_tell():
    verdicts = [judge(Machine(seed, 1.0, jitter=0.6, drift=0.3).run(20), BOUND) for seed in range(100)]
    assert sum(v.verdict is Verdict.INCONCLUSIVE for v in verdicts) >= 90
    assert not any(v.verdict is Verdict.SLOWER for v in verdicts)
    assert np.median([v.noise_floor for v in verdicts]) > BOUND


def test_looks_spend_alpha_and_no_more():
    assert sum(spend(ALPHA, look) for look in range(1, 10_000)) == pytest.approx(ALPHA, rel=1e-3)
    assert sum(spend(ALPHA, look) for look in range(1, 10_000)) < ALPHA


def test_it_stops_when_it_is_clear():
    taken = 0

    def rounds() -> Iterator[Round]:
        nonlocal taken
        for entry in itertools.repeat((1.0, 1.001, 2.0)):
            taken += 1
            yield entry

    assert judge(rounds(), BOUND).verdict is Verdict.SLOWER
    assert taken == 8


@pytest.mark.parametrize("count", [0, 1, 6])
def test_too_few_rounds_tell_nothing(count):
    judgement = judge(itertools.repeat((1.0, 1.0, 2.0), count), BOUND)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert judgement.to_dict()["verdict"] == "inconclusive"
    assert judgement.rounds == count


def test_slower_needs_both_runs():
    slower = judge([(1.0, 1.0, 2.0)] * 8, BOUND)
    same = judge([(1.0, 1.0, 1.0)] * 8, BOUND)
    assert confirmed(slower, lambda: slower)[0] is Verdict.SLOWER
    assert confirmed(slower, lambda: same)[0] is Verdict.INCONCLUSIVE
    assert confirmed(slower, None)[0] is Verdict.INCONCLUSIVE

    def never() -> Judgement:
        raise AssertionError("only a slowdown is measured again")

    assert confirmed(same, never)[0] is Verdict.SAME


def test_slower_than_one_of_the_base_processes_is_not_enough():
    assert judge([(1.0, 1.2, 1.2)] * 40, BOUND).verdict is Verdict.INCONCLUSIVE
