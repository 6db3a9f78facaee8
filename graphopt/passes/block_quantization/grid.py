"""The values that 4 (or 8) bits can stand for: s (q - z), with s and z for every block of a row.

Symmetric: z = 0, q from -8 to 7 (INT4); s is the least with which no weight is clipped, max(max w / 7, -min w / 8).
Asymmetric: q and z from 0 to 15 (UINT4); s = (max(w, 0) - min(w, 0)) / 15, z = round(-min(w, 0) / s).
8 bits, for layers that 4 would harm: symmetric, from -127 to 127, one scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.passes.quantization.ranges import MIN_SCALE


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a layer's rows."""

    block_of: np.ndarray
    """int (taps,)."""
    scales: np.ndarray
    """float32 (groups, rows, blocks)."""
    zeros: np.ndarray
    """int64 (groups, rows, blocks)."""
    low: int
    high: int

    def round(self, rows: np.ndarray) -> np.ndarray:
        """The nearest integers, int64, of `rows` (groups, rows, taps)."""
        wide = self.scales.astype(np.float64)[..., self.block_of]
        return (np.rint(rows / wide) + self.zeros[..., self.block_of]).clip(self.low, self.high).astype(np.int64)

    def values(self, integers: np.ndarray) -> np.ndarray:
        """float64: what `integers` (groups, rows, taps) stand for."""
        return (integers - self.zeros[..., self.block_of]) * self.scales.astype(np.float64)[..., self.block_of]

    def rows_from(self, other: Grid, wanted: np.ndarray) -> Grid:
        """This grid, with the scales and zero points of `other` in the rows where `wanted` (groups, rows)."""
        scales = np.where(wanted[..., None], other.scales, self.scales)
        zeros = np.where(wanted[..., None], other.zeros, self.zeros)
        return Grid(self.block_of, scales, zeros, self.low, self.high)


class Blocks:
    """Reductions over the blocks of rows of taps."""

    def __init__(self, block_of: np.ndarray):
        self.block_of = block_of
        self.order = np.argsort(block_of, kind="stable")
        self.starts = np.searchsorted(block_of[self.order], np.arange(block_of.max() + 1))
        self.sizes = np.bincount(block_of)

    def reduce(self, ufunc: np.ufunc, rows: np.ndarray) -> np.ndarray:
        """(..., taps) -> (..., blocks)."""
        return ufunc.reduceat(rows[..., self.order], self.starts, axis=-1)


def no_clipping(rows: np.ndarray, block_of: np.ndarray, symmetric: bool) -> Grid:
    """The 4-bit grid with the least scales that clip no weight of `rows` (groups, rows, taps)."""
    blocks = Blocks(block_of)
    most = np.maximum(blocks.reduce(np.maximum, rows), 0.0)
    least = np.minimum(blocks.reduce(np.minimum, rows), 0.0)
    if symmetric:
        scales = _usable(np.maximum(most / 7, -least / 8))
        return Grid(block_of, scales, np.zeros(scales.shape, np.int64), -8, 7)
    scales = _usable((most - least) / 15)
    zeros = np.rint(-least / scales.astype(np.float64)).clip(0, 15).astype(np.int64)
    return Grid(block_of, scales, zeros, 0, 15)


def eight_bits(rows: np.ndarray) -> Grid:
    """Symmetric, one scale a row."""
    scales = _usable(np.abs(rows).max(axis=2, keepdims=True) / 127)
    return Grid(np.zeros(rows.shape[2], int), scales, np.zeros(scales.shape, np.int64), -127, 127)


def _usable(scales: np.ndarray) -> np.ndarray:
    """float32; blocks of zeros get 1, which every engine takes."""
    return np.where(scales > 0, np.maximum(scales, MIN_SCALE), 1.0).astype(np.float32)
