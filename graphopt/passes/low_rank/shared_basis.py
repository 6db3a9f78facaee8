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

from functools import cached_property

import numpy as np

from graphopt.passes.low_rank.metric import Metric, descend, regress, roots
from graphopt.passes.low_rank.svd import components

SWEEPS = 12
STEPS = 8
ENOUGH = 1e-3
"""A sweep that lowers the error by less than this share is the last."""


class SharedBasis:
    """Fits `weights`, (M, P, Q), in a metric of P Q taps."""

    def __init__(self, weights: np.ndarray, metric: Metric):
        self.weights, self.metric = weights, metric
        self.rows = weights.reshape(len(weights), -1)
        self.seen = metric.times(self.rows)
        """W K."""
        self._explained: dict[int, np.ndarray] = {}

    @cached_property
    def start(self) -> np.ndarray:
        """V for every rank at once, (P, P): its first R rows are the start for R.

        Right singular vectors of W, whitened by the mean covariance of P: the best V where P and Q are uncorrelated.
        """
        outputs, kept, rest = self.weights.shape
        rows = self.weights.transpose(0, 2, 1).reshape(outputs * rest, kept)
        covariance = self.metric.over(kept)
        if covariance is None:
            return components(rows.T, Metric())[1].T
        root, inverse = roots(covariance)
        return components(root @ rows.T, Metric())[1].T @ inverse

    def start_error(self, rank: int, rank_of_core: int) -> float:
        """The error before any sweep: what `fit` starts from, so never less than what it reaches."""
        if rank not in self._explained:
            seen, gram = self._start_terms
            part = slice(0, rank * self.weights.shape[2])
            explained = regress(seen[:, part], gram[part, part]) @ seen[:, part].T
            self._explained[rank] = np.maximum(np.linalg.eigvalsh(explained)[::-1], 0.0)
        return max(0.0, self.total - float(self._explained[rank][:rank_of_core].sum()))

    @cached_property
    def total(self) -> float:
        """The energy of the weights."""
        return max(0.0, float(np.vdot(self.rows, self.seen)))

    @cached_property
    def _start_terms(self) -> tuple[np.ndarray, np.ndarray]:
        return self._regression_terms(self.start)

    @cached_property
    def _plain(self) -> SharedBasis:
        return SharedBasis(self.weights, Metric())

    def fit(self, rank: int, rank_of_core: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """V (rank, P), the core (rank_of_core, rank, Q) and U (M, rank_of_core) with W ~ U core V."""
        outputs, kept, rest = self.weights.shape
        basis = self.start[:rank]
        if self.metric.covariance is not None:  # a fit to the weights is another start, seldom the better one
            other, core, mixing = self._plain.fit(rank, rank_of_core)
            own = self._best_core(basis, rank_of_core)
            if self._left(other, core, mixing) < self._left(basis, *own):
                basis = other
        best: tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        for _ in range(SWEEPS):
            basis = np.linalg.qr(basis.T)[0].T  # only the space it spans counts
            core, mixing = self._best_core(basis, rank_of_core)
            reads = np.tensordot(mixing, core, 1)  # (M, rank, Q)
            left = self._left(basis, core, mixing)
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
                self.rows,
                self.metric,
                STEPS,
            )
        assert best is not None
        return best[1]

    def _best_core(self, basis: np.ndarray, rank_of_core: int) -> tuple[np.ndarray, np.ndarray]:
        """The core (rank_of_core, rank, Q) and U (M, rank_of_core), orthonormal, best for this V."""
        seen, gram = self._regression_terms(basis)
        free = regress(seen, gram)
        vectors = components(free, Metric(gram))[1][:, :rank_of_core]
        return (vectors.T @ free).reshape(rank_of_core, len(basis), self.weights.shape[2]), vectors

    def _left(self, basis: np.ndarray, core: np.ndarray, mixing: np.ndarray) -> float:
        """The energy that U core V loses."""
        product = np.tensordot(np.tensordot(mixing, core, 1), basis, ([1], [0])).swapaxes(1, 2)
        return self.metric.energy(self.rows - product.reshape(self.rows.shape))

    def _regression_terms(self, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W K A' and A K A' for the design A = V x I, (rank Q, P Q).

        A is never made: most of it is zeros.
        """
        _, kept, rest = self.weights.shape
        count = len(basis) * rest
        seen = _behind(self.seen, basis, rest)
        if self.metric.covariance is None:
            return seen, np.kron(basis @ basis.T, np.eye(rest))
        through = (basis @ self.metric.covariance.reshape(kept, -1)).reshape(count, kept * rest)
        return seen, _behind(through, basis, rest)


def _behind(rows: np.ndarray, basis: np.ndarray, rest: int) -> np.ndarray:
    """rows A' (n, rank Q) for rows (n, P Q) and A = V x I."""
    return np.matmul(basis, rows.reshape(len(rows), -1, rest)).reshape(len(rows), -1)
