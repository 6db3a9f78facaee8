"""In which order layers are solved again, and which of them may be solved on the same inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.channels.dependency import Site
from graphopt.passes.channels.plan import Plan


def steps(plan: Plan, exclude: Collection[str]) -> list[list[Site]]:
    """The layers that lose inputs, or read what depends on one that does, in steps.

    A layer comes one step behind the last that it depends on, so those of a step are independent of each other. Layers
    named in `exclude` stay as they are and come in none.
    """
    sites = {site.node: site for site in plan.channels.reads if g.label(site.node) not in exclude}
    found: list[list[Site]] = []
    depth: dict[ir.Value, int] = {}
    for node in plan.channels.model.graph:
        # What a subgraph reads is no input of its node: it may depend on all.
        known = depth.values() if g.holds_subgraphs(node) else (depth.get(v, 0) for v in node.inputs if v is not None)
        step = max(known, default=0)
        site = sites.get(node)
        if site is not None and (step or not plan.kept(site.labels).all()):
            if step == len(found):
                found.append([])
            found[step].append(site)
            step += 1
        if step:
            depth.update(dict.fromkeys(node.outputs, step))
    return found


def portions(ordered: Sequence[list[Site]], count: int) -> list[tuple[list[Site], list[Site]]]:
    """Steps put together into `count` portions of neighbours: the layers of a portion's first step, and the others."""
    bounds = np.linspace(0, len(ordered), min(count, len(ordered)) + 1).astype(int)
    split = [ordered[a:b] for a, b in pairwise(bounds)]
    return [(first, [site for step in rest for site in step]) for first, *rest in split]
