"""Pruning one layer's rows by one of three methods.

magnitude   the smallest |w| of the layer go.
wanda       of each row those with the smallest |w_t| |x_t| go, |x_t| the root mean square of what the tap multiplies;
            about its mean, where the bias takes back the mean error.
sparsegpt   in runs of taps those with the smallest w_t^2 / U_tt^2 go, and the taps behind them make up for it (see
            `second_order`). Other than in the paper all weights that stay are then solved for at once: the least
            squares that the update, which only reaches later taps, comes close to. Of magnitude, the paper's weights
            and these, those that change the output least are taken.

With an N:M pattern each method chooses within M consecutive weights of a row: input channels at one place of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.passes.quantization.moments import Moments
from graphopt.passes.second_order import DAMPING, LAZY, in_order, inverse_factors, output_error, permuted
from graphopt.passes.sparsity.masks import Pattern, lowest, lowest_of_rows
from graphopt.passes.weight_layers import WeightLayer

Method = Literal["magnitude", "wanda", "sparsegpt"]
RUN = 128
"""Taps within which sparsegpt chooses, without a pattern."""


@dataclass(frozen=True)
class Plan:
    """`sparsity`: the share of weights to remove, where there is no `pattern`."""

    method: Method
    sparsity: float
    pattern: Pattern | None
    correct_bias: bool


@dataclass(frozen=True)
class Pruned:
    """`rows` float32 (groups, rows, taps); `shift` float64 (channels,) for the bias, or None."""

    rows: np.ndarray
    shift: np.ndarray | None
    by_data: bool


def prune_layer(plan: Plan, each: WeightLayer, moments: Moments | None) -> Pruned:
    """The layer's pruned weights; `moments` of its input, or None without data."""
    rows = each.rows()
    norm = each.norm(moments, plan.correct_bias) if moments is not None and plan.method != "magnitude" else None
    order = channels_last(each)
    arranged = rows[..., order]
    if norm is None:
        kept = by_magnitude(arranged, plan)
    else:
        everywhere = np.broadcast_to(order, (len(rows), len(order)))
        kept = (by_activation if plan.method == "wanda" else by_second_order)(
            arranged, plan, permuted(norm, everywhere)
        )
    stored = kept[..., np.argsort(order)].astype(np.float32)
    shift = None
    if moments is not None and plan.correct_bias and each.takes_bias:
        shift = each.shift(rows - stored, moments)
    return Pruned(stored, shift, norm is not None)


def channels_last(each: WeightLayer) -> np.ndarray:
    """The taps (taps,) in the order (kH, kW, C/group): in which N:M patterns are consecutive."""
    inputs = each.weights.shape[1] if each.node.op_type == "Conv" else each.taps
    return np.arange(each.taps).reshape(inputs, -1).T.reshape(-1)


def by_magnitude(rows: np.ndarray, plan: Plan) -> np.ndarray:
    """`rows` (groups, rows, taps) with zeros where |w| is least."""
    scores = np.abs(rows)
    if plan.pattern is not None:
        return np.where(plan.pattern.mask(scores), rows, 0.0)
    return np.where(lowest(scores, round(plan.sparsity * rows.size)), 0.0, rows)


def by_activation(rows: np.ndarray, plan: Plan, norm: np.ndarray) -> np.ndarray:
    """Zeros where |w| times the input's size is least; `norm` (groups, taps, taps), its second moments."""
    size = np.sqrt(np.maximum(np.diagonal(norm, axis1=1, axis2=2), 0.0))
    scores = np.abs(rows) * size[:, None, :]
    if plan.pattern is not None:
        return np.where(plan.pattern.mask(scores), rows, 0.0)
    return np.where(lowest_of_rows(scores, round(plan.sparsity * rows.shape[2])), 0.0, rows)


def by_second_order(rows: np.ndarray, plan: Plan, norm: np.ndarray) -> np.ndarray:
    """Zeros by what they cost after the other taps made up for them, and those taps' new values."""
    factors = inverse_factors(norm)
    power = np.square(np.diagonal(factors, axis1=1, axis2=2))[:, None, :]
    taps = rows.shape[2]
    run = RUN if plan.pattern is None else plan.pattern.of
    lazy = RUN if plan.pattern is None else run * max(1, LAZY // run)
    goes = np.zeros(rows.shape, bool)

    def choose(tap: int, left: np.ndarray) -> np.ndarray:
        if tap % run == 0:
            part = slice(tap, min(tap + run, taps))
            costs = np.square(left[..., part]) / power[..., part]
            if plan.pattern is not None:
                goes[..., part] = ~plan.pattern.mask(costs)
            else:
                each_tap = rows.shape[0] * rows.shape[1]
                until, before = (round(plan.sparsity * each_tap * t) for t in (part.stop, tap))
                goes[..., part] = lowest(costs, until - before)
        return np.where(goes[..., tap], 0.0, left[..., tap])

    kept = in_order(rows, factors, choose, lazy)
    candidates = [by_magnitude(rows, plan), kept, refitted(rows, ~goes, norm)]
    errors = [output_error(rows - candidate, norm).sum() for candidate in candidates]
    return candidates[int(np.argmin(errors))]


def refitted(rows: np.ndarray, mask: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """The weights within `mask` that change the outputs of `rows` least, all of a row solved for at once."""
    found = np.zeros(rows.shape)
    for group, moments in enumerate(damped(norm)):
        wanted = rows[group] @ moments
        for row in range(rows.shape[1]):
            (keep,) = np.nonzero(mask[group, row])
            try:
                found[group, row, keep] = np.linalg.solve(moments[np.ix_(keep, keep)], wanted[row, keep])
            except np.linalg.LinAlgError:  # moments too indefinite for the damping: this row stays as it was
                found[group, row, keep] = rows[group, row, keep]
    return found


def damped(norm: np.ndarray) -> np.ndarray:
    """`norm` (groups, taps, taps) with a share of its mean diagonal added to the diagonal."""
    level = np.diagonal(norm, axis1=1, axis2=2).mean(axis=1)
    level = np.where(level > 0, level, 1.0)
    return norm + DAMPING * level[:, None, None] * np.eye(norm.shape[1])
