"""Ranges against brute force, and streaming against seeing everything at once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from graphopt.calibration import collect_statistics, merge, random_dataset
from graphopt.calibration.statistics import BINS, Observer, TensorStatistics
from graphopt.errors import DataError, ModelError
from graphopt.model import signature


def observed(*arrays: np.ndarray) -> TensorStatistics:
    observer = Observer()
    for array in arrays:
        observer.see(array)
    return observer.statistics()


def quantization_error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of 256 levels over [low, high], computed plainly."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    back = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    return float(np.mean((back - values) ** 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(-12, 12))
def test_streaming_equals_seeing_all_at_once(seed, pieces, magnitude):
    rng = np.random.default_rng(seed)
    growing = [(rng.standard_normal((3, 4, 5)) * 2.0 ** (magnitude + i)).astype(np.float32) for i in range(pieces)]
    growing[0][0, 0, 0] = 0.0
    parts, whole = observed(*growing), observed(np.concatenate(growing))
    assert (parts.minimum, parts.maximum, parts.reach) == (whole.minimum, whole.maximum, whole.reach)
    assert parts.count == whole.count == sum(a.size for a in growing)
    assert parts.zeros == whole.zeros == 1
    assert parts.channel_mean is not None
    everything = np.concatenate(growing)
    np.testing.assert_allclose(  # float32 sums of 5 values in each row
        parts.channel_mean, everything.mean(axis=(0, 2), dtype=np.float64), atol=4e-7 * np.abs(everything).max()
    )
    # Bins merge in pairs about zero, so growing loses nothing: the counts are those of the final bins.
    np.testing.assert_array_equal(parts.counts, whole.counts)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_feature_peaks_are_those_of_the_last_axis(seed, pieces, rank):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, rank))
    parts = [(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32) for _ in range(pieces)]
    peaks = observed(*parts).feature_peak
    np.testing.assert_array_equal(peaks, np.abs(np.stack(parts)).reshape(-1, shape[-1]).max(axis=0))
    assert observed(*parts, np.zeros((*shape[:-1], shape[-1] + 1), np.float32)).feature_peak is None
    assert observed(np.array(1.0, np.float32)).feature_peak is None
    assert observed(np.ones((1, 2, 3, 4), np.float32)).feature_peak is None


def test_counts_are_those_of_numpy():
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    seen = observed(x)
    expected, _ = np.histogram(x, BINS, (-seen.reach, seen.reach))
    np.testing.assert_array_equal(seen.counts, expected)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_numpy_to_a_bin(percentile):
    x = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    seen = observed(x)
    low, high = seen.range("percentile", percentile=percentile)
    bin_width = 2 * seen.reach / BINS
    assert abs(high - np.percentile(x, percentile)) <= 2 * bin_width
    assert abs(low - np.percentile(x, 100 - percentile)) <= 2 * bin_width


@pytest.mark.parametrize("make", ["normal", "heavy", "relu"])
def test_mse_range_is_as_good_as_brute_force(make):
    rng = np.random.default_rng(2)
    x = {
        "normal": rng.standard_normal(50_000),
        "heavy": rng.standard_t(2, 50_000),
        "relu": np.maximum(rng.standard_t(3, 50_000), 0),
    }[make].astype(np.float32)
    low, high = observed(x).range("mse")
    found = quantization_error(x, low, high)
    tried = [
        quantization_error(x, min(x.min(), 0) * a, x.max() * b)
        for a in np.linspace(0.02, 1, 50)
        for b in np.linspace(0.02, 1, 50)
    ]
    assert found <= 1.05 * min(tried)  # the histogram's bins blur the error by about a percent
    assert found <= quantization_error(x, min(float(x.min()), 0.0), float(x.max()))


def test_mse_through_a_function_ignores_what_the_function_flattens():
    x = np.random.default_rng(3).standard_normal(50_000).astype(np.float32)
    plain, _ = observed(x).range("mse")
    low, high = observed(x).range("mse", through=lambda v: np.maximum(v, 0))
    assert low > plain / 2 and high > 0


def test_entropy_cuts_a_lonely_outlier_but_not_a_uniform_tail():
    rng = np.random.default_rng(4)
    outlier = observed(np.append(np.abs(rng.standard_normal(100_000)), 60.0).astype(np.float32))
    low, high = outlier.range("entropy")
    assert low == 0.0 and 3.0 < high < 15.0
    uniform = observed(rng.uniform(0, 1, 100_000).astype(np.float32))
    assert uniform.range("entropy")[1] > 0.97


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_ranges_hold_zero_and_symmetric_ranges_are_symmetric(method):
    rng = np.random.default_rng(5)
    for values in (rng.uniform(1, 2, 1000), rng.uniform(-2, -1, 1000), rng.standard_normal(1000), np.zeros(10)):
        seen = observed(values.astype(np.float32))
        low, high = seen.range(method)
        assert low <= 0.0 <= high
        low, high = seen.range(method, symmetric=True)
        assert low == -high
    assert observed(np.zeros(10, np.float32)).range(method) == (0.0, 0.0)


def test_minmax_is_exact():
    seen = observed(np.array([[-1.25, 3.5]], np.float32))
    assert seen.range() == (-1.25, 3.5)
    assert seen.range(symmetric=True) == (-3.5, 3.5)


def test_merging_is_seeing_both():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal(1000).astype(np.float32), (rng.standard_normal(500) * 40).astype(np.float32)
    together, both = merge([observed(a), observed(b)]), observed(a, b)
    np.testing.assert_array_equal(together.counts, both.counts)
    assert (together.minimum, together.maximum, together.reach) == (both.minimum, both.maximum, both.reach)


def test_tiny_and_huge_values_are_counted():
    for magnitude in (1e-38, 1e-30, 1e30, 3e38):
        seen = observed(np.array([magnitude, -magnitude / 2], np.float32))
        assert seen.count == 2 and seen.counts.sum() == 2
        low, high = seen.range("percentile", percentile=100.0)
        assert low <= 0 < high <= np.float32(magnitude)


MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 6, 6] x) => (float[N, 3, 6, 6] y) { r = Relu(x)  d = Add(r, r)  y = Mul(d, x) }
"""


def test_values_inside_a_model_are_those_of_numpy():
    model = ir.from_proto(parser.parse_model(MODEL))
    data = random_dataset(signature(model), 11, seed=3)
    found = collect_statistics(model, ("x", "r", "d", "y"), data)
    x = np.concatenate([feeds["x"] for feeds in data.batches(4)])
    r = np.maximum(x, 0)
    for name, array in {"x": x, "r": r, "d": 2 * r, "y": 2 * r * x}.items():
        assert found[name].count == array.size
        assert (found[name].minimum, found[name].maximum) == (array.min(), array.max())
    assert found["r"].zeros == int((r == 0).sum())


def test_bad_values_are_named():
    model = ir.from_proto(parser.parse_model(MODEL))
    data = random_dataset(signature(model), 2, 0)
    with pytest.raises(ModelError, match="'nothing'"):
        collect_statistics(model, ("nothing",), data)
    text = MODEL.replace("Mul(d, x)", "Log(d)")
    with pytest.raises(DataError, match="'y' becomes NaN or infinite"):
        collect_statistics(ir.from_proto(parser.parse_model(text)), ("y",), data)
    with pytest.raises(DataError, match="no calibration samples"):
        collect_statistics(model, ("r",), data.subset([]))
