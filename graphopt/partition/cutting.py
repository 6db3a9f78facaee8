"""Which engine runs which nodes: what TVM refuses, and what is not worth a switch, goes to ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.graph import is_onnx, label
from graphopt.inspection import inspect
from graphopt.partition.nodes import Nodes
from graphopt.partition.phases import fewest_parts
from graphopt.targets.base import TensorType

Engine = Literal["tvm", "onnxruntime"]

NODE_S, MACS_PER_S, BYTES_PER_S = 2e-6, 20e9, 10e9
"""What ONNX Runtime is taken to need: for each node, for multiply-adds on one core, for bytes of results."""
WORTH_S = 50e-6
"""A part for which ONNX Runtime is taken to need less is not compiled: entering it and coming back cost about 20 us."""
_LISTED = 4


@dataclass(frozen=True)
class Part:
    """Nodes that one engine runs in one go: positions in `Nodes`, ascending. `why`: for people."""

    engine: Engine
    nodes: tuple[int, ...]
    why: str


def cut(nodes: Nodes, refused: Mapping[int, str], work: Sequence[float]) -> list[Part]:
    """The fewest parts, in the order in which they run.

    `refused`: by position, why a node cannot or should not be compiled. `work`: see `work_of`. TVM parts with less work
    than WORTH_S are given up, the smallest first, since each that goes lets its neighbours join.
    """
    given_up: set[int] = set()
    for limit in (WORTH_S / 8, WORTH_S / 4, WORTH_S / 2, WORTH_S):
        while True:
            kinds = ["onnxruntime" if i in refused or i in given_up else "tvm" for i in range(len(nodes.nodes))]
            parts = fewest_parts(nodes.predecessors, kinds, "tvm")
            small = [p for p in parts if kinds[p[0]] == "tvm" and sum(work[i] for i in p) < limit]
            if not small:
                break
            for part in small:
                given_up.update(part)
    return [
        Part("tvm", tuple(part), "TVM compiles all of it")
        if kinds[part[0]] == "tvm"
        else Part("onnxruntime", tuple(part), _why(nodes, part, refused, given_up))
        for part in parts
    ]


def _why(nodes: Nodes, part: Sequence[int], refused: Mapping[int, str], given_up: Collection[int]) -> str:
    """Each reason with the nodes it holds for; those that only lie between are counted."""
    reasons = Counter(refused[i] for i in part if i in refused)
    said = []
    for reason, count in reasons.most_common():
        where = [label(nodes.nodes[i]) for i in part if refused.get(i) == reason]
        more = f" and {count - _LISTED} more" if count > _LISTED else ""
        said.append(f"{reason} ({', '.join(where[:_LISTED])}{more})")
    between = sum(i in given_up for i in part)
    if between:
        each = f"{between} node{'s' if between > 1 else ''}{' beside them' if reasons else ''}"
        said.append(f"{each}: too little work to switch engines for")
    return "; ".join(said)


def work_of(model: ir.Model, nodes: Nodes, types: Mapping[str, TensorType]) -> list[float]:
    """Seconds that ONNX Runtime is taken to need for each node: a rough guess that only sorts out what is tiny."""
    import numpy as np

    macs = {row.name: row.macs or 0 for row in inspect(model).layers}
    found = []
    for node in nodes.nodes:
        kinds = [types[str(v.name)] for v in node.outputs if str(v.name) in types]
        size = sum(np.dtype(kind.dtype).itemsize * float(np.prod(kind.shape)) for kind in kinds)
        free = is_onnx(node, "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
        found.append(0.0 if free else NODE_S + macs.get(label(node), 0) / MACS_PER_S + size / BYTES_PER_S)
    return found
