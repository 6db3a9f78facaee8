"""Statistics against numpy and against what theory promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.measure.stats import LatencyStats, bootstrap_medians, bootstrap_ratio, sign_interval

latencies = st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=60)


@given(latencies)
@settings(max_examples=50, deadline=None)
def test_derived_figures_are_numpys(samples):
    stats = LatencyStats(tuple(samples))
    assert stats.median_s == np.median(samples)
    assert stats.p50_s == stats.median_s
    for percent, figure in ((90, stats.p90_s), (95, stats.p95_s), (99, stats.p99_s)):
        assert figure == np.percentile(samples, percent)
    assert (stats.min_s, stats.max_s) == (min(samples), max(samples))
    assert stats.mean_s == pytest.approx(math.fsum(samples) / len(samples), rel=1e-12)
    assert stats.std_s == pytest.approx(np.std(samples, ddof=1) if len(samples) > 1 else 0.0)
    low, high = stats.interval_s
    assert stats.min_s <= low <= high <= stats.max_s


@given(latencies)
@settings(max_examples=25, deadline=None)
def test_json_round_trip_is_exact(samples):
    stats = LatencyStats.of_bursts([samples, samples[:1]])
    assert LatencyStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


@pytest.mark.parametrize(
    ("samples", "bursts"), [((), ()), ((1.0, 0.0), ()), ((1.0, math.nan), ()), ((1.0, 2.0), (1,)), ((1.0,), (1, 0))]
)
def test_impossible_samples_are_refused(samples, bursts):
    with pytest.raises(ValueError, match="sample"):
        LatencyStats(samples, bursts)


def test_resampling_single_samples_is_the_ordinary_bootstrap():
    samples = np.random.default_rng(1).lognormal(size=31)
    stats = LatencyStats(tuple(samples))
    ours = bootstrap_medians(stats, np.random.default_rng(5), draws=200)
    rng = np.random.default_rng(5)
    plain = [np.median(samples[rng.integers(0, 31, 31)]) for _ in range(200)]
    np.testing.assert_allclose(ours, plain, rtol=1e-15)


def test_bursts_that_differ_widen_the_interval():
    """Samples of one burst share its conditions: taking them for independent would promise too much."""
    rng = np.random.default_rng(3)
    bursts = [1.0 + shift + 0.001 * rng.random(100) for shift in 0.1 * rng.random(12)]
    clustered = LatencyStats.of_bursts([tuple(b) for b in bursts])
    naive = LatencyStats(clustered.samples_s)
    wide, narrow = (high - low for low, high in (clustered.interval_s, naive.interval_s))
    assert wide > 3 * narrow


def test_bootstrap_ratio_covers_the_true_median():
    """Over 300 draws of 40 rounds a 95 % interval misses binomially: 34 misses or more has probability below 1e-5."""
    rng = np.random.default_rng(11)
    intervals = [bootstrap_ratio(1.1 * rng.lognormal(0, 0.05, 40), seed=i) for i in range(300)]
    misses = sum(not i.low <= 1.1 <= i.high for i in intervals)
    assert misses < 34
    assert bootstrap_ratio([1.0, 1.1, 1.2], 3) == bootstrap_ratio([1.0, 1.1, 1.2], 3)
    with pytest.raises(ValueError, match="no rounds"):
        bootstrap_ratio([])


@pytest.mark.parametrize(("n", "alpha", "ranks"), [(8, 0.05, (1, 8)), (20, 0.05, (6, 15)), (50, 0.05, (18, 33))])
def test_sign_interval_has_the_tabulated_ranks(n, alpha, ranks):
    """Ranks as in tables of confidence limits of the median (e.g. Conover, Practical Nonparametric Statistics)."""
    interval = sign_interval(np.random.default_rng(0).permutation(np.arange(1.0, n + 1)), alpha)
    assert (interval.low, interval.high) == ranks


@given(st.integers(1, 60), st.floats(0.0005, 0.4))
@settings(max_examples=60, deadline=None)
def test_sign_interval_never_errs_more_than_allowed(n, alpha):
    interval = sign_interval(np.arange(1.0, n + 1), alpha)
    if not math.isfinite(interval.low):
        assert 2 * 0.5**n > alpha
        return
    rank = int(interval.low)
    tail = sum(math.comb(n, i) for i in range(rank)) / 2**n
    assert 2 * tail <= alpha < 2 * (tail + math.comb(n, rank) / 2**n)


def test_many_rounds_agree_with_the_exact_ranks():
    exact = sign_interval(np.arange(999.0), 0.01)
    approximate = sign_interval(np.arange(1001.0), 0.01)
    assert abs((approximate.high - approximate.low) - (exact.high - exact.low)) <= 4
