"""What can be chosen: offers of passes with what they save and cost, sets of them, and the pipelines they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.passes.base import Offer, Pass
from graphopt.passes.refit_layers import RefitLayers
from graphopt.pipeline import Pipeline
from graphopt.search.layers import Amounts


@dataclass(frozen=True)
class Choice:
    """An offer of a pass, taken alone, in full precision, against the unchanged model."""

    pass_name: str
    site: str
    value: str
    nodes: tuple[str, ...]
    """As in `Offer`."""
    after: Mapping[str, Amounts]
    """Of the layers that it changes, by original node; zero for those that go away."""
    noise: float
    """What it does to the outputs on calibration samples: see `graphopt.search.sensitivity`."""
    agreement: float | None
    """Share of these samples with the same largest output, in percent; None where outputs are not classes."""
    renames: bool = False
    quantizes: bool = False
    """As its pass says. Those that quantize come last, with the names that others left."""

    @property
    def place(self) -> tuple[str, str]:
        """Of choices with one place at most one can be taken."""
        return self.pass_name, self.site

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs besides the offer; noise that was not measured is None."""
        return {
            "after": {layer: [amount.macs, amount.bytes] for layer, amount in self.after.items()},
            "noise": self.noise if math.isfinite(self.noise) else None,
            "agreement": self.agreement,
        }

    @classmethod
    def from_dict(cls, each: Pass, offer: Offer, content: Mapping[str, Any]) -> Choice:
        """The choice of an offer of `each` of which `content` is known."""
        after = {layer: Amounts(*numbers) for layer, numbers in content["after"].items()}
        noise = math.inf if content["noise"] is None else content["noise"]
        return cls(
            each.name, offer.site, offer.value, offer.nodes, after, noise, content["agreement"], each.renames,
            each.quantizes,
        )  # fmt: skip


Selection = Mapping[tuple[str, str], Choice]
"""The choices taken, by place."""


def gone(choice: Choice) -> frozenset[str]:
    """Nodes that the choice takes out of the model under their name: no other choice can be made there."""
    return frozenset(node for node in choice.nodes if node in choice.after and choice.after[node].macs == 0)


def shuts_out(choice: Choice, other: Choice) -> bool:
    """Whether the pass of `other` no longer finds its site once `choice` is made."""
    return other.site in gone(choice) or (choice.renames and other.quantizes and other.site in choice.nodes)


def with_choice(selection: Selection, choice: Choice) -> dict[tuple[str, str], Choice] | None:
    """`selection` with `choice` in its place and without what is then impossible; None where another forbids it."""
    others = {place: other for place, other in selection.items() if place != choice.place}
    if any(shuts_out(other, choice) for other in others.values()):
        return None
    kept = {place: other for place, other in others.items() if not shuts_out(choice, other)}
    return {**kept, choice.place: choice}


def pipeline_of(selection: Selection, offering: Sequence[Pass], base: Pipeline) -> Pipeline:
    """The lossy part of a pipeline: the passes that take what is selected, in the order of `offering`, then all layers
    solved again, then `base`. Those that quantize come right before what quantizes in `base`, which leaves alone what
    they have stored.

    What `base` leaves float stays so, where it is still there under its name.
    """
    passes: list[Pass] = []
    storing: list[Pass] = []
    for each in offering:
        values = tuple(choice.value for choice in selection.values() if choice.pass_name == each.name)
        if values:
            taking = dataclasses.replace(each, **{each.takes: values})  # pyright: ignore[reportArgumentType]
            (storing if each.quantizes else passes).append(taking)
    renamed = {node for choice in selection.values() if choice.renames for node in choice.nodes}
    if passes:
        passes.append(RefitLayers())
    rest = [_without(each, renamed) for each in base.passes]
    first = next((index for index, each in enumerate(rest) if each.quantizes), len(rest))
    return Pipeline((*passes, *rest[:first], *storing, *rest[first:]))


def _without(each: Pass, renamed: set[str]) -> Pass:
    excluded: tuple[str, ...] = getattr(each, "exclude", ())
    if not renamed.intersection(excluded):
        return each
    kept = tuple(name for name in excluded if name not in renamed)
    return dataclasses.replace(each, exclude=kept)  # pyright: ignore[reportCallIssue,reportArgumentType]
