"""Weights of the layers that read the channels that stay, solved again so that their outputs change least.

With x the layer's input in the model as it was, z its input now that layers before it are cut and solved again, m and
n their means, D the covariance of x with z, C that of z, and S the taps that stay,

    min over V  E |(W x + b) - (V z_S + b')|^2 + d |V - W_S|^2   ->   V = (W D_S + d W_S) (C_SS + d I)^-1
    b' = b + W m - V n_S

Layers are taken in portions, in graph order. The first layers of a portion see what the portions before it have become,
and make up for it even where they lose no inputs themselves. Those that depend on these see x, so C is D: were they to
see z too, both would make up for the same error.
A MatMul has no bias: there C and D are about zero instead of the means.

Until the plan is applied, cut channels still run through the model; the readers' zero weights keep them out of it.

Reference: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.calibration.resumed import ResumedRuns
from graphopt.passes.base import Context, Skip
from graphopt.passes.channels.dependency import Site
from graphopt.passes.channels.edits import set_constant
from graphopt.passes.channels.importance import grouped_weights
from graphopt.passes.channels.moments import MEASURED, input_moments, shrunk
from graphopt.passes.channels.order import portions as split
from graphopt.passes.channels.order import steps
from graphopt.passes.channels.plan import Plan
from graphopt.passes.channels.work import weights_of
from graphopt.passes.paired_inputs import PairedMoments, observe_pairs
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.quantization.placement import Layer
from graphopt.passes.second_order import DAMPING


@dataclass(frozen=True)
class Change:
    """New `weights`, shaped as they are stored, and what every output gains, (outputs,), where there is a bias."""

    site: Site
    weights: np.ndarray
    shift: np.ndarray | None
    solved: bool

    def apply(self, graph: ir.Graph) -> None:
        set_constant(graph, self.site.node, 1, self.weights.astype(weights_of(self.site).dtype))
        if self.shift is not None:
            add_to_bias(graph, self.site.node, self.shift)


def reconstruct(
    plan: Plan,
    context: Context,
    portions: int = 1,
    exclude: Collection[str] = (),
    moments: Mapping[ir.Node, Moments] | None = None,
) -> tuple[int, list[Skip]]:
    """Change the weights and biases that read channels to be cut, or what is computed from them, before `plan` is
    applied. Layers named in `exclude` are left alone. `context.data` must be there. `moments`: those of
    `input_moments`, where they are at hand: with one portion, the data is then not looked at.

    Returns how many layers were solved again, and those that lose inputs and were not. Raises ModelError and DataError
    as `collect_statistics` does.
    """
    model = plan.channels.model
    first = model.clone() if portions > 1 else model
    original = _unpaired(input_moments(plan.channels, context) if moments is None else moments)
    assert context.data is not None
    runs = ResumedRuns(context.data), ResumedRuns(context.data)
    solved, skipped = 0, []
    for index, (leading, following) in enumerate(split(steps(plan, exclude), portions)):
        found = original
        if index:
            measured = [site for site in leading if site.node.op_type in MEASURED]
            found = original | _moments(first, model, measured, context, runs)
        changes = []
        for site in (*leading, *following):
            change, skip = _change(plan, site, found.get(site.node))
            changes += [change] if change is not None else []
            skipped += [skip] if skip is not None else []
        for change in changes:
            change.apply(model.graph)
        solved += sum(change.solved for change in changes)
    return solved, skipped


def solve(
    weights: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    taps: np.ndarray,
    *,
    has_bias: bool,
    first_mean: np.ndarray | None = None,
    crossed: np.ndarray | None = None,
) -> np.ndarray:
    """The new weights (groups, outputs, taps), zero where `taps` is False.

    Shapes of the others as in `PairedMoments`; without `first_mean` and `crossed` the inputs are still those that the
    weights were made for.
    """
    own, target = covariance, covariance if crossed is None else crossed
    if not has_bias:
        own = own + mean[:, :, None] * mean[:, None, :]
        target = target + (mean if first_mean is None else first_mean)[:, :, None] * mean[:, None, :]
    new = np.zeros_like(weights)
    for group, matrix in enumerate(own):
        level = float(np.trace(matrix)) / len(matrix)
        damping = DAMPING * level if level > 0 else 1.0
        left = matrix[np.ix_(taps, taps)] + damping * np.eye(int(taps.sum()))
        right = weights[group] @ target[group][:, taps] + damping * weights[group][:, taps]
        new[group][:, taps] = np.linalg.solve(left, right.T).T
    return new


def _unpaired(found: Mapping[ir.Node, Moments]) -> dict[ir.Node, PairedMoments]:
    return {node: PairedMoments(m.mean, m.mean, m.covariance, None, m.rows) for node, m in found.items()}


def _moments(
    first: ir.Model,
    second: ir.Model,
    sites: Sequence[Site],
    context: Context,
    runs: tuple[ResumedRuns, ResumedRuns],
) -> dict[ir.Node, PairedMoments]:
    layers = [Layer(site.node, 1, 1 - site.axis, site.node.outputs[0]) for site in sites]
    found = {}
    for layer, m in observe_pairs(first, second, layers, context, runs):
        matrices = [None if each is None else shrunk(each, m.rows) for each in (m.covariance, m.crossed)]
        found[layer.node] = PairedMoments(m.first_mean, m.mean, matrices[0], matrices[1], m.rows)
    return found


def _change(plan: Plan, site: Site, known: PairedMoments | None) -> tuple[Change | None, Skip | None]:
    """What becomes of a layer's weights, and why they were not solved again if they lose inputs."""
    stays, name = plan.kept(site.labels), g.label(site.node)
    if stays.all() and (known is None or known.crossed is None):
        return None, None
    old = weights_of(site)
    if known is None:
        along = [-1 if axis == site.axis else 1 for axis in range(old.ndim)]
        change = Change(site, np.where(stays.reshape(along), old, 0), None, False)
        return change, Skip(name, f"the weights of a {site.node.op_type} are not solved again")
    weights, has_bias = grouped_weights(site), site.node.op_type != "MatMul"
    taps, skip = np.repeat(stays, weights.shape[2] // len(stays)), None
    if known.covariance is None:
        skip = Skip(name, f"{weights.shape[2]} inputs are too many to solve for: bias alone")
        new = np.where(taps, weights, 0.0)
    else:
        new = solve(weights, known.mean, known.covariance, taps, has_bias=has_bias,
                    first_mean=known.first_mean, crossed=known.crossed)  # fmt: skip
    shift = None
    if has_bias:
        alpha = g.attribute(site.node, "alpha", 1.0) if site.node.op_type == "Gemm" else 1.0
        gained = weights @ known.first_mean[:, :, None] - new @ known.mean[:, :, None]
        shift = alpha * gained[:, :, 0].reshape(-1)
    matrix = new[0].T if site.node.op_type != "Conv" and site.axis == 0 else new
    return Change(site, matrix.reshape(old.shape), shift, skip is None), skip


def add_to_bias(graph: ir.Graph, node: ir.Node, shift: np.ndarray) -> None:
    """Add `shift` (outputs,) to the output of a Conv, ConvTranspose or Gemm, whose beta becomes 1."""
    weights, bias = g.constant_of(node.inputs[1]), g.constant_of(g.input_of(node, 2))
    assert weights is not None
    total = shift
    if bias is not None:
        beta = g.attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
        total = beta * bias.astype(np.float64) + shift
    if node.op_type == "Gemm":
        node.attributes.pop("beta", None)
    set_constant(graph, node, 2, total.astype(weights.dtype))
