"""Channels taken out of one layer one after another, the weights of the others solved again each time.

With C the second moments of the layer's input, H = C + damping, cutting the taps S at the least change of the output
moves the weights by W_S ((H^-1)_SS)^-1 (H^-1)_S: and adds tr(W_S ((H^-1)_SS)^-1 W_S') to the output's squared error.
H^-1 of the taps that are left follows by eliminating S.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.passes.quantization.moments import Moments
from graphopt.passes.second_order import DAMPING


class Removal:
    """The state of one layer: its weights and the inverse of its input's second moments.

    `weights`: (groups, outputs, taps); `roots`: of the classes of its channels, taps / len(roots) taps each, in order;
    `members`: the classes that may be taken.
    """

    def __init__(self, weights: np.ndarray, moments: Moments, roots: np.ndarray, members: Sequence[int]):
        assert moments.covariance is not None
        taps = weights.shape[2]
        hessian = moments.covariance.copy()
        level = np.trace(hessian, axis1=1, axis2=2) / taps
        hessian += (DAMPING * np.where(level > 0, level, 1.0))[:, None, None] * np.eye(taps)
        self.energy = float(np.einsum("got,gts,gos->", weights, moments.covariance, weights)) or 1.0
        self.inverse = np.linalg.inv(hessian)
        self.weights = weights.copy()
        size = taps // len(roots)
        self.taps = [(np.flatnonzero(roots == root)[:, None] * size + np.arange(size)).reshape(-1) for root in members]
        self.alive = np.array([len(taps) > 0 for taps in self.taps])
        sizes = np.array([len(taps) for taps in self.taps])
        self.alike = [np.flatnonzero(sizes == count) for count in sorted(set(sizes.tolist()) - {0})]
        self.stacks = [np.stack([self.taps[index] for index in members]) for members in self.alike]

    def costs(self) -> np.ndarray:
        """What taking each member adds to the squared error, as a share of the output's energy; 0 for those taken."""
        found = np.zeros(len(self.taps))
        for members, stack in zip(self.alike, self.stacks, strict=True):
            alive = self.alive[members]
            taps = stack[alive]
            blocks = self.inverse[:, taps[:, :, None], taps[:, None, :]]
            part = self.weights[:, :, taps].transpose(0, 2, 3, 1)
            solved = part / blocks if blocks.shape[-1] == 1 else np.linalg.solve(blocks, part)
            found[members[alive]] = (part * solved).sum(axis=(0, 2, 3)) / self.energy
        return found

    def take(self, index: int) -> None:
        """Take a member out; the other weights make up for it."""
        if not self.alive[index]:
            return
        self.alive[index] = False
        taps = self.taps[index]
        rows = self.inverse[:, taps, :]
        solved = np.linalg.solve(rows[:, :, taps], rows)
        self.weights -= self.weights[:, :, taps] @ solved
        self.inverse -= rows.transpose(0, 2, 1) @ solved
        self.weights[:, :, taps] = 0.0
