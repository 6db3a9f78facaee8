"""Channels that must be kept or cut together: a union-find over labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Classes:
    """Labels are integers from 0; each belongs to a class, named by its root. A frozen class is never cut."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._frozen: dict[int, str] = {}

    def fresh(self, count: int) -> np.ndarray:
        """`count` new labels, each a class of its own; int64 (count,)."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        """The root of a label's class."""
        parent = self._parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """The root of each label, in the shape of `labels`."""
        return np.array([self.find(int(label)) for label in labels.reshape(-1)], np.int64).reshape(labels.shape)

    def join(self, one: int, other: int) -> None:
        """Make two classes one; it is frozen if either was."""
        first, second = sorted((self.find(one), self.find(other)))
        if first == second:
            return
        self._parent[second] = first
        reason = self._frozen.pop(second, None)
        if reason is not None:
            self._frozen.setdefault(first, reason)

    def join_arrays(self, one: np.ndarray, other: np.ndarray) -> None:
        """Join the labels at equal positions of two arrays of one shape."""
        for a, b in zip(one.reshape(-1), other.reshape(-1), strict=True):
            self.join(int(a), int(b))

    def join_all(self, labels: Iterable[int]) -> None:
        """Make one class of all these labels."""
        labels = list(labels)
        for label in labels[1:]:
            self.join(int(labels[0]), int(label))

    def freeze(self, labels: np.ndarray, reason: str) -> None:
        """Never cut these; the first reason given to a class is kept."""
        for root in set(self.roots(labels).reshape(-1).tolist()):
            self._frozen.setdefault(root, reason)

    def frozen(self, root: int) -> str | None:
        """Why the class is never cut; None when it may be."""
        return self._frozen.get(root)
