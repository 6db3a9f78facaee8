"""Layers whose weights alone a pass changes: Conv, Gemm, MatMul with constant float32 weights, seen as rows of taps.

A row is what one output channel is made of; its taps are its weights in the order they are stored: (C/group, kH, kW)
of a Conv, the rows of a Gemm's or MatMul's matrix. This is the order of `quantization.moments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, input_of, label, remove_unused_initializers
from graphopt.passes.base import Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.quantization.insert import Inserter, layer_arrays
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.quantization.placement import UNSUPPORTED_LAYERS, Layer, place


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A layer and the arrays it computes with; a Gemm's alpha and beta are folded into them."""

    layer: Layer
    weights: np.ndarray
    """float32, in the shape they are stored in."""
    bias: np.ndarray | None
    """float32 (channels,)."""
    sharers: list[ir.Node] = field(default_factory=list)
    """Other nodes that read the same weights in the same way."""

    @property
    def node(self) -> ir.Node:
        return self.layer.node

    @property
    def name(self) -> str:
        return label(self.node)

    @property
    def groups(self) -> int:
        return attribute(self.node, "group", 1) if self.node.op_type == "Conv" else 1

    @property
    def taps(self) -> int:
        return self.weights.size // self.weights.shape[self.layer.channel_axis]

    @property
    def takes_bias(self) -> bool:
        """Whether what a change of the weights does to the mean of the output can be taken back in a bias."""
        return self.layer.bias is not None and not self.sharers

    def rows(self) -> np.ndarray:
        """float64 (groups, channels / groups, taps)."""
        first = np.moveaxis(self.weights, self.layer.channel_axis, 0)
        return first.reshape(self.groups, len(first) // self.groups, -1).astype(np.float64)

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """`rows`, of any type, in the shape the weights are stored in."""
        first = np.moveaxis(self.weights, self.layer.channel_axis, 0)
        return np.ascontiguousarray(np.moveaxis(rows.reshape(first.shape), 0, self.layer.channel_axis))

    def norm(self, moments: Moments, correct_bias: bool) -> np.ndarray | None:
        """(groups, taps, taps): d C d' is what a change d of a row adds to the mean square of the output.

        Without the mean where a bias takes that back; None for layers whose covariance is not kept.
        """
        if moments.covariance is None or (correct_bias and self.takes_bias):
            return moments.covariance
        return moments.second_moment

    def shift(self, change: np.ndarray, moments: Moments) -> np.ndarray:
        """float64 (channels,): what weights less by `change` (groups, rows, taps) take from the mean output."""
        return np.einsum("grt,gt->gr", change, moments.mean).reshape(-1)


def find_layers(
    model: ir.Model, what: str, exclude: Sequence[str], exclude_types: Sequence[str]
) -> tuple[list[WeightLayer], list[Skip]]:
    """The layers in graph order, and why others are none. Raises PassError: `exclude` names no node; `what` asks."""
    require_nodes(model, exclude, what)
    placement = place(model.graph, exclude, exclude_types)
    skipped = [Skip(s.node, _own_words(s.reason)) for s in placement.skipped]
    readers = {layer.node: layer for layer in placement.layers}
    found: dict[ir.Value, WeightLayer] = {}
    for layer in placement.layers:
        value = layer.node.inputs[layer.weight_index]
        assert value is not None
        first = found.get(value)
        reason = _shared(layer, value, first, readers)
        if reason is not None:
            skipped.append(Skip(label(layer.node), reason))
        elif first is not None:
            first.sharers.append(layer.node)
        else:
            found[value] = WeightLayer(layer, *layer_arrays(layer))
    return list(found.values()), skipped


def _own_words(reason: str) -> str:
    return "only Conv, Gemm and MatMul are done" if reason in UNSUPPORTED_LAYERS.values() else reason


def _shared(layer: Layer, value: ir.Value, first: WeightLayer | None, readers: dict[ir.Node, Layer]) -> str | None:
    """Why weights with several readers cannot be changed for this one: a second copy would only add to the size."""
    if value.is_graph_output():
        return "its weights are an output of the model"
    for usage in value.uses():
        other = readers.get(usage.node)
        if other is None or usage.idx != other.weight_index:
            return f"its weights are also read by {label(usage.node)!r}"
    if first is not None and _reading(layer) != _reading(first.layer):
        return f"its weights are also read by {first.name!r}, which arranges them differently"
    return None


def _reading(layer: Layer) -> tuple:
    node = layer.node
    return node.op_type, layer.channel_axis, *(attribute(node, name, 1) for name in ("group", "alpha"))


def write_bias(inserter: Inserter, each: WeightLayer, shift: np.ndarray | None) -> None:
    """Add `shift` float64 (channels,) to the layer's bias, or leave it; take away the alpha folded into the weights."""
    for reader in (each.node, *each.sharers):
        if reader.op_type == "Gemm":
            reader.attributes.pop("alpha", None)
    if shift is None or each.layer.bias is None:
        return
    holder, index = each.layer.bias
    old = input_of(holder, index)
    bias = shift if each.bias is None else each.bias + shift
    shape = constant_of(old).shape if old is not None and holder is not each.node else bias.shape  # pyright: ignore[reportOptionalMemberAccess]
    if len(holder.inputs) <= index:
        holder.resize_inputs(index + 1)
    name = f"{weight_name(each)}_bias" if old is None else str(old.name)
    holder.replace_input_with(index, inserter.constant(name, bias.astype(np.float32).reshape(shape)))
    each.node.attributes.pop("beta", None)


def weight_name(each: WeightLayer) -> str:
    """The name of the value that holds the weights."""
    return str(each.node.inputs[each.layer.weight_index].name)  # pyright: ignore[reportOptionalMemberAccess]


def remove_left_over(graph: ir.Graph, weights: Iterable[ir.Value]) -> None:
    """Drop initializers that nobody reads, and the Constant nodes of `weights` that nobody reads any more."""
    for value in weights:
        node = value.producer()
        if node is not None and not value.uses() and not value.is_graph_output():
            graph.remove(node, safe=True)
    remove_unused_initializers(graph)
