"""Classes that lie in the same values, and how many channels each value must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphopt.passes.channels.dependency import ChannelGraph


@dataclass(frozen=True)
class Family:
    """Classes that may be cut one for another: they have as many labels in each of the same values."""

    roots: tuple[int, ...]
    width: int
    """Channels of a layer's output that one class stands for: 1, or more where groups are cut alike."""


class Room:
    """How many channels every value has left, and whether cutting more leaves it enough."""

    def __init__(self, channels: ChannelGraph, least: int):
        arrays = {tuple(channels.classes.roots(c.labels).tolist()) for c in channels.carried.values()}
        self._left = [len(array) for array in sorted(arrays)]
        self._least = [min(least, len(array)) for array in sorted(arrays)]
        self._in: dict[int, Counter[int]] = {}
        for index, array in enumerate(sorted(arrays)):
            for root in array:
                self._in.setdefault(root, Counter())[index] += 1

    def places(self, root: int) -> tuple[tuple[int, int], ...]:
        """The values that the class has labels in, and how many."""
        return tuple(sorted(self._in.get(root, Counter()).items()))

    def fits(self, roots: Iterable[int]) -> bool:
        """Whether every value is left with enough channels when these classes are cut."""
        return all(self._left[index] - lost >= self._least[index] for index, lost in self._loss(roots).items())

    def take(self, roots: Sequence[int]) -> bool:
        """Cut these classes; False, cutting nothing, where a value would be left with too few channels."""
        if not self.fits(roots):
            return False
        for index, lost in self._loss(roots).items():
            self._left[index] -= lost
        return True

    def _loss(self, roots: Iterable[int]) -> Counter[int]:
        loss: Counter[int] = Counter()
        for root in roots:
            loss.update(self._in.get(root, Counter()))
        return loss


def families(channels: ChannelGraph, room: Room) -> list[Family]:
    """All classes that may be cut, by family; those that no layer writes (padding alone, say) are left alone."""
    widths: dict[int, int] = {}
    for site in channels.writes:
        counts = Counter(channels.classes.roots(site.labels).tolist())
        for root, count in counts.items():
            widths[root] = min(count, widths.get(root, count))
    found: dict[tuple, list[int]] = {}
    for root, width in widths.items():
        if channels.classes.frozen(root) is None:
            found.setdefault((room.places(root), width), []).append(root)
    return [Family(tuple(sorted(roots)), key[1]) for key, roots in found.items()]
