"""Convolutions and batch normalization, lowered to blocked kernels with packed weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from graphopt.targets.relax import computes, integer_layers, pixel_pairs
from graphopt.targets.relax.emitters import Inputs, Node, emits, is_float_image, output_size, pads_of
from graphopt.targets.relax.grouping import merge_groups
from graphopt.targets.relax.values import FUSABLE_ROOT, INJECTIVE, Builder, Value


@emits("Conv")
def conv(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:

    data, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    if data is None or weight is None or data.dtype != "float32" or data.shape is None or weight.const is None:
        return None
    if bias is not None and bias.const is None:
        return None
    found = integer_layers.convolution(builder, node, data, weight, bias)
    if found is not None:
        return [found]
    kernel = weight.const
    if len(data.shape) == 3:  # one-dimensional: the same with a height of one
        flat = _flat(builder, data)
        found = integer_layers.convolution(builder, _lift(node), flat, integer_layers.lifted(weight), bias)
        if found is None:
            found = dense_or_grouped(builder, _lift(node), flat, kernel[:, :, None, :], bias)
        if found is None:
            return None
        batch, channels, _, width = found.shape  # type: ignore[misc]
        narrow = builder.reshape(builder.plain(found), (batch, channels, width))
        return [Value((batch, channels, width), data.dtype, plain=narrow)]
    if len(data.shape) != 4:
        return None
    found = dense_or_grouped(builder, node, data, kernel, bias)
    return None if found is None else [found]


def _flat(builder: Builder, data: Value) -> Value:
    """A row (N, C, W) as a picture of height 1; bytes stay bytes."""
    assert data.shape is not None
    planes = (*data.shape[:2], 1, data.shape[2])
    if data.encoded is None:
        return Value(planes, data.dtype, plain=builder.reshape(builder.plain(data), planes))
    source = data.encoded.source
    stored = Value(planes, source.dtype, plain=builder.reshape(builder.moved(source), planes))
    return Value(planes, data.dtype, encoded=replace(data.encoded, source=stored))


def _lift(node: Node) -> Node:
    attributes = dict(node.attributes)
    for key, filler in (("strides", 1), ("dilations", 1), ("kernel_shape", 1)):
        if key in attributes:
            attributes[key] = (filler, *attributes[key])
    if "pads" in attributes:
        start, end = attributes["pads"]
        attributes["pads"] = (0, start, 0, end)
    return Node(node.name, node.op_type, attributes, node.opset, node.outputs)


def dense_or_grouped(builder: Builder, node: Node, data: Value, kernel: np.ndarray, bias: Value | None) -> Value | None:
    """A two-dimensional convolution with the attributes of `node` (group, strides, dilations, pads) and a constant
    kernel (M, C / groups, kH, kW)."""
    assert data.shape is not None
    batch, channels, height, width = data.shape
    groups = int(node.get("group", 1))
    out_channels = kernel.shape[0]
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    pads = pads_of(node, (height, width), kernel.shape[2:], strides, dilations)
    out = output_size((height, width), kernel.shape[2:], strides, dilations, pads)
    geometry: dict[str, Any] = {
        "size": (height, width),
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "out_size": out,
    }
    shape = (batch, out_channels, *out)
    if groups == channels == out_channels and groups > 1:
        source = builder.blocked(data)
        filters = _blocked_filters(kernel, data.block)
        result = builder.call(computes.depthwise, source, builder.constant(filters), pattern=FUSABLE_ROOT, **geometry)
    else:
        result = _dense_conv(builder, data, kernel, groups, geometry)
    block = int(result.ty.shape[3])
    value = Value(shape, "float32", blocked=result, block=block)
    if bias is not None and bias.const is not None and np.any(bias.const):
        value.blocked = _add_channels(builder, value, bias.const)
    return value


def _dense_conv(builder: Builder, data: Value, kernel: np.ndarray, groups: int, geometry):

    assert data.shape is not None
    batch, channels, height, width = data.shape
    out_channels = kernel.shape[0]
    block = builder.block_for(out_channels)
    few = data.blocked is None and data.coded is None and channels < 8
    if few and builder.form.lanes == 0 and builder.narrows and groups == 1:
        if pixel_pairs.fits(channels, groups, width, geometry["strides"], geometry["dilations"]):
            kernel, geometry = pixel_pairs.paired(kernel, geometry)
            source = builder.call(pixel_pairs.pair_pixels, builder.narrowed(data), pattern=INJECTIVE)
            lanes_in = pixel_pairs.TOGETHER
        else:
            source = builder.blocked(data)
            lanes_in = data.block
    elif data.blocked is None and (channels < 8 or (groups == 1 and channels % 2 and channels < builder.lanes)):
        lanes_in = 1  # read the plain tensor: its channels are planes
        plane = builder.narrowed(data) if builder.halves else builder.moved(data)
        source = builder.reshape(plane, (batch, channels, height * width, 1))
    else:
        source = builder.blocked(data)
        lanes_in = data.block
    kernel, groups = merge_groups(kernel, groups, lanes_in, block)
    packed = pack_conv_weight(kernel, lanes_in, block)
    return builder.call(
        computes.conv2d,
        source,
        builder.constant(builder.narrow_constant(packed)),
        groups=groups,
        pattern=FUSABLE_ROOT,
        **geometry,
    )


def pack_conv_weight(kernel: np.ndarray, lanes_in: int, lanes_out: int) -> np.ndarray:
    """(M, C / groups, kH, kW) -> (M / ocb, C / groups / icb, kH, kW, icb, ocb), zeros for padded channels."""
    out_channels, channels, k_h, k_w = kernel.shape
    rows, columns = -(-out_channels // lanes_out), -(-channels // lanes_in)
    padded = np.zeros((rows * lanes_out, columns * lanes_in, k_h, k_w), np.float32)
    padded[:out_channels, :channels] = kernel
    split = padded.reshape(rows, lanes_out, columns, lanes_in, k_h, k_w)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def _blocked_filters(kernel: np.ndarray, block: int) -> np.ndarray:
    channels, _, k_h, k_w = kernel.shape
    blocks = -(-channels // block)
    padded = np.zeros((blocks * block, k_h, k_w), np.float32)
    padded[:channels] = kernel[:, 0]
    return np.ascontiguousarray(padded.reshape(blocks, block, k_h, k_w).transpose(0, 2, 3, 1))


def _add_channels(builder: Builder, value: Value, addend: np.ndarray):
    from tvm import relax

    from graphopt.targets.relax.values import block_array

    constant = block_array(addend.reshape(1, -1, 1, 1).astype(np.float32), value.block)
    return builder.emit(relax.op.add(value.blocked, builder.constant(constant)))


@emits("BatchNormalization")
def batch_norm(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, *rest = inputs
    if not is_float_image(data) or any(v is None or v.const is None for v in rest) or node.get("training_mode", 0):
        return None
    assert data is not None
    gamma, beta, mean, variance = (np.asarray(v.const, np.float64) for v in rest if v is not None)
    scale = gamma / np.sqrt(variance + float(node.get("epsilon", 1e-5)))
    shift = beta - mean * scale
    source = builder.wide(data)
    factor = Value((1, scale.size, 1, 1), "float32", const=scale.astype(np.float32).reshape(1, -1, 1, 1))
    factors = builder.operand(factor, data)
    assert factors is not None
    scaled = builder.emit(relax.op.multiply(source, factors.expression))
    value = Value(data.shape, "float32", blocked=scaled, block=data.block)
    value.blocked = _add_channels(builder, value, shift.astype(np.float32))
    return [value]
