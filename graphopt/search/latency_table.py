"""How long each layer takes for each amount of arithmetic, measured on the target in runs of whole models.

A few versions of the model are compiled, in each of which one pass has done the same everywhere, and every kernel is
timed where it lies. So a layer has, for each pass, a handful of points (share of its MACs, seconds), with what is fused
behind it and what converts values at its borders; between points time is interpolated, behind the last it goes on as
between the last two. A pass that stores a layer otherwise and leaves its arithmetic has one point there. Several passes
on one layer count as if each took its share of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphopt.search.choices import Choice, Selection
from graphopt.search.layers import Amounts


@dataclass
class LatencyTable:
    """`macs` and `seconds` by layer of the model before anything is chosen; `rest`: seconds of kernels of no layer."""

    macs: Mapping[str, float]
    seconds: Mapping[str, float]
    rest: float
    points: dict[tuple[str, str], dict[float, float]] = field(default_factory=dict)
    """By pass and layer: MACs -> seconds."""
    stored: dict[tuple[str, str], float] = field(default_factory=dict)
    """By pass and layer: seconds of the same arithmetic with weights stored as the pass does."""

    @property
    def total(self) -> float:
        """Seconds of all kernels before anything is chosen."""
        return sum(self.seconds.values()) + self.rest

    def add(self, pass_name: str, macs: Mapping[str, Amounts], seconds: Mapping[str, float]) -> None:
        """What was measured in one version of the model, of the layers whose arithmetic is another there."""
        for layer, amount in macs.items():
            if amount.macs <= 0 or layer not in seconds:
                continue
            if amount.macs == self.macs.get(layer):
                self.stored[pass_name, layer] = seconds[layer]
            else:
                self.points.setdefault((pass_name, layer), {})[amount.macs] = seconds[layer]

    def store(self, pass_name: str, seconds: Mapping[str, float]) -> None:
        """What layers take as the pass stores them, in place of what was known."""
        self.stored.update({(pass_name, layer): each for layer, each in seconds.items()})

    def forget(self, pass_name: str) -> None:
        """The pass makes no layer faster by storing it."""
        self.stored.update({key: self.seconds.get(key[1], 0.0) for key in self.stored if key[0] == pass_name})

    def useless(self, pass_name: str, nodes: Sequence[str]) -> bool:
        """Whether it is known that the pass makes none of these layers faster: it leaves their arithmetic."""
        return bool(nodes) and all(
            self.stored.get((pass_name, node), 0.0) >= self.seconds.get(node, 0.0) > 0.0 for node in nodes
        )

    def layer(self, layer: str, choices: Sequence[Choice]) -> float:
        """Seconds of a layer with these choices, all of which change it."""
        before, macs = self.seconds.get(layer, 0.0), self.macs.get(layer, 0.0)
        if not macs:  # it is new: only what was timed of it is known
            return sum(self._at(c.pass_name, layer, c.after[layer].macs, 0.0, 0.0) for c in choices)
        taken = before
        shares: dict[str, float] = {}
        for choice in choices:
            if choice.after[layer].macs == macs:
                taken *= self.stored.get((choice.pass_name, layer), before) / before if before else 0.0
                continue
            shares[choice.pass_name] = shares.get(choice.pass_name, 1.0) * choice.after[layer].macs / macs
        for name, share in shares.items():
            taken *= self._at(name, layer, share * macs, macs, before) / before if before else 0.0
        return taken

    def predict(self, selection: Selection) -> float:
        """Seconds of all kernels with these choices."""
        touching: dict[str, list[Choice]] = {}
        for choice in selection.values():
            for layer in choice.after:
                touching.setdefault(layer, []).append(choice)
        kept = sum(seconds for layer, seconds in self.seconds.items() if layer not in touching)
        return self.rest + kept + sum(self.layer(layer, choices) for layer, choices in touching.items())

    def _at(self, pass_name: str, layer: str, macs: float, macs_before: float, before: float) -> float:
        if macs <= 0:
            return 0.0
        known = dict(self.points.get((pass_name, layer), {}))
        if macs_before:
            known[macs_before] = before
        if not known:
            return 0.0
        if len(known) == 1 and macs_before:
            return before  # nothing was measured: nothing is promised
        at, taken = (np.array(each) for each in zip(*sorted(known.items()), strict=True))
        if macs < at[0] and len(at) > 1:
            slope = (taken[1] - taken[0]) / (at[1] - at[0])
            return float(max(taken[0] - max(slope, 0.0) * (at[0] - macs), taken[0] * macs / at[0]))
        return float(np.interp(macs, at, taken))
