"""Ridge regression from moments, as strong as the data asks.

With z the inputs, r what is to be explained, s the inputs' standard deviations, R their correlations and B the
covariances of r with z/s,

    G = B (R + k I)^-1 / s      k = g v / ((1 - g/n) |G s|^2 n)

so that k = 0 is least squares, and k = infinity explains nothing. n: rows; g = tr R (R + k I)^-1, the number of
parameters the data determines; v: mean square left of r, summed over its components like |G s|^2. The equation for k is
MacKay's; it is solved by iterating, which needs one eigensystem of R.

Reference: MacKay, "Bayesian Interpolation", Neural Computation 4, 1992, section 4 (k and g); Akaike, "Statistical
Predictor Identification", Ann. Inst. Statist. Math. 22, 1970 (the error on new data).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_RIDGE = 1e-6
"""Moments are summed from float32 products: correlations are not known any better."""
MOST_RIDGE = 1e3
ROUNDS = 100


@dataclass(frozen=True)
class Regression:
    """`weights` (components of r, inputs); `left`: the mean square of r, summed over its components, to expect on new
    data: v (n + g) / (n - g); `ridge`: k."""

    weights: np.ndarray
    left: float
    ridge: float


def regress(covariance: np.ndarray, crossed: np.ndarray, energy: float, rows: int) -> Regression:
    """Of r on z: `covariance` (inputs, inputs) of z, `crossed` (components, inputs) of r with z, `energy` the summed
    variances of r. Inputs that never vary get no weight."""
    deviations = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > 0)
    values, vectors = np.linalg.eigh(covariance * scale * scale[:, None])
    values = np.maximum(values, 0.0)
    turned = (crossed * scale) @ vectors
    powers = np.square(turned).sum(axis=0)
    ridge = float(np.clip(len(values) / rows, LEAST_RIDGE, MOST_RIDGE))
    for _ in range(ROUNDS):
        before = ridge
        left, free = _left(values, powers, energy, ridge, rows)
        size = float((powers / np.square(values + ridge)).sum())
        wanted = free * left / ((rows - free) * size) if size > 0 else MOST_RIDGE
        ridge = float(np.clip(wanted, LEAST_RIDGE, MOST_RIDGE))
        if abs(ridge - before) <= 1e-3 * before:
            break
    left, free = _left(values, powers, energy, ridge, rows)
    weights = ((turned / (values + ridge)) @ vectors.T) * scale
    return Regression(weights, left * (rows + free) / (rows - free), ridge)


def _left(values: np.ndarray, powers: np.ndarray, energy: float, ridge: float, rows: int) -> tuple[float, float]:
    """The mean square left of r on the rows seen, and the number of parameters they determine (below `rows`)."""
    left = energy - float((powers * (values + 2 * ridge) / np.square(values + ridge)).sum())
    free = float((values / (values + ridge)).sum())
    return max(left, 0.0), min(free, 0.999 * rows)
