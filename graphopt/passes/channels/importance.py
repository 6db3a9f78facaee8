"""What cutting a class of channels costs: an order in every family, and costs that compare between families.

All costs are shares of a layer's whole, so that layers compare; a class pays in each layer that it belongs to.

norm            share of the squared weights: ||W_k||^2 / sum_j ||W_j||^2, of the layers that write the channel and of
                those that read it (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; Fang et al., 2023)
activation      share of the output's energy that comes from the channel: ||W_k||^2 E[x_k^2] / sum_j ||W_j||^2 E[x_j^2]
                (as Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024)
reconstruction  share of the output's energy that the other channels cannot make up for when their weights are solved
                again: tr(W_k ((C^-1)_kk)^-1 W_k'), channels cut one after another, the cheapest first (Hassibi and
                Stork, "Second Order Derivatives for Network Pruning", NIPS 1992, for blocks of weights)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.passes.channels.dependency import ChannelGraph, Site
from graphopt.passes.channels.families import Family
from graphopt.passes.channels.removal import Removal
from graphopt.passes.channels.work import weights_of
from graphopt.passes.quantization.moments import Moments

Importance = Literal["norm", "activation", "reconstruction"]


@dataclass(frozen=True)
class Ranking:
    """A family's classes, the first to cut first, and what each costs when those before it are cut."""

    family: Family
    roots: tuple[int, ...]
    costs: tuple[float, ...]
    layers: int = 1
    """In how many layers each of the classes pays."""


def rank(
    channels: ChannelGraph, found: Sequence[Family], importance: Importance, moments: Mapping[ir.Node, Moments]
) -> list[Ranking]:
    """Rank every family. `moments`: of the readers' inputs; layers without them are judged by their weights."""
    costs: dict[int, float] = {}
    by_weights = [*channels.writes, *channels.reads] if importance == "norm" else []
    for site in channels.reads if importance != "norm" else by_weights:
        energy = weight_energy(site)
        known = moments.get(site.node)
        if importance != "norm" and known is not None and known.covariance is not None:
            if importance == "reconstruction":
                continue  # ranked below
            energy = _output_energy(site, known)
        total = energy.sum() or 1.0
        for root, share in zip(channels.classes.roots(site.labels).tolist(), energy / total, strict=True):
            costs[root] = costs.get(root, 0.0) + float(share)
    layers = Counter(
        root
        for site in (by_weights if importance == "norm" else channels.reads)
        for root in set(channels.classes.roots(site.labels).tolist())
    )
    rankings = []
    for family in found:
        if importance == "reconstruction":
            order, paid = _by_removal(channels, family, costs, moments)
        else:
            order = sorted(family.roots, key=lambda root: (costs.get(root, 0.0), root))
            paid = [costs.get(root, 0.0) for root in order]
        rankings.append(Ranking(family, tuple(order), tuple(paid), max(1, layers[family.roots[0]])))
    return rankings


def weight_energy(site: Site) -> np.ndarray:
    """Sum of squared weights of each of the site's channels."""
    weights = weights_of(site).astype(np.float64)
    return np.square(weights).sum(axis=tuple(a for a in range(weights.ndim) if a != site.axis))


def _output_energy(site: Site, moments: Moments) -> np.ndarray:
    assert moments.covariance is not None
    weights = grouped_weights(site)
    second = np.diagonal(moments.covariance, axis1=1, axis2=2) + np.square(moments.mean)
    energy = np.square(weights).sum(axis=1) * second
    return energy.reshape(len(weights), len(site.labels), -1).sum(axis=(0, 2))


def grouped_weights(site: Site) -> np.ndarray:
    """Weights as (groups, outputs of a group, taps), float64; taps in the order of `Moments`."""
    weights = weights_of(site).astype(np.float64)
    if site.node.op_type != "Conv":
        return (weights if site.axis == 1 else weights.T)[None]
    groups = site.node.attributes["group"].as_int() if "group" in site.node.attributes else 1
    return weights.reshape(groups, weights.shape[0] // groups, -1)


def _by_removal(
    channels: ChannelGraph, family: Family, costs: Mapping[int, float], moments: Mapping[ir.Node, Moments]
) -> tuple[list[int], list[float]]:
    """The family's roots in the order in which they go, and what each costs."""
    removals = []
    members = set(family.roots)
    for site in channels.reads:
        known = moments.get(site.node)
        roots = channels.classes.roots(site.labels)
        if known is None or known.covariance is None or not members & set(roots.tolist()):
            continue
        removals.append(Removal(grouped_weights(site), known, roots, family.roots))
    left = np.ones(len(family.roots), bool)
    fixed = np.array([costs.get(root, 0.0) for root in family.roots])
    order, paid = [], []
    for _ in family.roots:
        total = fixed + sum((removal.costs() for removal in removals), np.zeros(len(fixed)))
        chosen = int(np.argmin(np.where(left, total, np.inf)))
        order.append(family.roots[chosen])
        paid.append(float(total[chosen]))
        left[chosen] = False
        for removal in removals:
            removal.take(chosen)
    return order, paid
