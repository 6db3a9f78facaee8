"""Where the channels of an array are after a reshape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.passes.channels.classes import Classes
from graphopt.shapes.dimensions import Size


@dataclass(frozen=True)
class Reshaped:
    """`labels` lie along `axis` of the result. `together`: rows of labels that the result's shape makes one class."""

    axis: int
    labels: np.ndarray
    together: tuple[np.ndarray, ...] = ()


def reshape_labels(
    labels: np.ndarray, axis: int, before: Sequence[Size], after: Sequence[Size], classes: Classes
) -> Reshaped | None:
    """Follow `labels` (length before[axis]) through a row-major reshape; None where unknown sizes hide them.

    Leading and trailing dimensions that are equal stay where they are. What is between is mixed: (C, H, W) -> C*H*W
    repeats each label H*W times; C -> (g, C/g) spreads them over two axes. Only whole slices of an axis can be cut, so
    one axis is chosen, the one that keeps most classes apart, and labels at one index of it are cut together.
    """
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    if axis < start:
        return Reshaped(axis, labels)
    stop = 0
    while stop < min(len(before), len(after)) - start and before[-1 - stop] == after[-1 - stop]:
        stop += 1
    if axis >= len(before) - stop:
        return Reshaped(axis - len(before) + len(after), labels)
    inner, outer = before[start : len(before) - stop], after[start : len(after) - stop]
    sizes = [s for s in inner if isinstance(s, int)]
    shape = [s for s in outer if isinstance(s, int)]
    if len(sizes) < len(inner) or len(shape) < len(outer) or math.prod(sizes) != math.prod(shape):
        return None
    along = labels.reshape([-1 if a == axis - start else 1 for a in range(len(sizes))])
    spread = classes.roots(np.broadcast_to(along, sizes)).reshape(shape)
    options = [a for a, size in enumerate(shape) if size > 1]
    if not options:
        return None
    rows = {a: np.moveaxis(spread, a, 0).reshape(shape[a], -1) for a in options}
    best = max(options, key=lambda a: (_apart(rows[a]), a))
    mixed = tuple(np.unique(row) for row in rows[best])
    return Reshaped(start + best, rows[best][:, 0], tuple(row for row in mixed if len(row) > 1))


def _apart(rows: np.ndarray) -> int:
    """How many classes are left when the labels of each row become one."""
    merged = Classes()
    _, index = np.unique(rows, return_inverse=True)
    index = index.reshape(rows.shape)
    merged.fresh(int(index.max()) + 1)
    for row in index:
        merged.join_all(np.unique(row).tolist())
    return len(set(merged.roots(np.arange(int(index.max()) + 1)).tolist()))
