"""Clipping, learned rounding and bias correction of quantize-int8: each against what it must not be worse than."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import collect_statistics, load_dataset
from graphopt.passes.quantization.clipping import weight_error
from graphopt.passes.quantization.compensate import round_with_covariance
from graphopt.passes.quantization.learned import learn_rounding, output_noise
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.quantization.weights import round_weights, weight_scales
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.passes.second_order import DAMPING
from tests.passes.test_quantize_int8 import array_of, build, quantize, residual, snr_db


@st.composite
def layers(draw):
    """Weights (groups, rows, taps), scales (groups, rows), the covariance of correlated inputs, and a limit."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, rows, taps = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 90))
    samples = draw(st.integers(2, 200))  # fewer than taps: the covariance is singular
    x = rng.standard_normal((groups, samples, taps)) @ rng.standard_normal((groups, taps, taps))
    if draw(st.booleans()):
        x[..., rng.integers(taps)] = 0.0  # a dead input
    x -= x.mean(axis=1, keepdims=True)
    limit = draw(st.sampled_from([1, 7, 64, 127]))
    weights = rng.standard_normal((groups, rows, taps)) * 10.0 ** rng.uniform(-3, 3, (groups, rows, 1))
    scales = np.abs(weights).max(axis=2) / limit * draw(st.sampled_from([1.0, 0.7]))
    return weights, scales, x.transpose(0, 2, 1) @ x / samples, limit


def damped(covariance: np.ndarray) -> np.ndarray:
    level = np.diagonal(covariance, axis1=1, axis2=2).mean(axis=1)
    return covariance + DAMPING * level[:, None, None] * np.eye(covariance.shape[1])


def nearest(weights: np.ndarray, scales: np.ndarray, limit: int) -> np.ndarray:
    return np.rint(weights / scales[..., None]).clip(-limit, limit)


def slack(weights: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """What rounding in double precision may add to a quadratic form of numbers of this size: (groups, rows)."""
    taps = covariance.shape[1]
    size = np.einsum("grt,gtu,gru->gr", np.abs(weights), np.abs(covariance), np.abs(weights))
    return 4 * taps * np.finfo(np.float64).eps * size


@settings(max_examples=80, deadline=None)
@given(layers())
def test_learned_rounding_is_never_worse_than_nearest(layer):
    weights, scales, covariance, limit = layer
    learned = learn_rounding(weights, scales, covariance, limit)
    assert np.abs(learned).max() <= limit
    noise = output_noise(learned, weights, scales, covariance)
    bar = output_noise(nearest(weights, scales, limit), weights, scales, covariance)
    assert (noise <= bar + slack(weights, covariance)).all()


@settings(max_examples=40, deadline=None)
@given(layers())
def test_no_single_change_of_a_learned_weight_helps(layer):
    weights, scales, covariance, limit = layer
    norm = damped(covariance)
    learned = learn_rounding(weights, scales, covariance, limit)
    noise = output_noise(learned, weights, scales, norm)
    fell_back = (learned == nearest(weights, scales, limit)).all(axis=2)
    for tap, step in itertools.product(range(weights.shape[2]), (-1, 1)):
        moved = learned.copy()
        moved[..., tap] = (moved[..., tap] + step).clip(-limit, limit)
        other = output_noise(moved, weights, scales, norm)
        assert ((other >= noise * (1 - 1e-6) - slack(weights, norm)) | fell_back).all()


def test_learned_rounding_beats_compensated_and_comes_near_the_best_there_is():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6))
    norm = np.cov(x.T, bias=True)[None]
    weights = rng.standard_normal((1, 40, 6))
    scales = np.abs(weights).max(axis=2) / 7
    learned = output_noise(learn_rounding(weights, scales, norm, 7), weights, scales, norm)
    compensated = output_noise(round_with_covariance(weights, scales, norm, 7), weights, scales, norm)
    plain = output_noise(nearest(weights, scales, 7), weights, scales, norm)
    low = np.floor(weights / scales[..., None])
    best = np.min(
        [
            output_noise((low + np.array(up)).clip(-7, 7), weights, scales, norm)
            for up in itertools.product((-1, 0, 1, 2), repeat=6)
        ],
        axis=0,
    )
    assert learned.sum() < compensated.sum() < plain.sum()
    assert learned.sum() - best.sum() < 0.5 * (compensated.sum() - best.sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([7, 64, 127]), st.integers(0, 1), st.booleans())
def test_clipped_weights_have_no_more_error_and_room_for_the_bias(seed, limit, axis, has_bias):
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(2, (5, 40)) * 10.0 ** rng.uniform(-3, 3, (5, 1))).astype(np.float32)
    weights[2] = 0
    bias = (rng.standard_normal(weights.shape[axis]) * 1e3).astype(np.float32) if has_bias else None
    plain = weight_scales(weights, axis, bias, np.float32(1e-5), limit)
    clipped = weight_scales(weights, axis, bias, np.float32(1e-5), limit, "mse")
    rows = np.moveaxis(weights, axis, 0).astype(np.float64)
    assert (clipped > 0).all() and (clipped <= plain).all()
    assert (weight_error(rows, clipped, limit) <= weight_error(rows, plain, limit)).all()
    if bias is not None:
        assert (np.abs(bias) / (clipped.astype(np.float64) * 1e-5) < 2**30 * 1.001).all()


def test_an_outlier_saturates_where_that_pays():
    rows = np.append(np.random.default_rng(1).standard_normal(2000) * 0.1, 1.0).astype(np.float32)[None]
    plain = weight_scales(rows, 0, None, np.float32(1), 7)
    clipped = weight_scales(rows, 0, None, np.float32(1), 7, "mse")
    assert clipped[0] < 0.8 * plain[0]
    assert weight_error(rows.astype(np.float64), clipped, 7) < 0.7 * weight_error(rows.astype(np.float64), plain, 7)


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "learned"])
def test_the_norm_is_what_is_left_of_the_error(rounding):
    """With the bias corrected the variance counts, without it the mean square: each wins by its own measure."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3000, 12)) @ rng.standard_normal((12, 12)) / 3 + rng.uniform(1, 3, 12)
    moments = Moments(x.mean(0)[None], np.cov(x.T, bias=True)[None])
    weights = rng.standard_normal((16, 12)).astype(np.float32)
    scales = weight_scales(weights, 0, None, np.float32(1), 7)
    wide = scales[:, None].astype(np.float64)
    corrected = round_weights(weights, 0, scales, 7, 1, moments, rounding, True)
    plain = round_weights(weights, 0, scales, 7, 1, moments, rounding, False)
    assert plain.shift is None and corrected.shift is not None
    lost = x @ (corrected.integers * wide - weights).T
    np.testing.assert_allclose((lost + corrected.shift).mean(0), 0, atol=1e-9)
    without = np.square(x @ (plain.integers * wide - weights).T).mean()
    assert np.square(lost + corrected.shift).mean() < without
    if rounding != "nearest":
        assert without < np.square(lost).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "learned"},
        {"rounding": "learned", "clip": "mse", "correct_bias": "false"},
        {"rounding": "nearest", "correct_bias": "true"},
        {"clip": "mse"},
    ],
)
def test_options_reach_the_weights(options):
    plain, made = quantize(residual()), quantize(residual(), **options)
    assert made.applied == plain.applied == 6
    assert models.to_bytes(made.model) != models.to_bytes(plain.model)
    assert snr_db(residual(), made.model) > 25  # as the default is tested


def test_defaults_are_what_was_measured():
    same = quantize(residual(), rounding="compensated", correct_bias="true", clip="none")
    assert models.to_bytes(quantize(residual()).model) == models.to_bytes(same.model)
    old = quantize(residual(), rounding="nearest", correct_bias="false")
    assert models.to_bytes(quantize(residual(), rounding="nearest").model) == models.to_bytes(old.model)


def test_corrected_biases_take_the_mean_error_back(tmp_path):
    """A layer whose input is far from zero: rounding to nearest shifts its output, the bias takes that back."""
    model = build("(float[N,6] x) => (float[N,4] y) { y = Gemm<transB=1>(x, w, b) }", w=(4, 6), b=(4,))
    x = np.random.default_rng(2).normal(5, 0.1, (200, 6)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    data = load_dataset(tmp_path / "x.npz", models.signature(model))

    def biases(**options) -> np.ndarray:
        stored = quantize(model, data=data, rounding="nearest", **options).model.graph.initializers
        return array_of(stored["b_quantized"]) * array_of(stored["b_scale"]).astype(np.float64)

    weights = quantize(model, data=data, rounding="nearest").model.graph.initializers
    rounded = array_of(weights["w_quantized"]) * array_of(weights["w_scale"]).astype(np.float64)[:, None]
    wanted = (array_of(model.graph.initializers["w"]) - rounded) @ x.mean(axis=0, dtype=np.float64)
    step = array_of(weights["b_scale"]).astype(np.float64)
    assert (np.abs(wanted) > 4 * step).any()
    # both biases are rounded to their step
    assert (np.abs(biases(correct_bias="true") - biases() - wanted) <= 1.01 * step).all()


@pytest.mark.parametrize("rounding", ["compensated", "learned"])
def test_without_a_bias_the_mean_error_counts_as_well(rounding, tmp_path):
    """A MatMul without an Add cannot take its mean error back: its mean square is what rounding must keep small."""
    model = build("(float[N,24] x) => (float[N,16] y) { y = MatMul(x, w) }", w=(24, 16))
    x = np.random.default_rng(2).normal(3, 0.05, (400, 24)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    data = load_dataset(tmp_path / "x.npz", models.signature(model))

    def noise(how: str) -> float:
        stored = quantize(model, data=data, rounding=how).model.graph.initializers
        rounded = array_of(stored["w_quantized"]) * array_of(stored["w_scale"]).astype(np.float64)
        return float(np.square(x @ (rounded - array_of(model.graph.initializers["w"]))).mean())

    assert noise(rounding) < 0.2 * noise("nearest")


def test_statistics_are_enough_without_data_for_what_needs_none():
    """No data to multiply weights with: nearest, and biases as they were, rather than a guess."""
    from graphopt.calibration import random_dataset
    from graphopt.passes.base import Context
    from tests.passes.test_quantize_int8 import VNNI

    model = residual()
    each = QuantizeInt8(rounding="learned")
    statistics = collect_statistics(model, each.observes(model), random_dataset(models.signature(model), 8, 0))
    without = each.run(model.clone(), Context(VNNI, statistics)).model
    plain = QuantizeInt8(rounding="nearest").run(model.clone(), Context(VNNI, statistics)).model
    assert models.to_bytes(without) == models.to_bytes(plain)
