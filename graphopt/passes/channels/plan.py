"""Which classes of channels are cut, and cutting them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import ChannelGraph


@dataclass(frozen=True)
class Plan:
    """The roots of the classes to cut from `channels.model`."""

    channels: ChannelGraph
    cut: frozenset[int]

    def kept(self, labels: np.ndarray) -> np.ndarray:
        """Booleans: which of these labels stay."""
        return ~np.isin(self.channels.classes.roots(labels), list(self.cut))

    def kept_of(self, value: ir.Value) -> tuple[int, np.ndarray] | None:
        """The axis along which `value` loses channels and which of them stay; None when it keeps all."""
        found = self.channels.carried.get(value)
        if found is None:
            return None
        stays = self.kept(found.labels)
        return None if stays.all() else (found.axis, stays)

    def apply(self) -> None:
        """Cut them out of the model, in place. Raises ValueError: a value would lose all its channels."""
        shorter: list[tuple[ir.Value, int, int]] = []
        for value in self.channels.carried:
            cut = self.kept_of(value)
            if cut is not None:
                if not cut[1].any():
                    raise ValueError(f"the plan leaves {value.name!r} no channels")
                shorter.append((value, cut[0], int(cut[1].sum())))
        graph = self.channels.model.graph
        for edit in self.channels.edits:
            edit.apply(graph, self.kept)
        for value, axis, count in shorter:
            if value.shape is not None:
                value.shape = ir.Shape([count if a == axis else d for a, d in enumerate(value.shape)])
        g.remove_unused_initializers(graph)
