"""A model's layers by the node of the unchanged model that they are or stand in for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.graph import label
from graphopt.inspection import inspect


@dataclass(frozen=True)
class Amounts:
    """What a layer takes: multiply-accumulates of a run, bytes of its constants."""

    macs: float
    bytes: float


def origin(name: str, originals: Collection[str]) -> str | None:
    """The node of the unchanged model that the layer `name` is (`n`) or stands in for (`n_...`); None: neither.

    Of several that fit, the longest.
    """
    while name not in originals:
        name, found, _ = name.rpartition("_")
        if not found:
            return None
    return name


def amounts(model: ir.Model, originals: Collection[str]) -> dict[str, Amounts]:
    """Of all layers with constants, by original node; what restores stored weights counts with the layer that reads
    them. `model` has static shapes."""
    found: dict[str, Amounts] = {}
    readers = _readers(model)
    for layer in inspect(model).layers:
        name = origin(readers.get(layer.name, layer.name), originals)
        if name is not None and (layer.macs or layer.parameter_bytes):
            old = found.get(name, Amounts(0.0, 0.0))
            found[name] = Amounts(old.macs + (layer.macs or 0), old.bytes + layer.parameter_bytes)
    return found


def _readers(model: ir.Model) -> dict[str, str]:
    """By label of each node that computes from constants alone: the label of the first that reads it and does not."""
    still: set[ir.Node] = set()
    for node in model.graph:
        if node.inputs and all(v is None or v.is_initializer() or v.producer() in still for v in node.inputs):
            still.add(node)
    found: dict[str, str] = {}
    for node in reversed(model.graph):
        readers = [use.node for output in node.outputs for use in output.uses()] if node in still else []
        if readers:
            found[label(node)] = found.get(label(readers[0]), label(readers[0]))
    return found


def differing(before: Mapping[str, Amounts], after: Mapping[str, Amounts]) -> dict[str, Amounts]:
    """What `after` says of the layers that it says something else of; zero for those that went away."""
    return {
        name: after.get(name, Amounts(0.0, 0.0)) for name in {**before, **after} if before.get(name) != after.get(name)
    }


def labels(model: ir.Model) -> frozenset[str]:
    """Labels of all nodes of the main graph."""
    return frozenset(label(node) for node in model.graph)
