"""Scale the channels between two layers so that the weights on both sides have the same range.

Equation
    W2 f(W1 x + b1)  =  (W2 S) f(S^-1 W1 x + S^-1 b1)      for diagonal S > 0 and f with f(s x) = s f(x)
    s[i] = sqrt(max|W1[i]| / max|W2[:, i]|)   makes   max|W1[i]| = max|W2[:, i]|   of channel i on both sides

Applies when
    two of Conv (grouped and depthwise too), ConvTranspose, Gemm and MatMul follow each other, joined by nothing or by
    Relu, LeakyRelu, Identity, and between convolutions by pooling; in front of a Gemm by Flatten, where each channel is
    one number by then. Runs of layers, as depthwise-separable ones, are gone over again and again until no scale moves.
    Channels that are zero on either side are left as they are.

Refuses when (each is reported)
    what is between does not scale (Clip and ReLU6: replacing them by Relu, as the paper does, changes the function; the
    sigmoids; an Add, whose other side would have to scale as well), has other readers or is an output of the model;
    BatchNormalization is not folded yet; weights or bias are computed or open to a caller, or not float32 or float64;
    a node is excluded. The paper's absorption of high biases into the next layer is left out: it is exact only where a
    channel never falls below zero, which no weights can prove.

When it pays
    Where weights have one scale a tensor and the ranges of channels are far apart, the paper's case. With one scale a
    channel, as quantize-int8 has, ranges of weights need no help and activations may lose: 0.15 dB more to 0.15 less
    noise on four of six classifiers, 0.7 and 0.9 more on SqueezeNet and Tiny Darknet
    (benchmarks/recovery_ablation.py). Measure it.

Fidelity
    ROUNDING.

Reference
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.equalization.pairs import Pair, find_pairs
from graphopt.passes.excluded import require_nodes
from graphopt.passes.linear_operator import Linear, replace_parameters

MOST_ROUNDS = 1000
SETTLED = 1e-4
"""Relative change of a scale that counts as none."""
LARGEST_SCALE = 2.0**16
"""No channel is scaled by more, in all: beyond it one side is as good as dead."""


class EqualizeLayers(Pass):
    """Give the weights before and after each channel the same range, leaving what the model computes."""

    fidelity = Fidelity.ROUNDING

    exclude: tuple[str, ...] = ()
    """Names of layers whose weights are left as they are (of a nameless node: its first output)."""

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Equalize; `applied` counts pairs of layers. Raises PassError: `exclude` names no node."""
        require_nodes(model, self.exclude, self.name)
        pairs, refused = find_pairs(model, self.exclude)
        skipped = tuple(Skip(node, reason) for node, reason in refused.items())
        scales, rounds = equalize(pairs)
        moved = [pair for pair, scale in zip(pairs, scales, strict=True) if np.any(scale != 1)]
        changed: dict[ir.Node, Linear] = {}
        for pair in moved:
            changed.update({pair.first.node: pair.first, pair.second.node: pair.second})
        for layer in changed.values():
            assert layer.weight is not None
            dtype = layer.dtype.numpy()
            replace_parameters(model, layer, layer.weight.astype(dtype), layer.bias.astype(dtype))
        g.remove_unused_initializers(model.graph)
        settled = "" if rounds < MOST_ROUNDS else ", not settled"
        notes = (f"{len(moved)} pairs of layers in {rounds} rounds{settled}",) if moved else ()
        return PassResult(model, len(moved), skipped, notes)


def equalize(pairs: Sequence[Pair]) -> tuple[list[np.ndarray], int]:
    """Scale weights and biases of `pairs` in place (float64) until ranges agree; the scales S, and rounds needed."""
    total = [np.ones(pair.first.outputs) for pair in pairs]
    waiting = set(range(len(pairs)))
    neighbours = [{j for j, other in enumerate(pairs) if j != i and _touch(pairs[i], other)} for i in range(len(pairs))]
    rounds = 0
    while waiting and rounds < MOST_ROUNDS:
        rounds += 1
        now, waiting = sorted(waiting), set()
        for index in now:
            pair = pairs[index]
            scale = _equalizing(pair, total[index])
            if not _moves(scale):
                continue
            total[index] = total[index] * scale
            pair.first.weight = pair.first.scale_outputs(1 / scale)
            pair.first.bias = pair.first.bias / scale
            pair.second.weight = pair.second.scale_inputs(scale)
            waiting |= neighbours[index]
    return total, rounds


def _equalizing(pair: Pair, total: np.ndarray) -> np.ndarray:
    """The step that makes both ranges equal, `total` having been made already."""
    before, after = pair.first.output_peaks(), pair.second.input_peaks()
    alive = (before > 0) & (after > 0)
    step = np.sqrt(np.where(alive, before, 1.0) / np.where(alive, after, 1.0))
    return np.clip(total * step, 1 / LARGEST_SCALE, LARGEST_SCALE) / total


def _touch(one: Pair, other: Pair) -> bool:
    return one.second is other.first or other.second is one.first


def _moves(scale: np.ndarray) -> bool:
    return bool(np.abs(np.log(scale)).max(initial=0.0) > SETTLED)
