"""Cutting one layer's outputs down to a number that is asked for, and the numbers worth asking for.

The outputs of a layer may lie in several families: where only some of them go through a Split, or are added to another
layer's. They go in one order: within a family that of its ranking, and of several families always the one whose next
class costs least for each output that the layer loses. A class is cut whole, with everything that is coupled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.graph import label
from graphopt.passes.channels.choosing import in_chunks
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.families import Family, Room
from graphopt.passes.channels.importance import Ranking

MOST_OFFERS = 6
"""Counts offered for one layer."""
DEEPEST = 0.25
"""Share of a layer's outputs that the deepest of them leaves."""


@dataclass(frozen=True)
class Outputs:
    """The output channels of a layer: by class how many belong to it, those that are never cut included."""

    node: ir.Node
    sizes: dict[int, int]

    @property
    def count(self) -> int:
        return sum(self.sizes.values())

    def left(self, cut: Iterable[int]) -> int:
        """How many outputs are left when these classes are cut."""
        return self.count - sum(self.sizes.get(root, 0) for root in cut)

    def families(self, found: Sequence[Family]) -> list[Family]:
        """Those that have some of the outputs."""
        return [family for family in found if not self.sizes.keys().isdisjoint(family.roots)]


def parse_counts(texts: Iterable[str], option: str) -> dict[str, int]:
    """NODE:COUNT by node, the smallest where a node is named twice. Raises ValueError."""
    found: dict[str, int] = {}
    for text in texts:
        name, _, count = text.rpartition(":")
        if not name or not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"{option}: {text!r} is not NODE:COUNT")
        found[name] = min(int(count), found.get(name, int(count)))
    return found


def writers(channels: ChannelGraph) -> dict[str, Outputs]:
    """The layers that write channels, in graph order, by label."""
    found = {}
    for node in dict.fromkeys(site.node for site in channels.writes):
        carried = channels.carried.get(node.outputs[0])
        if carried is not None:
            roots, sizes = np.unique(channels.classes.roots(carried.labels), return_counts=True)
            found[label(node)] = Outputs(node, dict(zip(roots.tolist(), sizes.tolist(), strict=True)))
    return found


def removal_order(outputs: Outputs, rankings: Sequence[Ranking]) -> list[int]:
    """The classes of a layer's outputs, the first to cut first; at least one of each family is not among them.

    `rankings`: of the families that have some of the outputs, others may be there too.
    """
    waiting = [iter(in_chunks(each, 1)) for each in rankings if each.roots[0] in outputs.sizes]
    heads = [next(chunks, None) for chunks in waiting]
    order: list[int] = []
    while any(head is not None for head in heads):
        prices = [np.inf if head is None else head[0] / sum(outputs.sizes[root] for root in head[1]) for head in heads]
        chosen = int(np.argmin(prices))
        head = heads[chosen]
        if head is None:  # all prices are infinite
            chosen, head = next((i, each) for i, each in enumerate(heads) if each is not None)
        order.extend(head[1])
        heads[chosen] = next(waiting[chosen], None)
    return order


def to_count(outputs: Outputs, order: Sequence[int], count: int) -> list[int]:
    """The first classes of `order`: so many that `count` outputs are left, or as few above as whole classes come."""
    cut: list[int] = []
    left = outputs.count
    for root in order:
        if left - outputs.sizes[root] < count:
            break
        cut.append(root)
        left -= outputs.sizes[root]
    return cut


def cut_named(
    channels: ChannelGraph, rankings: Sequence[Ranking], counts: dict[str, int], least: int
) -> tuple[set[int], dict[str, str]]:
    """The classes to cut so that each layer named in `counts` has so many outputs, and by node why some keep theirs.

    `rankings`: of the families that these layers write. `least`: no value is left with fewer channels.
    """
    known, room = writers(channels), Room(channels, least)
    cut: set[int] = set()
    reasons: dict[str, str] = {}
    for name, count in counts.items():
        outputs = known.get(name)
        reason = None if outputs is None else _frozen(channels, outputs)
        if outputs is None:
            reasons[name] = "no constant weights of it write several channels"
        elif reason is not None:
            reasons[name] = reason
        elif count >= outputs.count:
            reasons[name] = f"it has {outputs.count} output channels, {count} are to be kept"
        else:
            order = removal_order(outputs, rankings)
            roots = to_count(outputs, order, count)
            more = [root for root in roots if root not in cut]
            if outputs.left(order) > count:
                reasons[name] = f"{outputs.left(order)} of its {outputs.count} output channels must be kept"
            elif not roots:
                reasons[name] = f"no group of its {outputs.count} output channels can be cut with {count} left"
            elif room.take(more):
                cut.update(more)
            else:
                reasons[name] = f"with {count} output channels left, some value has fewer than {least} (min_channels)"
    return cut, reasons


def offered(
    channels: ChannelGraph, found: Sequence[Family], rankings: Sequence[Ranking], block: int, least: int
) -> Iterator[tuple[str, int, list[int]]]:
    """Layer, outputs left and classes cut: of each layer that is the first to write some family, the mildest first.

    The counts are multiples of `block` that whole classes come to, at most `MOST_OFFERS` of them, from the
    largest down to a share of `DEEPEST`; what is cut grows by about the same factor, since a network bears little.
    """
    seen: set[Family] = set()
    room = Room(channels, least)
    for name, outputs in writers(channels).items():
        own = outputs.families(found)
        if seen.issuperset(own):
            continue
        seen.update(own)
        order = removal_order(outputs, rankings)
        ends = range(1, len(order) + 1)
        if len(own) == 1 and len(own[0].roots) == len(outputs.sizes):
            parts = next(in_chunks(each, block) for each in rankings if each.family is own[0])
            ends = np.cumsum([len(roots) for _, roots in parts], dtype=int).tolist()
        ends = [end for end in ends if outputs.left(order[:end]) % block == 0]
        possible = [end for end in ends if room.fits(order[:end])]
        deep = [end for end in possible if outputs.left(order[:end]) >= DEEPEST * outputs.count] or possible[:1]
        chosen = np.unique(np.geomspace(1, len(deep), MOST_OFFERS).round().astype(int) - 1) if deep else []
        for end in (deep[index] for index in chosen):
            yield name, outputs.left(order[:end]), order[:end]


def _frozen(channels: ChannelGraph, outputs: Outputs) -> str | None:
    reasons = [channels.classes.frozen(root) for root in outputs.sizes]
    return str(reasons[0]) if all(reasons) else None
