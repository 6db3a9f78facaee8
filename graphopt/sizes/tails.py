"""What is known of the elements behind a tensor's real ones, when a dimension was padded.

An axis of a padded dimension holds n real elements and then others, up to its size. What `padding` shows of every
tensor is that its real elements are those that the unpadded model computes. Of the elements behind them, those that
are real along all other axes, a `Tail` says as much as is needed to show that for the next node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LOW = -1e4
"""What a mask adds at least, to scores of a much smaller magnitude: exp(x - 1e4) is 0 in every float type."""


@dataclass(frozen=True)
class Tail:
    """What the elements behind the real ones along one axis are."""

    kind: str
    """`value`: all the same number; `low`: all so negative that exp of them is 0; `finite`: numbers; `any`."""
    value: np.ndarray | None = None
    """Of kind `value`: that number, an array of one element and the tensor's type."""
    masks: frozenset[tuple[str, int]] = frozenset()
    """The inputs, and their axes, whose padding made them so."""

    @property
    def is_zero(self) -> bool:
        return self.value is not None and not self.value.any()

    @property
    def is_low(self) -> bool:
        return self.kind == "low" or (
            self.value is not None and self.value.dtype.kind == "f" and bool((self.value <= LOW).all())
        )

    @property
    def is_finite(self) -> bool:
        """Whether none of them is infinite or not a number."""
        return self.kind == "finite" or (self.value is not None and bool(np.isfinite(self.value).all()))


ANY, FINITE = Tail("any"), Tail("finite")


def same(value: object, masks: frozenset[tuple[str, int]] = frozenset()) -> Tail:
    """All the same number: an array of one element."""
    return Tail("value", np.asarray(value).reshape(1), masks)


def either(tails: Iterable[Tail]) -> Tail:
    """What holds of elements that are of one of these tails."""
    found = list(tails)
    first, masks = found[0], frozenset[tuple[str, int]]().union(*(t.masks for t in found))
    if first.value is not None and all(
        t.value is not None and t.value.dtype == first.value.dtype and np.array_equal(t.value, first.value)
        for t in found
    ):
        return Tail("value", first.value, masks)
    if all(t.is_low for t in found):
        return Tail("low", None, masks)
    return FINITE if all(t.is_finite for t in found) else ANY
