"""Every layer's integers, scales and zero points, by one of three methods.

nearest   scales that clip nothing, rounding to nearest.
hqq       scales and zero points refined without data (see `half_quadratic`), rounding to nearest.
gptq      both of these and second-order rounding on either grid: of each row, the one that changes the output least,
          in mean square over the calibration data. So never worse there than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.passes.base import Context
from graphopt.passes.block_quantization.grid import Blocks, Grid, eight_bits, no_clipping
from graphopt.passes.block_quantization.half_quadratic import refine
from graphopt.passes.block_quantization.layout import Layout, layout
from graphopt.passes.layer_moments import for_each_layer
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.second_order import DAMPING, in_order, inverse_factors, output_error, permuted
from graphopt.passes.weight_layers import WeightLayer

Method = Literal["nearest", "hqq", "gptq"]
REFITS = 1
"""Turns of fitting scales: more fit the calibration data better and other data no better."""


@dataclass(frozen=True)
class Recipe:
    """How weights are made into integers."""

    bits: Literal[4, 8]
    block: int
    symmetric: bool
    method: Method
    correct_bias: bool


@dataclass(frozen=True)
class Quantized:
    """Of one layer. `integers` int8 or uint8 (groups, rows, taps), all other values in `grid`."""

    layout: Layout
    grid: Grid
    integers: np.ndarray
    shift: np.ndarray | None
    """float64 (channels,): what rounding takes from the mean output, for the bias; None: not to be corrected."""
    second_order: bool
    """Whether data decided how its weights are rounded."""

    def rows(self) -> np.ndarray:
        """float64 (groups, rows, taps): the weights these integers stand for."""
        return self.grid.values(self.integers.astype(np.int64))

    @property
    def bits(self) -> int:
        return 8 if self.grid.high > 15 else 4

    @property
    def is_unsigned(self) -> bool:
        """Whether there are zero points."""
        return self.grid.low == 0

    @property
    def bytes(self) -> int:
        """Of integers, scales and zero points, as they are stored."""
        points = self.grid.zeros.size if self.is_unsigned else 0
        return -(-self.integers.size * self.bits // 8) + self.grid.scales.nbytes + -(-points * self.bits // 8)


def round_layers(
    model: ir.Model, layers: Sequence[WeightLayer], recipe: Recipe, context: Context
) -> dict[WeightLayer, Quantized]:
    """All `layers`; with calibration data where `recipe` asks for any and there is some.

    Raises ModelError and DataError as `collect_statistics` does.
    """
    uses_data = recipe.method == "gptq" or recipe.correct_bias
    return for_each_layer(model, layers, recipe, partial(round_layer, recipe), context, uses_data)


def round_layer(recipe: Recipe, each: WeightLayer, moments: Moments | None) -> Quantized:
    """One layer; `moments` of its input, or None without data."""
    rows = each.rows()
    if recipe.bits == 8:
        where = layout(each, 0)
        grids = [eight_bits(rows)]
    else:
        where = layout(each, recipe.block)
        grids = [no_clipping(rows, where.block_of, recipe.symmetric)]
        if recipe.method != "nearest":
            grids.append(refine(rows, grids[0], recipe.symmetric))
    norm = each.norm(moments, recipe.correct_bias) if moments is not None and recipe.method == "gptq" else None
    if norm is None:
        grid = grids[-1]
        integers = grid.round(rows)
    else:
        grid, integers = round_for_outputs(rows, grids, norm)
    shift = None
    if moments is not None and recipe.correct_bias and each.takes_bias:
        shift = each.shift(rows - grid.values(integers), moments)
    kind = np.uint8 if grid.low == 0 else np.int8
    return Quantized(where, grid, integers.astype(kind), shift, norm is not None)


def round_for_outputs(rows: np.ndarray, grids: Sequence[Grid], norm: np.ndarray) -> tuple[Grid, np.ndarray]:
    """By row, the least error in `norm` of: nearest and second-order rounding on each of `grids`, and then scales
    fitted to the outputs and second-order rounding on these, in turns.

    `rows` (groups, rows, taps), `norm` (groups, taps, taps); integers int64, shape of `rows`.
    """
    order = np.argsort(-np.diagonal(norm, axis1=1, axis2=2), axis=1, kind="stable")
    factors = inverse_factors(permuted(norm, order))
    best, integers = grids[0], grids[0].round(rows)
    least = output_error(rows - best.values(integers), norm)

    def consider(grid: Grid, candidate: np.ndarray) -> None:
        nonlocal best, integers, least
        error = output_error(rows - grid.values(candidate), norm)
        better = error < least
        least = np.where(better, error, least)
        integers = np.where(better[..., None], candidate, integers)
        best = best.rows_from(grid, better)

    for grid in grids:
        consider(grid, grid.round(rows))
        consider(grid, second_order(rows, grid, order, factors))
    for _ in range(REFITS):
        grid = fit_scales(rows, best, integers, norm)
        consider(grid, integers)
        consider(grid, second_order(rows, grid, order, factors))
    return best, integers


def fit_scales(rows: np.ndarray, grid: Grid, integers: np.ndarray, norm: np.ndarray) -> Grid:
    """Scales that, with these integers, change the outputs least: with v = q - z by block, s = (v C v')^-1 v C w'.

    Rows whose solution has a scale that is not positive keep theirs.
    """
    blocks = Blocks(grid.block_of)
    offsets = (integers - grid.zeros[..., grid.block_of]).astype(np.float64)
    scales = grid.scales.copy()
    count = scales.shape[2]
    for group, moments in enumerate(norm):
        offset = offsets[group]
        system = np.empty((len(offset), count, count))
        for block in range(count):
            (taps,) = np.nonzero(grid.block_of == block)
            system[..., block] = blocks.reduce(np.add, offset * (offset[:, taps] @ moments[taps]))
        level = 1e-2 * DAMPING * np.diagonal(system, axis1=1, axis2=2).mean(axis=1)
        level = np.where(level > 0, level, 1.0)  # of a row of zeros nothing is known: it keeps its scales
        system += level[:, None, None] * np.eye(count)
        right = blocks.reduce(np.add, offset * (rows[group] @ moments)) + level[:, None] * scales[group]
        try:
            found = np.linalg.solve(system, right[..., None])[..., 0].astype(np.float32)
        except np.linalg.LinAlgError:  # moments too indefinite for the damping
            continue
        usable = (np.isfinite(found) & (found > 0)).all(axis=1)
        scales[group, usable] = found[usable]
    return Grid(grid.block_of, scales, grid.zeros, grid.low, grid.high)


def second_order(rows: np.ndarray, grid: Grid, order: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Integers of `rows`, each error made up for in the taps behind it; `order` (groups, taps) says which come first.

    `factors`: of the second moments in that order.
    """
    groups, count, taps = rows.shape
    block = np.broadcast_to(grid.block_of, (groups, taps))
    block = np.take_along_axis(block, order, 1)  # (groups, taps): differs by group, as the order does
    each = np.arange(groups)
    scales = grid.scales.astype(np.float64)
    integers = np.empty((groups, count, taps), np.int64)

    def choose(tap: int, left: np.ndarray) -> np.ndarray:
        scale, zero = scales[each, :, block[:, tap]], grid.zeros[each, :, block[:, tap]]
        nearest = (np.rint(left[..., tap] / scale) + zero).clip(grid.low, grid.high)
        integers[..., tap] = nearest
        return (nearest - zero) * scale

    in_order(np.take_along_axis(rows, order[:, None, :], 2), factors, choose)
    return np.take_along_axis(integers, np.argsort(order, axis=1)[:, None, :], 2)
