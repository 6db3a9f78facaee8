"""Which weights are kept: so many of a layer, of a row, or of every M in a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of `of` consecutive weights are not zero."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From "2:4". Raises ValueError."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"pattern {text!r} must be N:M with 0 < N < M, such as 2:4")
        return cls(int(match[1]), int(match[2]))

    def mask(self, scores: np.ndarray) -> np.ndarray:
        """bool (..., taps): of each M, those with the N highest `scores`, the first of equal ones."""
        runs = scores.reshape(*scores.shape[:-1], -1, self.of)
        best = np.argsort(-runs, axis=-1, kind="stable")[..., : self.kept]
        mask = np.zeros(runs.shape, bool)
        np.put_along_axis(mask, best, True, axis=-1)
        return mask.reshape(scores.shape)


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """bool, shape of `scores`: the `count` lowest of all, the first of equal ones."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(scores.reshape(-1), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def lowest_of_rows(scores: np.ndarray, count: int) -> np.ndarray:
    """bool, shape of `scores` (..., taps): the `count` lowest of each row."""
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, np.argsort(scores, axis=-1, kind="stable")[..., :count], True, axis=-1)
    return mask
