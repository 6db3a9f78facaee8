"""Scales and zero points that fit the weights better than those that clip nothing, found without data.

Minimise |w - s (q - z)|_p, p < 1, over q, s, z: with an auxiliary e for the error, alternate
    q = round(w / s) + z, clipped;   e = shrink(w - s (q - z));   s, z = least squares of w - e on q.
shrink(x) = sign(x) max(0, |x| - p |x|^(p - 1) / beta), in units of the scale, lets a few large errors be: outliers do
not widen everyone's step. beta grows, so that the last steps are plain least squares.

Other than in the paper the zero point stays an integer of 4 bits, as the format wants, the scale is fitted as well, and
of all steps, from a few first scales, each block keeps the one of least squared error: never worse than where it began.

Reference: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

import numpy as np

from graphopt.passes.block_quantization.grid import Blocks, Grid

STEPS = 12
POWER = 0.7
FIRST_BETA, GROWTH = 1.0, 1.5
FIRST_SCALES = (1.0, 0.85, 0.7)
"""Of the scale that clips nothing: descent ends in the valley it starts in."""
ROWS_AT_ONCE = 1 << 20
"""Weights worked on at a time: copies of all of a large layer would not fit the cache."""


def refine(rows: np.ndarray, start: Grid, symmetric: bool) -> Grid:
    """A grid whose squared error on `rows` (groups, rows, taps) is, in every block, at most that of `start`."""
    groups, count, taps = rows.shape
    flat = rows.reshape(-1, taps)
    scales, zeros = start.scales.reshape(groups * count, -1).copy(), start.zeros.reshape(groups * count, -1).copy()
    step = max(1, ROWS_AT_ONCE // taps)
    blocks = Blocks(start.block_of)
    for first in range(0, len(flat), step):
        part = slice(first, first + step)
        grid = Grid(start.block_of, scales[part][None], zeros[part][None], start.low, start.high)
        found = _refine(flat[part][None], grid, symmetric, blocks)
        scales[part], zeros[part] = found.scales[0], found.zeros[0]
    return Grid(start.block_of, scales.reshape(start.scales.shape), zeros.reshape(start.zeros.shape), start.low,
                start.high)  # fmt: skip


def _refine(rows: np.ndarray, start: Grid, symmetric: bool, blocks: Blocks) -> Grid:
    best = start
    least = squared_error(rows, start, blocks)
    for factor in FIRST_SCALES:
        grid = Grid(start.block_of, (start.scales * factor).astype(np.float32), start.zeros, start.low, start.high)
        beta = FIRST_BETA
        for _ in range(STEPS):
            integers = grid.round(rows)
            error = rows - grid.values(integers)
            now = blocks.reduce(np.add, np.square(error))
            better = now < least
            least = np.where(better, now, least)
            best = Grid(start.block_of, np.where(better, grid.scales, best.scales),
                        np.where(better, grid.zeros, best.zeros), start.low, start.high)  # fmt: skip
            wide = grid.scales.astype(np.float64)[..., start.block_of]
            target = rows - wide * _shrink(error / wide, beta)
            grid = _fitted(target, integers, grid, symmetric, blocks)
            beta *= GROWTH
    return best


def _shrink(error: np.ndarray, beta: float) -> np.ndarray:
    size = np.abs(error)
    return np.sign(error) * np.maximum(0.0, size - POWER * np.maximum(size, 1e-12) ** (POWER - 1) / beta)


def _fitted(target: np.ndarray, integers: np.ndarray, grid: Grid, symmetric: bool, blocks: Blocks) -> Grid:
    """Least squares of `target` on s (q - z) over s and z, then over s alone with z rounded."""
    old = grid.scales.astype(np.float64)
    zeros = grid.zeros
    if not symmetric:
        mean_q = blocks.reduce(np.add, integers.astype(np.float64)) / blocks.sizes
        mean_w = blocks.reduce(np.add, target) / blocks.sizes
        centred = integers - mean_q[..., grid.block_of]
        spread = blocks.reduce(np.add, np.square(centred))
        slope = blocks.reduce(np.add, centred * target)
        free = np.where((spread > 0) & (slope > 0), slope / np.where(spread > 0, spread, 1), old)
        zeros = np.rint(mean_q - mean_w / free).clip(grid.low, grid.high).astype(np.int64)
    offset = (integers - zeros[..., grid.block_of]).astype(np.float64)
    power = blocks.reduce(np.add, np.square(offset))
    slope = blocks.reduce(np.add, offset * target)
    fitted = np.where((power > 0) & (slope > 0), slope / np.where(power > 0, power, 1), old).astype(np.float32)
    return Grid(grid.block_of, np.where(fitted > 0, fitted, grid.scales), zeros, grid.low, grid.high)


def squared_error(rows: np.ndarray, grid: Grid, blocks: Blocks) -> np.ndarray:
    """(groups, rows, blocks): of rounding to nearest on `grid`."""
    return blocks.reduce(np.add, np.square(rows - grid.values(grid.round(rows))))
