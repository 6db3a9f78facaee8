"""W ~ H (V x I): the leading part of the taps' index goes through a basis V of few rows, for all of the rest alike.

With W as (M, P, Q), P the part that is compressed: W[m, p, q] ~ sum_r H[m, r, q] V[r, p]. The spatial split compresses
(C, kH), Tucker-2 compresses C; Tucker-2 also bounds the rank of H as a matrix (M, R Q).

Given V, the best H is a regression, and under a bound on its rank a reduced-rank regression: both closed forms, in the
metric of the outputs. Given H, V is a least-squares problem of R P unknowns, solved by a few conjugate gradients. The
two take turns; no turn raises the error.

Reference: De Lathauwer et al., "On the Best Rank-1 and Rank-(R1, ..., RN) Approximation of Higher-Order Tensors", SIAM
J. Matrix Anal. Appl. 2000 (alternating); Izenman, "Reduced-Rank Regression", J. Multivariate Anal. 1975.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt.passes.low_rank.metric import Metric, descend, invert, roots
from graphopt.passes.low_rank.svd import components

SWEEPS = 12
STEPS = 8
ENOUGH = 1e-3
"""A sweep that lowers the error by less than this share is the last."""


def start_basis(weights: np.ndarray, metric: Metric) -> np.ndarray:
    """V for every rank at once, (P, P): its first R rows are the start for R. `weights`: (M, P, Q).

    Right singular vectors of W, whitened by the mean covariance of P: the best V where P and Q are uncorrelated.
    """
    outputs, kept, rest = weights.shape
    rows = weights.transpose(0, 2, 1).reshape(outputs * rest, kept)
    covariance = metric.over(kept)
    if covariance is None:
        return components(rows.T, Metric())[1].T
    root, inverse = roots(covariance)
    return components(root @ rows.T, Metric())[1].T @ inverse


def start_errors(weights: np.ndarray, metric: Metric) -> Callable[[int, int], float]:
    """The error for (R, rank of H) before any sweep: what `fit` starts from, so never less than what it reaches."""
    outputs, _, rest = weights.shape
    basis = np.kron(start_basis(weights, metric), np.eye(rest))
    seen, gram = _regression_terms(weights, metric, basis)
    total = metric.energy(weights.reshape(outputs, -1))
    known: dict[int, np.ndarray] = {}

    def error(rank: int, rank_of_core: int) -> float:
        if rank not in known:
            part = slice(0, rank * rest)
            explained = seen[:, part] @ invert(gram[part, part]) @ seen[:, part].T
            known[rank] = np.maximum(np.linalg.eigvalsh(explained)[::-1], 0.0)
        return max(0.0, total - float(known[rank][:rank_of_core].sum()))

    return error


def fit_basis(
    weights: np.ndarray, metric: Metric, rank: int, rank_of_core: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V (rank, P), the core (rank_of_core, rank, Q) and U (M, rank_of_core) with W ~ U core V."""
    outputs, kept, rest = weights.shape
    target = weights.reshape(outputs, -1)
    basis = start_basis(weights, metric)[:rank]
    if metric.covariance is not None:  # a fit to the weights is another start, seldom the better one
        other, core, mixing = fit_basis(weights, Metric(), rank, rank_of_core)
        own = _best_core(weights, metric, basis, rank_of_core)
        if _left(weights, metric, other, core, mixing) < _left(weights, metric, basis, *own):
            basis = other
    best: tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    for _ in range(SWEEPS):
        basis = np.linalg.qr(basis.T)[0].T  # only the space it spans counts
        core, mixing = _best_core(weights, metric, basis, rank_of_core)
        reads = np.tensordot(mixing, core, 1)  # (M, rank, Q)
        left = _left(weights, metric, basis, core, mixing)
        if best is None or left < best[0]:
            found = (basis, core, mixing)
            finished = best is not None and left > best[0] * (1 - ENOUGH)
            best = (left, found)
        else:
            finished = True
        if finished or rank == kept:
            break
        basis = descend(
            basis,
            lambda v, reads=reads: np.tensordot(reads, v, ([1], [0])).swapaxes(1, 2).reshape(outputs, -1),
            lambda e, reads=reads: np.tensordot(reads, e.reshape(outputs, kept, rest), ([0, 2], [0, 2])),
            np.tensordot(reads, reads, ([0, 2], [0, 2])),
            target,
            metric,
            STEPS,
        )
    assert best is not None
    return best[1]


def _best_core(
    weights: np.ndarray, metric: Metric, basis: np.ndarray, rank_of_core: int
) -> tuple[np.ndarray, np.ndarray]:
    """The core (rank_of_core, rank, Q) and U (M, rank_of_core), orthonormal, best for this V."""
    rest = weights.shape[2]
    seen, gram = _regression_terms(weights, metric, np.kron(basis, np.eye(rest)))
    free = seen @ invert(gram)
    vectors = components(free, Metric(gram))[1][:, :rank_of_core]
    return (vectors.T @ free).reshape(rank_of_core, len(basis), rest), vectors


def _left(weights: np.ndarray, metric: Metric, basis: np.ndarray, core: np.ndarray, mixing: np.ndarray) -> float:
    """The energy that U core V loses."""
    reads = np.tensordot(mixing, core, 1)
    return metric.energy((weights - np.einsum("mrq,rp->mpq", reads, basis)).reshape(len(weights), -1))


def _regression_terms(weights: np.ndarray, metric: Metric, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W K A' and A K A' for a design A (n, taps)."""
    through = metric.times(design)
    return weights.reshape(len(weights), -1) @ through.T, design @ through.T
