"""Multiply-accumulates of a model while channels are being cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph, Site
from graphopt.passes.layer_macs import layer_macs


class Work:
    """MACs of every layer, for the channels that are left; for dynamic dimensions a size is assumed (`layer_macs`)."""

    def __init__(self, channels: ChannelGraph):
        macs = layer_macs(channels.model)
        self._nodes = sorted({s.node for s in (*channels.reads, *channels.writes)}, key=lambda n: g.label(n))
        index = {node: i for i, node in enumerate(self._nodes)}
        self._base = np.array([macs[node] for node in self._nodes], float)
        self.total = float(sum(macs.values()))
        self._sizes = np.ones((2, len(self._nodes)))
        self._lost: dict[int, Counter[tuple[int, int]]] = {}
        for side, sites in enumerate((channels.writes, channels.reads)):
            for site in sites:
                self._sizes[side, index[site.node]] = len(site.labels)
                for root in channels.classes.roots(site.labels).tolist():
                    self._lost.setdefault(root, Counter())[side, index[site.node]] += 1
        self._left = self._sizes.copy()

    @property
    def left(self) -> float:
        """MACs that are left."""
        return float((self._base * np.prod(self._left / self._sizes, axis=0)).sum() + self.total - self._base.sum())

    def saving(self, roots: Iterable[int]) -> float:
        """MACs that cutting these classes saves now."""
        loss: Counter[tuple[int, int]] = Counter()
        for root in roots:
            loss.update(self._lost.get(root, Counter()))
        nodes = sorted({node for _, node in loss})
        share = self._left[:, nodes] / self._sizes[:, nodes]
        less = np.array([[loss[side, node] for node in nodes] for side in (0, 1)]) / self._sizes[:, nodes]
        return float((self._base[nodes] * (np.prod(share, axis=0) - np.prod(share - less, axis=0))).sum())

    def take(self, roots: Iterable[int]) -> None:
        """Cut these classes."""
        for root in roots:
            for (side, node), lost in self._lost.get(root, Counter()).items():
                self._left[side, node] -= lost


def weights_of(site: Site) -> np.ndarray:
    """The site's weights."""
    array = g.constant_of(site.node.inputs[1])
    assert array is not None
    return array
