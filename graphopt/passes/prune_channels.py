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
    scope=layer cuts the same share of every layer.

Cost
    Layers are solved again in `portions`, each on what the layers before it have become, so that later layers make up
    for earlier errors: on resnet20 at ratio 0.2 top-1 is 75.2 with one portion, 76.6 with 8, 77.9 with one a step
    (80.2 unpruned). Each portion costs a run of both models over the calibration data.

Fidelity
    LOSSY. Before weights are solved again, the result equals the model with the channels that are cut set to zero.

Reference
    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (coupled channels); He et al., "Channel Pruning
    for Accelerating Very Deep Neural Networks", ICCV 2017 (weights solved again); Li et al., "Pruning Filters for
    Efficient ConvNets", ICLR 2017 (norm); Hassibi and Stork, "Second Order Derivatives for Network Pruning", NIPS 1992.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from graphopt.errors import PassError
from graphopt.graph import label
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.channels.choosing import Scope, choose
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.families import Room, families
from graphopt.passes.channels.importance import Importance, rank
from graphopt.passes.channels.moments import input_moments
from graphopt.passes.channels.plan import Plan
from graphopt.passes.channels.reconstruction import reconstruct
from graphopt.passes.channels.work import Work
from graphopt.passes.excluded import require_nodes


class PruneChannels(Pass):
    """Cut the least important channels, with all that depends on them."""

    fidelity = Fidelity.LOSSY

    ratio: float = 0.1
    """Share of the model's multiply-accumulates to save; a tenth cost four classifiers 0.5 to 3.7 points of top-1."""
    importance: Literal["auto", "norm", "activation", "reconstruction"] = "auto"
    """What a channel is judged by; auto: reconstruction where there is calibration data, else norm."""
    scope: Scope = "global"
    """Whether layers compete, or each loses the same share."""
    reconstruct: Literal["auto", "true", "false"] = "auto"
    """Solve the weights of the layers that read what stays again, on calibration data; auto: where there is some."""
    portions: int = 8
    """Layers are solved again in so many steps, each making up for the error that those before it left."""
    round_to: str = "auto"
    """Channels of a layer are cut down to a multiple of this; auto: the target's channel block."""
    min_channels: int = 4
    """No value is left with fewer channels; those that have fewer keep all."""
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

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Prune; `applied` counts the classes of channels cut. Raises PassError: an option needs calibration data that
        is not there, or `exclude` names no node."""
        plan, work = self.plan(model, context)
        if not plan.cut:
            return PassResult(model, 0, frozen_layers(plan.channels), ("nothing to cut at this ratio and block",))
        skipped = list(frozen_layers(plan.channels))
        notes = [f"{100 * (1 - work.left / work.total):.1f} % of the multiply-accumulates of {work.total:.4g} saved"]
        if self.reconstruct != "false" and context.data is not None:
            solved, left = reconstruct(plan, context, self.portions, self.exclude)
            skipped += left
            notes.append(f"{solved} layers solved again on {len(context.data)} samples")
        plan.apply()
        return PassResult(model, len(plan.cut), tuple(skipped), tuple(notes))

    def plan(self, model: ir.Model, context: Context) -> tuple[Plan, Work]:
        """What `run` cuts, and the multiply-accumulates that are then left. `model` is not changed."""
        self._check(model, context)
        importance: Importance = (
            self.importance if self.importance != "auto" else "norm" if context.data is None else "reconstruction"
        )
        channels = ChannelGraph(model, self.exclude)
        room, work = Room(channels, self.min_channels), Work(channels)
        moments = {} if importance == "norm" else input_moments(channels, context)
        rankings = rank(channels, families(channels, room), importance, moments)
        block = context.capabilities.channel_block if self.round_to == "auto" else int(self.round_to)
        cut = choose(rankings, self.scope, self.ratio, block, room, work)
        return Plan(channels, frozenset(cut)), work

    def _check(self, model: ir.Model, context: Context) -> None:
        needs = "importance=" + self.importance if self.importance in ("activation", "reconstruction") else ""
        needs = needs or ("reconstruct=true" if self.reconstruct == "true" else "")
        if needs and context.data is None:
            raise PassError(f"{self.name}: {needs} needs calibration data", hint="give calibration data")
        require_nodes(model, self.exclude, self.name)


def frozen_layers(channels: ChannelGraph) -> tuple[Skip, ...]:
    """Layers none of whose output channels may be cut, and why."""
    skips = []
    for site in channels.writes:
        reasons = [channels.classes.frozen(root) for root in channels.classes.roots(site.labels).tolist()]
        if all(reasons):
            skips.append(Skip(label(site.node), str(reasons[0])))
    return tuple(skips)
