"""Two layers between which a channel may be scaled: what is written by one is read by the other alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.linear_operator import Linear, Unfit, linear_operator

ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "Identity"})
"""f(s x) = s f(x) for s > 0, whatever axis the channels are on."""
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
"""The same for a scale a channel, channels on axis 1."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
PRECISIONS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
LARGEST_WEIGHT = 2.0**100
"""Beyond it scaling might leave float32's range."""


@dataclass(frozen=True)
class Pair:
    """Output channel i of `first` is input channel i of `second`."""

    first: Linear
    second: Linear


def find_pairs(model: ir.Model, exclude: Collection[str]) -> tuple[list[Pair], dict[str, str]]:
    """All pairs, in graph order, and for each layer that is `first` of none the reason, by the layer's name."""
    layers: dict[ir.Node, Linear] = {}
    for node in model.graph:
        found = linear_operator(model, node, any_rank=True)
        if found is not None:
            layers[found.node] = found  # an Add behind a MatMul comes later and takes its place
    pairs: list[Pair] = []
    refused: dict[str, str] = {}
    for node, layer in layers.items():
        try:
            _require_usable(layer, exclude)
            second = _next_layer(layer, layers)
            _require_usable(second, exclude)
            if second.inputs != layer.outputs:
                raise Unfit(f"{_name(second)} reads {second.inputs} channels, it writes {layer.outputs}")
            pairs.append(Pair(layer, second))
        except Unfit as unfit:
            refused[g.label(node)] = str(unfit)
    return pairs, refused


def _require_usable(layer: Linear, exclude: Collection[str]) -> None:
    if g.label(layer.node) in exclude:
        raise Unfit(f"{_name(layer)} is excluded")
    layer.require_constant(_name(layer))
    if layer.dtype not in PRECISIONS:
        raise Unfit(f"the weights of {_name(layer)} are {layer.dtype.name.lower()}, not float32")
    if not layer.output_peaks().max(initial=0.0) < LARGEST_WEIGHT:
        raise Unfit(f"the weights of {_name(layer)} are not finite, or too large to scale")


def _next_layer(layer: Linear, layers: dict[ir.Node, Linear]) -> Linear:
    """The layer that alone reads the result, behind operators that a scale passes through. Raises Unfit."""
    value = layer.result
    image = layer.kind in CONVOLUTIONS
    while True:
        reader = _sole_reader(value)
        following = layers.get(reader)
        if following is not None:
            if following.node.inputs[0] is not value:
                raise Unfit(f"{_name(following)} reads it as weights or bias")
            if image != (following.kind in CONVOLUTIONS):
                raise Unfit(f"{_name(following)} reads its channels from another axis")
            return following
        name = f"{reader.op_type} {g.label(reader)!r}"
        if g.is_onnx(reader, *ELEMENTWISE) or (image and g.is_onnx(reader, *POOLS)):
            if len(reader.outputs) > 1:
                raise Unfit(f"{name} behind it has a second output")
        elif image and g.is_onnx(reader, "Flatten") and g.attribute(reader, "axis", 1) == 1:
            image = False  # whether a channel is still one number, the count of channels will tell
        elif g.is_onnx(reader, "BatchNormalization"):
            raise Unfit(f"{name} behind it shifts: run fold-batch-norm first")
        elif g.is_onnx(reader, "Clip"):
            raise Unfit(f"{name} behind it does not scale: its bound stays where it is (ReLU6 is no ReLU)")
        else:
            raise Unfit(f"{name} behind it does not pass a scale on")
        value = reader.outputs[0]


def _sole_reader(value: ir.Value) -> ir.Node:
    if value.is_graph_output():
        raise Unfit("its result is an output of the model")
    reader = g.sole_consumer(value)
    if reader is None or len(value.uses()) != 1:
        raise Unfit("its result is read by several nodes" if value.uses() else "nobody reads its result")
    return reader


def _name(layer: Linear) -> str:
    return f"{layer.kind} {g.label(layer.node)!r}"
