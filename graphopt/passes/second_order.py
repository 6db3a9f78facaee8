"""Changing weights one tap after another, each error made up for in the taps that come after it.

With a layer's input x of second moments C, changing a row of weights w by d changes the output by d.x, of mean square
d C d'. Fixing tap t of every row at a value and minimising over the taps behind it moves those by -e U[t, t+1:], where
U is the upper Cholesky factor of C's inverse and e the error of tap t over U[t, t]. What value a tap is given is the
caller's choice: an integer times a scale (GPTQ), zero (SparseGPT).

Reference: Frantar et al., "GPTQ", ICLR 2023, section 3; Frantar and Alistarh, "SparseGPT", ICML 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DAMPING = 0.01
"""Share of the mean variance added to every variance, so that the moments can be inverted."""
LAZY = 64
"""Taps after which the errors are spread to all later ones at once (the order of operations, not the result)."""

Choose = Callable[[int, np.ndarray], np.ndarray]
"""(tap, weights left (groups, rows, taps)) -> values (groups, rows) for that tap. Of the weights left, those up to the
end of the tap's run of `lazy` taps are up to date."""


def in_order(weights: np.ndarray, factors: np.ndarray, choose: Choose, lazy: int = LAZY) -> np.ndarray:
    """The chosen values, float64 (groups, rows, taps). `factors`: (groups, taps, taps), of `inverse_factors`."""
    left = weights.astype(np.float64)
    chosen = np.empty_like(left)
    taps = left.shape[2]
    for start in range(0, taps, lazy):
        stop = min(start + lazy, taps)
        errors = np.empty((*left.shape[:2], stop - start))
        for tap in range(start, stop):
            chosen[..., tap] = choose(tap, left)
            error = (left[..., tap] - chosen[..., tap]) / factors[:, tap, tap, None]
            errors[..., tap - start] = error
            left[..., tap + 1 : stop] -= error[..., None] * factors[:, tap, None, tap + 1 : stop]
        left[..., stop:] -= errors @ factors[:, start:stop, stop:]
    return chosen


def inverse_factors(moments: np.ndarray) -> np.ndarray:
    """U of each (taps, taps) of `moments` (groups, taps, taps), damped until it exists; the identity if it never does.

    Taps whose input is always zero have only the damping to hold them: they are left to their own rounding. Moments
    measured on few samples, or of inputs whose mean is large against their variance, may have negative eigenvalues of
    more than the damping: then they are damped more.
    """
    return np.stack([_inverse_factor(each) for each in moments])


def _inverse_factor(moments: np.ndarray) -> np.ndarray:
    taps = len(moments)
    level = float(np.diagonal(moments).mean())
    if level > 0:
        for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
            try:
                return np.linalg.cholesky(np.linalg.inv(moments + damping * level * np.eye(taps))).T
            except np.linalg.LinAlgError:
                continue
    return np.eye(taps)


def output_error(change: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """(groups, rows): d C d' of every row of `change` (groups, rows, taps), `moments` (groups, taps, taps)."""
    return np.einsum("grt,grt->gr", change @ moments, change)


def permuted(moments: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`moments` (groups, taps, taps) with taps in `order` (groups, taps) along both axes."""
    return np.take_along_axis(np.take_along_axis(moments, order[:, :, None], 1), order[:, None, :], 2)
