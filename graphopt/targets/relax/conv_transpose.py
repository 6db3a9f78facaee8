"""Transposed convolution as one dense convolution a phase: no multiplication by zeros.

With strides s, the outputs y with y % s == p form phase p. They read the input with every s-th tap of the kernel, as an
ordinary convolution of stride 1 does; the phases are then interleaved. Spreading the input with zeros, and convolving
that with the whole kernel, does s_h * s_w times the arithmetic; it remains for dilated kernels, for phases without taps
and where a phase would crop its input.

Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?" (2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.targets.relax import computes, integer_layers
from graphopt.targets.relax.convolution import dense_or_grouped
from graphopt.targets.relax.emitters import Inputs, Node, emits, is_float_image
from graphopt.targets.relax.integer_layers import Weights
from graphopt.targets.relax.values import INJECTIVE, Builder, Value

Pair = tuple[int, int]


@dataclass(frozen=True)
class Phase:
    """Along one axis: which taps of the flipped kernel a phase reads, and the padding of its convolution."""

    taps: slice
    before: int
    after: int


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a transposed convolution."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    """`pads` at the start; crops the output."""
    out: int

    @property
    def reach(self) -> int:
        return (self.kernel - 1) * self.dilation

    def whole(self) -> Pair:
        """Padding of the spread input in the convolution with the whole kernel."""
        spread = (self.size - 1) * self.stride + 1
        before = self.reach - self.before
        return before, self.out + self.reach - spread - before

    def phases(self) -> list[Phase] | None:
        """None where one convolution a phase does not describe this axis."""
        if self.stride > 1 and self.dilation > 1:
            return None
        if self.stride == 1:
            before, after = self.whole()
            return [Phase(slice(None), before, after)] if min(before, after) >= 0 else None
        found = []
        for phase in range(self.stride):
            first, shift = (phase + self.before) % self.stride, (phase + self.before) // self.stride
            taps = len(range(first, self.kernel, self.stride))
            count = len(range(phase, self.out, self.stride))
            before, after = taps - 1 - shift, count + shift - self.size
            if not taps or not count or before < 0 or after < 0:
                return None
            # Flipped, tap k stands at kernel - 1 - k: the last tap of the phase comes first.
            start = self.kernel - 1 - (first + (taps - 1) * self.stride)
            found.append(Phase(slice(start, None, self.stride), before, after))
        return found


@emits("ConvTranspose")
def conv_transpose(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    if not is_float_image(data) or weight is None or weight.const is None:
        return None
    if (bias is not None and bias.const is None) or node.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        return None
    assert data is not None and data.shape is not None
    if "output_shape" in node.attributes:
        return None
    groups = int(node.get("group", 1))
    kernel, axes = _flipped(weight.const, groups), _axes(node, data, weight.const)
    high, wide = axes[0].phases(), axes[1].phases()
    if high is None or wide is None:
        return _over_spread_input(builder, node, data, kernel, bias, axes)
    integers = integer_layers.transposed_weights(data, weight, groups)
    if integers is not None:
        kernel = _flipped(integers.integers, groups)
    dilations = (axes[0].dilation, axes[1].dilation)  # 1 along an axis with several phases
    parts = []
    for row in high:
        for column in wide:
            taps = np.ascontiguousarray(kernel[:, :, row.taps, column.taps])
            pads = (row.before, column.before, row.after, column.after)
            part = _phase(builder, _plain(node, pads, dilations), data, taps, integers, bias)
            if part is None:
                return None
            parts.append(part)
    if len(parts) == 1:
        return parts
    out = (axes[0].out, axes[1].out)
    joined = builder.call(
        computes.interleave,
        *(builder.blocked(part) for part in parts),
        size=out,
        strides=(axes[0].stride, axes[1].stride),
        pattern=INJECTIVE,
    )
    return [Value((*parts[0].shape[:2], *out), "float32", blocked=joined, block=parts[0].block)]


def _phase(
    builder: Builder, node: Node, data: Value, taps: np.ndarray, integers: Weights | None, bias: Value | None
) -> Value | None:
    """One phase: a convolution in float32, or of bytes where `integers` has the scales of its outputs."""
    if integers is None:
        return dense_or_grouped(builder, node, data, taps, bias)
    weights = Weights(taps, integers.scales)
    return integer_layers.dense_or_depthwise(builder, node, data, weights, bias) if weights.fit else None


def _over_spread_input(
    builder: Builder, node: Node, data: Value, kernel: np.ndarray, bias: Value | None, axes: tuple[Axis, Axis]
) -> list[Value] | None:
    assert data.shape is not None
    strides = (axes[0].stride, axes[1].stride)
    (top, bottom), (left, right) = axes[0].whole(), axes[1].whole()
    if min(top, bottom, left, right) < 0:
        return None
    source = data
    if strides != (1, 1):
        size = data.shape[2:]
        spread = builder.call(computes.dilate, builder.blocked(data), size=size, strides=strides, pattern=INJECTIVE)
        high, wide = ((size[a] - 1) * strides[a] + 1 for a in range(2))
        source = Value((*data.shape[:2], high, wide), "float32", blocked=spread, block=data.block)
    dilations = (axes[0].dilation, axes[1].dilation)
    found = dense_or_grouped(builder, _plain(node, (top, left, bottom, right), dilations), source, kernel, bias)
    return None if found is None else [found]


def _plain(node: Node, pads: tuple[int, int, int, int], dilations: Pair) -> Node:
    attributes = {"pads": pads, "dilations": dilations, "group": int(node.get("group", 1))}
    return Node(node.name, "Conv", attributes, node.opset, 1)


def _axes(node: Node, data: Value, weight: np.ndarray) -> tuple[Axis, Axis]:
    assert data.shape is not None
    strides, dilations = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
    extra, pads = node.get("output_padding", (0, 0)), node.get("pads", (0, 0, 0, 0))

    def axis(a: int) -> Axis:
        size, kernel = int(data.shape[2 + a]), weight.shape[2 + a]  # type: ignore[index]
        out = (size - 1) * strides[a] + (kernel - 1) * dilations[a] + 1 + extra[a] - pads[a] - pads[2 + a]
        return Axis(size, kernel, int(strides[a]), int(dilations[a]), int(pads[a]), out)

    return axis(0), axis(1)


def _flipped(weight: np.ndarray, groups: int) -> np.ndarray:
    """ONNX's (C, M / groups, kH, kW) -> the weight of the convolution that does the same: (M, C / groups, kH, kW)."""
    channels, outs = weight.shape[:2]
    split = weight[:, :, ::-1, ::-1].reshape(groups, channels // groups, outs, *weight.shape[2:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(groups * outs, channels // groups, *weight.shape[2:])
