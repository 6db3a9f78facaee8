"""Cut channels out of a network, so that layers become smaller dense layers.

Equation
    y = W x + b  ~  V x_S + b'    S: the channels that stay;  V = argmin E |W x + b - (V x_S + b')|^2
    A channel ends where a layer multiplies all channels of its input with weights and sums. Up to there it passes
    through operators that keep channels apart, and where it meets others they are kept or cut together.

Applies when
    a layer with constant weights (Conv, grouped and depthwise too, ConvTranspose, Gemm, MatMul) writes channels, and
    what they pass through on the way to the layers that read them is one of: element-wise operators with broadcasting,
    BatchNormalization, InstanceNormalization, pooling, reductions, Softmax, Pad and Resize over other axes, Concat,
    Split, Slice, Gather with constant indices, Reshape, Flatten, Transpose, Squeeze, Unsqueeze, Expand, Tile,
    DepthToSpace, SpaceToDepth. Padding along the channels (a residual shortcut to a wider layer) is cut with what it
    is added to.

Refuses when
    channels reach an output of the model, an operator that mixes them otherwise, a subgraph, or a shape that is
    computed from their number; weights are computed, or open to a caller; the node is excluded.

Choice
    `ratio` is the share of the model's multiply-accumulates to save. Every class of coupled channels has a cost (see
    `importance`), every layer's channels are ranked by it. scope=global cuts what costs least for what it saves;
    scope=layer cuts the same share of every layer. With `channels`, the layers named there alone, and what is coupled
    with them, are cut down to the numbers given: of the families of coupled channels that a layer's outputs belong to,
    always the one whose next class costs least for each output that goes (see `channels/named.py`).

Cost
    Layers are solved again in `portions`, each on what the layers before it have become, so that later layers make up
    for earlier errors: on resnet20 at ratio 0.2 and round_to=1 top-1 is 75.2 with one portion, 76.6 with 8, 77.9 with
    32 (80.2 unpruned); on squeezenet at ratio 0.1 the outputs' relative error is .0289 with 8, .0244 with 32. A portion
    goes on from what the one before it computed on the calibration data, where that can be held (256 MiB for each of
    the model as it was and as it becomes), else from there or from the data again.

Fidelity
    LOSSY. Before weights are solved again, the result equals the model with the channels that are cut set to zero.

Reference
    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (coupled channels); He et al., "Channel Pruning
    for Accelerating Very Deep Neural Networks", ICCV 2017 (weights solved again); Li et al., "Pruning Filters for
    Efficient ConvNets", ICLR 2017 (norm); Hassibi and Stork, "Second Order Derivatives for Network Pruning", NIPS 1992.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import onnx_ir as ir

from graphopt.errors import PassError
from graphopt.graph import label
from graphopt.passes.base import Context, Fidelity, Offer, Pass, PassResult, Skip
from graphopt.passes.channels.choosing import Scope, choose
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.families import Room, families
from graphopt.passes.channels.importance import Importance, rank
from graphopt.passes.channels.moments import input_moments
from graphopt.passes.channels.named import cut_named, offered, parse_counts, writers
from graphopt.passes.channels.plan import Plan
from graphopt.passes.channels.reconstruction import reconstruct
from graphopt.passes.channels.work import Work
from graphopt.passes.excluded import require_nodes


class PruneChannels(Pass):
    """Cut the least important channels, with all that depends on them."""

    fidelity = Fidelity.LOSSY
    takes = "channels"

    ratio: float = 0.1
    """Share of the model's multiply-accumulates to save; a tenth cost four classifiers 0.5 to 3.7 points of top-1."""
    importance: Literal["auto", "norm", "activation", "reconstruction"] = "auto"
    """What a channel is judged by; auto: reconstruction where there is calibration data, else norm."""
    scope: Scope = "global"
    """Whether layers compete, or each loses the same share."""
    reconstruct: Literal["auto", "true", "false"] = "auto"
    """Solve the weights of the layers that read what stays again, on calibration data; auto: where there is some."""
    portions: int = 32
    """Layers are solved again in so many steps, each making up for the error that those before it left."""
    round_to: str = "auto"
    """Channels of a layer are cut down to a multiple of this; auto: the target's channel block."""
    min_channels: int = 4
    """No value is left with fewer channels; those that have fewer keep all."""
    channels: tuple[str, ...] = ()
    """NODE:COUNT, the output channels that a layer keeps, instead of `ratio`, `scope` and `round_to`; where only whole
    groups can be cut, the next number above. Layers that are not named keep all, but those coupled with them."""
    exclude: tuple[str, ...] = ()
    """Names of nodes (of a nameless node: its first output) whose inputs and outputs keep all channels."""

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must be above 0 and below 1, not {self.ratio:g}")
        if self.portions < 1:
            raise ValueError(f"portions must be positive, not {self.portions}")
        if self.min_channels < 1:
            raise ValueError(f"min_channels must be at least 1, not {self.min_channels}")
        if self.round_to != "auto" and not (self.round_to.isdecimal() and int(self.round_to) > 0):
            raise ValueError(f"round_to must be auto or a positive integer, not {self.round_to!r}")
        parse_counts(self.channels, "channels")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Prune; `applied` counts the classes of channels cut. Raises PassError: an option needs calibration data that
        is not there, or `exclude` or `channels` names no node."""
        plan, work, left_alone = self._plan(model, context)
        skipped = list(left_alone)
        if not plan.cut:
            why = "nothing to cut" if self.channels else "nothing to cut at this ratio and block"
            return PassResult(model, 0, tuple(skipped), (why,))
        notes = [f"{100 * (1 - work.left / work.total):.1f} % of the multiply-accumulates of {work.total:.4g} saved"]
        if self._solves(context) and context.data is not None:
            solved, left = reconstruct(plan, context, self.portions, self.exclude)
            skipped += left
            notes.append(f"{solved} layers solved again on {len(context.data)} samples")
        plan.apply()
        return PassResult(model, len(plan.cut), tuple(skipped), tuple(notes))

    def plan(self, model: ir.Model, context: Context) -> tuple[Plan, Work]:
        """What `run` cuts, and the multiply-accumulates that are then left. `model` is not changed."""
        return self._plan(model, context)[:2]

    def offers(self, model: ir.Model, context: Context) -> tuple[Offer, ...]:
        """Of each layer that is the first to write some family, fewer and fewer output channels; see `Pass.offers`.

        What is built equals what `run` makes of `model` with `channels=[VALUE]` and `portions=1`. Data is run over once
        for all offers, before the first is handed out.
        """
        self._check(model, context)
        model = model.clone()  # the caller may go on changing its own
        channels = ChannelGraph(model, self.exclude)
        needed = self._solves(context) or self._importance(context) != "norm"
        moments = input_moments(channels, context) if needed else {}
        known = {label(node): each for node, each in moments.items()}
        found = families(channels, Room(channels, self.min_channels))
        rankings = rank(channels, found, self._importance(context), moments)

        def build(cut: frozenset[int]) -> ir.Model:
            made = model.clone()
            plan = Plan(ChannelGraph(made, self.exclude), cut)
            if self._solves(context):
                here = {node: known[label(node)] for node in made.graph if label(node) in known}
                reconstruct(plan, context, 1, self.exclude, here)
            plan.apply()
            return made

        made = []
        for name, count, roots in offered(channels, found, rankings, self._block(context), self.min_channels):
            cut = frozenset(roots)
            made.append(Offer(name, f"{name}:{count}", touched(channels, cut), partial(build, cut)))
        return tuple(made)

    def _plan(self, model: ir.Model, context: Context) -> tuple[Plan, Work, tuple[Skip, ...]]:
        self._check(model, context)
        channels, importance = ChannelGraph(model, self.exclude), self._importance(context)
        room, work = Room(channels, self.min_channels), Work(channels)
        found = families(channels, room)
        counts = parse_counts(self.channels, "channels")
        if counts:
            known = writers(channels)
            named = {family for name in counts if name in known for family in known[name].families(found)}
            found = [family for family in found if family in named]
        moments = {} if importance == "norm" else input_moments(channels, context)
        rankings = rank(channels, found, importance, moments)
        if not counts:
            cut = choose(rankings, self.scope, self.ratio, self._block(context), room, work)
            return Plan(channels, frozenset(cut)), work, frozen_layers(channels)
        cut, reasons = cut_named(channels, rankings, counts, self.min_channels)
        work.take(cut)
        return Plan(channels, frozenset(cut)), work, tuple(Skip(name, reason) for name, reason in reasons.items())

    def _importance(self, context: Context) -> Importance:
        if self.importance != "auto":
            return self.importance
        return "norm" if context.data is None else "reconstruction"

    def _solves(self, context: Context) -> bool:
        return self.reconstruct != "false" and context.data is not None

    def _block(self, context: Context) -> int:
        return context.capabilities.channel_block if self.round_to == "auto" else int(self.round_to)

    def _check(self, model: ir.Model, context: Context) -> None:
        needs = "importance=" + self.importance if self.importance in ("activation", "reconstruction") else ""
        needs = needs or ("reconstruct=true" if self.reconstruct == "true" else "")
        if needs and context.data is None:
            raise PassError(f"{self.name}: {needs} needs calibration data", hint="give calibration data")
        require_nodes(model, self.exclude, self.name)
        require_nodes(model, tuple(parse_counts(self.channels, "channels")), self.name, "channels")


def frozen_layers(channels: ChannelGraph) -> tuple[Skip, ...]:
    """Layers none of whose output channels may be cut, and why."""
    skips = []
    for site in channels.writes:
        reasons = [channels.classes.frozen(root) for root in channels.classes.roots(site.labels).tolist()]
        if all(reasons):
            skips.append(Skip(label(site.node), str(reasons[0])))
    return tuple(skips)


def touched(channels: ChannelGraph, cut: frozenset[int]) -> tuple[str, ...]:
    """Labels of the layers that read or write these classes, in graph order."""
    sites = (*channels.writes, *channels.reads)
    nodes = {site.node for site in sites if not cut.isdisjoint(channels.classes.roots(site.labels).tolist())}
    return tuple(label(node) for node in channels.model.graph if node in nodes)
