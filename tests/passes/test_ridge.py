"""Ridge regression from moments: against least squares, where there is no noise, nothing but noise, other units."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.ridge import LEAST_RIDGE, Regression, regress

SEEDS = st.integers(0, 2**30)
UNIT = float(np.finfo(float).eps)


def of_rows(z: np.ndarray, r: np.ndarray) -> Regression:
    """The regression of r (rows, components) on z (rows, inputs)."""
    z, r = z - z.mean(axis=0), r - r.mean(axis=0)
    rows = len(z)
    return regress(z.T @ z / rows, r.T @ z / rows, float(np.square(r).sum() / rows), rows)


def correlated(rng: np.random.Generator, rows: int, inputs: int) -> np.ndarray:
    """Inputs that share causes, of other sizes, none near to a sum of the others."""
    mixed = rng.standard_normal((rows, inputs)) + rng.standard_normal((rows, 2)) @ rng.standard_normal((2, inputs))
    return mixed * np.exp(rng.standard_normal(inputs)) + rng.standard_normal(inputs)


def about(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deviations of z from its mean, and their standard deviations."""
    return z - z.mean(axis=0), z.std(axis=0)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 300), SEEDS, st.floats(0, 10))
@settings(max_examples=60)
def test_it_is_what_numpy_solves_with_the_ridge_written_as_rows(inputs, components, rows, seed, noise):
    rng = np.random.default_rng(seed)
    z = correlated(rng, rows + 1, inputs)
    r = z @ rng.standard_normal((inputs, components)) + noise * rng.standard_normal((rows + 1, components))
    found = of_rows(z, r)
    deviations, sizes = about(z)
    more = np.sqrt(len(z) * found.ridge) * np.diag(sizes)
    wanted = np.vstack([r - r.mean(axis=0), np.zeros((inputs, components))])
    solved = np.linalg.lstsq(np.vstack([deviations, more]), wanted, rcond=None)[0].T
    # Moments hold rows^(1/2) roundings an element, of which the ridge lets through its inverse.
    off = UNIT * 8 * np.sqrt(len(z)) * inputs * (1 + 1 / found.ridge)
    assert np.abs((found.weights - solved) * sizes).max() <= off * np.sqrt(
        np.square(r - r.mean(axis=0)).mean(axis=0).sum()
    )


@given(st.integers(1, 8), st.integers(1, 4), st.integers(30, 300), SEEDS)
@settings(max_examples=60)
def test_what_is_linear_without_noise_is_found(inputs, components, rows, seed):
    """The least ridge k takes G k (R + k)^-1 from G, and at most that: rounding of moments is far below it."""
    rng = np.random.default_rng(seed)
    z, wanted = correlated(rng, rows, inputs), rng.standard_normal((components, inputs))
    found = of_rows(z, z @ wanted.T)
    deviations, sizes = about(z)
    least = np.linalg.eigvalsh((deviations / sizes).T @ (deviations / sizes) / rows)[0]
    assert found.ridge == LEAST_RIDGE
    assert np.linalg.norm((found.weights - wanted) * sizes) <= 2 * LEAST_RIDGE / least * np.linalg.norm(wanted * sizes)
    assert found.left <= 1e-9 * np.square((z - z.mean(axis=0)) @ wanted.T).sum() / rows


@given(st.integers(1, 6), SEEDS)
@settings(max_examples=30)
def test_it_becomes_least_squares_as_noise_vanishes_and_as_rows_grow(inputs, seed):
    """How far from least squares: k / (least eigenvalue + k), with a k that shrinks like noise^2 / rows."""
    rng = np.random.default_rng(seed)
    z, weights, noise = correlated(rng, 4000, inputs), rng.standard_normal((1, inputs)), rng.standard_normal((4000, 1))
    for rows, level in ((100, 0.1), (100, 0.01), (4000, 0.1), (4000, 0.01)):
        part = z[:rows]
        deviations, sizes = about(part)
        scale = np.linalg.norm(weights * sizes)
        r = part @ weights.T + level * scale * noise[:rows]
        found = of_rows(part, r)
        least = np.linalg.lstsq(deviations, r - r.mean(axis=0), rcond=None)[0].T
        eigen = np.linalg.eigvalsh((deviations / sizes).T @ (deviations / sizes) / rows)[0]
        apart = np.linalg.norm((found.weights - least) * sizes)
        assert apart <= (1 + 1e-6) * found.ridge / (eigen + found.ridge) * np.linalg.norm(least * sizes) + 1e-9 * scale
        # k = g v / ((n - g) |G s|^2), with g at most the inputs, v near level^2 scale^2, and |G s| near scale.
        assert found.ridge <= max(LEAST_RIDGE, 4 * inputs * level**2 / (rows - inputs))


@given(st.integers(1, 30), st.integers(1, 4), st.sampled_from([20, 200, 2000]), SEEDS)
@settings(max_examples=60)
def test_of_pure_noise_little_is_explained(inputs, components, rows, seed):
    """Never more than least squares would: a chi-squared of inputs x components, beyond t with probability e^-t."""
    rng = np.random.default_rng(seed)
    z, r = rng.standard_normal((rows, inputs)), rng.standard_normal((rows, components))
    found = of_rows(z, r)
    deviations, _ = about(z)
    explained = np.square(deviations @ found.weights.T).sum()
    freedom, t = inputs * components, 30.0
    assert explained <= freedom + 2 * np.sqrt(freedom * t) + 2 * t


def test_of_pure_noise_much_less_is_explained_than_by_least_squares():
    ridge = least = 0.0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        z, r = rng.standard_normal((100, 20)), rng.standard_normal((100, 4))
        deviations, _ = about(z)
        ridge += np.square(of_rows(z, r).weights).sum()
        least += np.square(np.linalg.lstsq(deviations, r, rcond=None)[0]).sum()
    assert ridge < 0.05 * least


@given(st.integers(2, 8), st.integers(1, 60), SEEDS, st.data())
@settings(max_examples=40)
def test_inputs_that_never_vary_get_no_weight_and_change_nothing(inputs, rows, seed, draw):
    rng = np.random.default_rng(seed)
    z, r = correlated(rng, rows, inputs), rng.standard_normal((rows, 2))
    still = draw.draw(st.lists(st.integers(0, inputs - 1), min_size=1, max_size=inputs - 1, unique=True))
    z[:, still] = 0.0
    found, moving = of_rows(z, r), np.delete(np.arange(inputs), still)
    assert not found.weights[:, still].any() and np.isfinite(found.weights).all()
    scale = np.abs(found.weights).max(initial=0.0)
    if rows > inputs:  # else the first guess of the ridge, which counts all inputs, may lead elsewhere
        np.testing.assert_allclose(of_rows(z[:, moving], r).weights, found.weights[:, moving], 0.01, 0.01 * scale)


@given(
    st.integers(1, 8),
    st.integers(1, 100),
    SEEDS,
    st.lists(st.integers(-12, 12), min_size=8, max_size=8),
    st.integers(-9, 9),
)
@settings(max_examples=60)
def test_units_do_not_matter(inputs, rows, seed, powers, power):
    """Bit for bit, where units are powers of two."""
    rng = np.random.default_rng(seed)
    z, r = correlated(rng, rows, inputs), rng.standard_normal((rows, 3))
    units, unit = 2.0 ** np.array(powers[:inputs]), 2.0**power
    found, other = of_rows(z, r), of_rows(z * units, r * unit)
    assert other.ridge == found.ridge and other.left == found.left * unit**2
    assert np.array_equal(other.weights, found.weights * unit / units)


@given(st.integers(1, 20), st.integers(1, 60), SEEDS, st.floats(0, 3))
@settings(max_examples=60)
def test_what_is_left_on_new_data_is_no_less_than_on_the_rows_seen(inputs, rows, seed, noise):
    rng = np.random.default_rng(seed)
    z = correlated(rng, rows, inputs)
    r = np.tanh(z @ rng.standard_normal((inputs, 2))) + noise * rng.standard_normal((rows, 2))
    found = of_rows(z, r)
    deviations, energy = about(z)[0], np.square(r - r.mean(axis=0)).sum() / rows
    seen = np.square(r - r.mean(axis=0) - deviations @ found.weights.T).sum() / rows
    assert seen <= energy * (1 + 1e-9)
    assert seen <= found.left + 1e-9 * energy


def test_what_is_left_on_new_data_is_what_was_expected():
    """The mean is estimated too, which is not counted: two rows' share. 300 x 80 x 3 squares are known to 0.9 %."""
    expected = seen = 0.0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal((12, 3))
        z, fresh = rng.standard_normal((80, 12)), rng.standard_normal((2000, 12))
        r, wanted = (x @ weights + 2 * rng.standard_normal((len(x), 3)) for x in (z, fresh))
        found = of_rows(z, r)
        expected += found.left
        seen += np.square(wanted - r.mean(axis=0) - (fresh - z.mean(axis=0)) @ found.weights.T).sum() / len(fresh)
    assert expected * (1 + 2 / 80) == pytest.approx(seen, rel=0.03)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_or_two_say_nothing_that_is_not_finite(rows):
    rng = np.random.default_rng(0)
    found = of_rows(rng.standard_normal((rows, 5)), rng.standard_normal((rows, 2)))
    assert np.isfinite(found.weights).all() and np.isfinite(found.left) and found.left >= 0
    assert regress(np.zeros((3, 3)), np.zeros((2, 3)), 0.0, rows).weights.tolist() == [[0.0] * 3] * 2
