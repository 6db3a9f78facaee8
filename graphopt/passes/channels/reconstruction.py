"""Weights of the layers that read the channels that stay, solved again so that their outputs change least.

With x the layer's input, m its mean, C its covariance and S the taps that stay,

    min over V  E |(W x + b) - (V x_S + b')|^2 + d |V - W_S|^2   ->   V = (W C_S + d W_S) (C_SS + d I)^-1
    b' = b + W m - V m_S

A MatMul has no bias: there C is about zero instead of the mean.

Reference: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Skip
from graphopt.passes.channels.dependency import Site
from graphopt.passes.channels.edits import set_constant
from graphopt.passes.channels.importance import grouped_weights
from graphopt.passes.channels.plan import Plan
from graphopt.passes.channels.work import weights_of
from graphopt.passes.quantization.compensate import DAMPING
from graphopt.passes.quantization.moments import Moments


def reconstruct(plan: Plan, moments: Mapping[ir.Node, Moments]) -> tuple[int, list[Skip]]:
    """Change the weights and biases that read channels to be cut, before `plan` is applied.

    Returns how many layers were solved again, and those that lose inputs and were not.
    """
    solved, skipped = 0, []
    for site in plan.channels.reads:
        stays = plan.kept(site.labels)
        if stays.all():
            continue
        known = moments.get(site.node)
        if known is None:
            skipped.append(Skip(g.label(site.node), f"the weights of a {site.node.op_type} are not solved again"))
            continue
        weights = grouped_weights(site)
        taps = np.repeat(stays, weights.shape[2] // len(stays))
        if known.covariance is None:
            skipped.append(Skip(g.label(site.node), f"{weights.shape[2]} inputs are too many to solve for: bias alone"))
            new = np.where(taps, weights, 0.0)
        else:
            new = solve(weights, known.mean, known.covariance, taps, has_bias=site.node.op_type != "MatMul")
            solved += 1
        graph = plan.channels.model.graph
        _store_weights(graph, site, new)
        if site.node.op_type != "MatMul":
            shift = ((weights - new) @ known.mean[:, :, None])[:, :, 0].reshape(-1)
            alpha = g.attribute(site.node, "alpha", 1.0) if site.node.op_type == "Gemm" else 1.0
            add_to_bias(graph, site.node, alpha * shift)
    return solved, skipped


def solve(
    weights: np.ndarray, mean: np.ndarray, covariance: np.ndarray, taps: np.ndarray, *, has_bias: bool
) -> np.ndarray:
    """The new weights (groups, outputs, taps), zero where `taps` is False; shapes of the others as in `Moments`."""
    second = covariance if has_bias else covariance + mean[:, :, None] * mean[:, None, :]
    new = np.zeros_like(weights)
    for group, matrix in enumerate(second):
        level = float(np.trace(matrix)) / len(matrix)
        damping = DAMPING * level if level > 0 else 1.0
        left = matrix[np.ix_(taps, taps)] + damping * np.eye(int(taps.sum()))
        right = weights[group] @ matrix[:, taps] + damping * weights[group][:, taps]
        new[group][:, taps] = np.linalg.solve(left, right.T).T
    return new


def _store_weights(graph: ir.Graph, site: Site, grouped: np.ndarray) -> None:
    old = weights_of(site)
    matrix = grouped[0].T if site.node.op_type != "Conv" and site.axis == 0 else grouped
    set_constant(graph, site.node, 1, matrix.reshape(old.shape).astype(old.dtype))


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
