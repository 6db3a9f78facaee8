"""ONNX operators that graphopt lowers itself, in blocked form where that pays.

Each emitter takes `(builder, node, inputs)` and returns its output values, or None when it does not apply: the
importer then asks TVM's own converter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax import computes, elementwise
from graphopt.targets.relax.values import ELEMENTWISE, FUSABLE_ROOT, INJECTIVE, Builder, Value

Inputs = Sequence[Value | None]
Emitter = Callable[[Builder, "Node", Inputs], "list[Value] | None"]


@dataclass(frozen=True)
class Node:
    """An ONNX node as emitters see it."""

    name: str
    op_type: str
    attributes: dict[str, Any]
    opset: int
    outputs: int

    def get(self, key: str, default):
        return self.attributes.get(key, default)


EMITTERS: dict[str, Emitter] = {}


def emits(*op_types: str):
    """Register an emitter."""

    def register(function: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(op_types, function))
        return function

    return register


def _image(builder: Builder, shape, blocked, dtype: str = "float32") -> list[Value]:
    return [Value(tuple(shape), dtype, blocked=blocked, block=int(blocked.ty.shape[3]))]


def _is_float_image(value: Value | None) -> bool:
    return value is not None and value.is_image and value.dtype == "float32"


# ---- convolution


@emits("Conv")
def conv(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:

    data, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    if data is None or weight is None or data.dtype != "float32" or data.shape is None or weight.const is None:
        return None
    if bias is not None and bias.const is None:
        return None
    kernel = weight.const
    if len(data.shape) == 3:  # one-dimensional: the same with a height of one
        planes = (*data.shape[:2], 1, data.shape[2])
        flat = Value(planes, data.dtype)
        flat.plain = builder.reshape(builder.plain(data), planes)
        found = _conv(builder, _lift(node), flat, kernel[:, :, None, :], bias)
        if found is None:
            return None
        batch, channels, _, width = found.shape  # type: ignore[misc]
        narrow = builder.reshape(builder.plain(found), (batch, channels, width))
        return [Value((batch, channels, width), data.dtype, plain=narrow)]
    if len(data.shape) != 4:
        return None
    found = _conv(builder, node, data, kernel, bias)
    return None if found is None else [found]


def _lift(node: Node) -> Node:
    attributes = dict(node.attributes)
    for key, filler in (("strides", 1), ("dilations", 1), ("kernel_shape", 1)):
        if key in attributes:
            attributes[key] = (filler, *attributes[key])
    if "pads" in attributes:
        start, end = attributes["pads"]
        attributes["pads"] = (0, start, 0, end)
    return Node(node.name, node.op_type, attributes, node.opset, node.outputs)


def _conv(builder: Builder, node: Node, data: Value, kernel: np.ndarray, bias: Value | None) -> Value | None:
    assert data.shape is not None
    batch, channels, height, width = data.shape
    groups = int(node.get("group", 1))
    out_channels = kernel.shape[0]
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    pads = _pads(node, (height, width), kernel.shape[2:], strides, dilations)
    out = _out_size((height, width), kernel.shape[2:], strides, dilations, pads)
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
        if result is None:
            return None
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
    if groups > 1 and (out_channels // groups) % block:
        return None
    if data.blocked is None and (channels < 8 or (groups == 1 and channels % 2 and channels < builder.lanes)):
        lanes_in = 1  # read the plain tensor: its channels are planes
        source = builder.reshape(builder.plain(data), (batch, channels, height * width, 1))
    else:
        source = builder.blocked(data)
        lanes_in = data.block
        if groups > 1 and (channels // groups) % lanes_in:
            return None
    packed = pack_conv_weight(kernel, lanes_in, block)
    return builder.call(
        computes.conv2d,
        source,
        builder.constant(packed),
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


def _pads(node: Node, size, kernel, strides, dilations) -> tuple[int, int, int, int]:
    mode = node.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in ("NOTSET", ""):
        top, left, bottom, right = node.get("pads", (0, 0, 0, 0))
        return int(top), int(left), int(bottom), int(right)
    if mode == "VALID":
        return 0, 0, 0, 0
    before, after = [], []
    for extent, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    return before[0], before[1], after[0], after[1]


def _out_size(size, kernel, strides, dilations, pads, ceil: bool = False) -> tuple[int, int]:
    found = []
    for axis in range(2):
        span = size[axis] + pads[axis] + pads[axis + 2] - (kernel[axis] - 1) * dilations[axis] - 1
        steps = -(-span // strides[axis]) if ceil else span // strides[axis]
        if ceil and steps * strides[axis] >= size[axis] + pads[axis]:
            steps -= 1  # a window that starts in the far padding is not counted
        found.append(steps + 1)
    return found[0], found[1]


@emits("ConvTranspose")
def conv_transpose(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    if not _is_float_image(data) or weight is None or weight.const is None or int(node.get("group", 1)) != 1:
        return None
    if (bias is not None and bias.const is None) or node.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        return None
    assert data is not None and data.shape is not None
    if "output_shape" in node.attributes:
        return None
    kernel = np.ascontiguousarray(weight.const[:, :, ::-1, ::-1].transpose(1, 0, 2, 3))
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    extra = tuple(node.get("output_padding", (0, 0)))
    top, left, bottom, right = node.get("pads", (0, 0, 0, 0))
    reach = [(kernel.shape[2 + a] - 1) * dilations[a] for a in range(2)]
    pads = (reach[0] - top, reach[1] - left, reach[0] - bottom + extra[0], reach[1] - right + extra[1])
    if min(pads) < 0:
        return None
    batch, channels, height, width = data.shape
    source = data
    if strides != (1, 1):
        spread = builder.call(
            computes.dilate, builder.blocked(data), size=(height, width), strides=strides, pattern=INJECTIVE
        )
        size = ((height - 1) * strides[0] + 1, (width - 1) * strides[1] + 1)
        source = Value((batch, channels, *size), "float32", blocked=spread, block=data.block)
    plain_node = Node(node.name, "Conv", {"pads": pads, "dilations": dilations}, node.opset, 1)
    found = _conv(builder, plain_node, source, kernel, bias)
    return None if found is None else [found]


@emits("BatchNormalization")
def batch_norm(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, *rest = inputs
    if not _is_float_image(data) or any(v is None or v.const is None for v in rest) or node.get("training_mode", 0):
        return None
    assert data is not None
    gamma, beta, mean, variance = (np.asarray(v.const, np.float64) for v in rest if v is not None)
    scale = gamma / np.sqrt(variance + float(node.get("epsilon", 1e-5)))
    shift = beta - mean * scale
    builder.blocked(data)
    factor = Value((1, scale.size, 1, 1), "float32", const=scale.astype(np.float32).reshape(1, -1, 1, 1))
    scaled = builder.emit(relax.op.multiply(data.blocked, builder.operand(factor, data)))
    value = Value(data.shape, "float32", blocked=scaled, block=data.block)
    value.blocked = _add_channels(builder, value, shift.astype(np.float32))
    return [value]


# ---- elementwise


def _unary(builder: Builder, value: Value, function: Callable, name: str, dtype: str | None = None) -> list[Value]:
    expression = elementwise.mapped(function, name)
    dtype = dtype or value.dtype
    if value.blocked is not None:
        done = builder.call(expression, value.blocked, pattern=ELEMENTWISE, name=name)
        return [Value(value.shape, dtype, blocked=done, block=value.block)]
    return [
        Value(value.shape, dtype, plain=builder.call(expression, builder.plain(value), pattern=ELEMENTWISE, name=name))
    ]


def _scalar(value: Value | None) -> float | None:
    return None if value is None or value.const is None or value.const.size != 1 else float(value.const.reshape(()))


@emits("Clip", "Relu")
def clip(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype != "float32":
        return None
    if node.op_type == "Relu":
        return _unary(builder, data, elementwise.clip_of(0.0, None), "relu")
    if node.opset < 11:
        bounds = [node.get("min", None), node.get("max", None)]
    else:
        given = [inputs[i] if len(inputs) > i else None for i in (1, 2)]
        if any(v is not None and v.const is None for v in given):
            return None
        bounds = [_scalar(v) for v in given]
    return _unary(builder, data, elementwise.clip_of(*bounds), "clip")


@emits("LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Exp")
def activation(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype != "float32":
        return None
    function = {
        "LeakyRelu": lambda: elementwise.leaky_relu_of(float(node.get("alpha", 0.01))),
        "HardSigmoid": lambda: elementwise.hard_sigmoid_of(float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))),
        "HardSwish": lambda: elementwise.hard_swish_of,
        "Sigmoid": lambda: elementwise.sigmoid_of,
        "Tanh": lambda: elementwise.tanh_of,
        "Exp": lambda: elementwise.exp_of,
    }[node.op_type]()
    if node.op_type == "Exp" and data.has_filler:
        return None
    return _unary(builder, data, function, node.op_type.lower())


@emits("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")
def binary(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    operation = {
        "Add": relax.op.add,
        "Sub": relax.op.subtract,
        "Mul": relax.op.multiply,
        "Div": relax.op.divide,
        "Max": relax.op.maximum,
        "Min": relax.op.minimum,
        "Sum": relax.op.add,
    }[node.op_type]
    values = [v for v in inputs if v is not None]
    if len(values) < 2 or len({v.dtype for v in values}) != 1 or values[0].dtype != "float32":
        return None
    total = values[0]
    for value in values[1:]:
        found = _combine(builder, operation, total, value, node.op_type == "Div")
        if found is None:
            return None
        total = found
    return [total]


def _combine(builder: Builder, operation, a: Value, b: Value, divides: bool) -> Value | None:
    if a.shape is None or b.shape is None:
        return None
    shape = np.broadcast_shapes(a.shape, b.shape)
    for like in (a, b):
        if like.blocked is None or (divides and like.has_filler) or not _spans(like, shape):
            continue
        left, right = builder.operand(a, like), builder.operand(b, like)
        if left is not None and right is not None:
            done = builder.emit(operation(left, right))
            return Value(shape, a.dtype, blocked=done, block=like.block)
    return Value(shape, a.dtype, plain=builder.emit(operation(builder.plain(a), builder.plain(b))))


def _spans(value: Value, shape: tuple[int, ...]) -> bool:
    """True when `value` broadcasts to `shape` over its spatial axes or not at all, so blocking by it is right."""
    return value.shape is not None and len(shape) == 4 and value.shape == shape


@emits("Identity", "Dropout")
def identity(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    return None if data is None or node.outputs > 1 else [data]


# ---- quantization


@emits("QuantizeLinear", "DequantizeLinear")
def requantize(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 else None
    if data is None or data.shape is None or node.get("block_size", 0):
        return None
    factor, offset = _scalar(scale), 0.0 if zero is None else _scalar(zero)
    if factor is None or offset is None or scale is None or scale.dtype != "float32":
        return None
    if node.op_type == "DequantizeLinear":
        if data.dtype not in ("uint8", "int8", "int16", "uint16", "int32"):
            return None
        return _unary(builder, data, elementwise.dequantize_of(factor, int(offset)), "dequantize", "float32")
    dtype = "uint8" if zero is None else zero.dtype
    if dtype not in ("uint8", "int8", "int16", "uint16") or data.dtype != "float32":
        return None
    return _unary(builder, data, elementwise.quantize_of(factor, int(offset), dtype), "quantize", dtype)


# ---- pooling and reductions


@emits("MaxPool", "AveragePool")
def pool(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    is_max = node.op_type == "MaxPool"
    if data is None or not data.is_image or node.outputs > 1:
        return None
    if data.dtype != "float32" and not (is_max and data.dtype in ("uint8", "int8")):
        return None
    assert data.shape is not None
    size, kernel = data.shape[2:], tuple(node.get("kernel_shape", ()))
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    if len(kernel) != 2 or (not is_max and dilations != (1, 1)):
        return None
    ceil = bool(node.get("ceil_mode", 0))
    include = bool(node.get("count_include_pad", 0))
    if ceil and include:
        return None
    pads = _pads(node, size, kernel, strides, dilations)
    out = _out_size(size, kernel, strides, dilations, pads, ceil)
    reach = [(out[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    far = [max(pads[a + 2], reach[a] - size[a] - pads[a]) for a in range(2)]
    done = builder.call(
        computes.pool2d,
        builder.blocked(data),
        kind="max" if is_max else "average",
        size=size,
        kernel=kernel,
        strides=strides,
        pads=(pads[0], pads[1], far[0], far[1]),
        dilations=dilations,
        out_size=out,
        count_include_pad=include,
        pattern=FUSABLE_ROOT,
    )
    return _image(builder, (*data.shape[:2], *out), done, data.dtype)


@emits("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax")
def spatial_reduction(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if not _is_float_image(data):
        return None
    assert data is not None and data.shape is not None
    keep = True
    if node.op_type.startswith("Reduce"):
        axes = node.get("axes", None)
        if axes is None and len(inputs) > 1 and inputs[1] is not None and inputs[1].const is not None:
            axes = inputs[1].const.tolist()
        if axes is None or sorted(a % 4 for a in axes) != [2, 3] or data.blocked is None:
            return None
        keep = bool(node.get("keepdims", 1))
    source = builder.blocked(data)
    if node.op_type.endswith("Max") or node.op_type == "GlobalMaxPool":
        done = builder.call(computes.spatial_max, source, pattern=FUSABLE_ROOT)
    else:
        done = builder.call(computes.spatial_sum, source, mean=node.op_type != "ReduceSum", pattern=FUSABLE_ROOT)
    value = _image(builder, (*data.shape[:2], 1, 1), done)[0]
    return [value] if keep else [_reshaped(builder, value, data.shape[:2])]


# ---- shapes


def _reshaped(builder: Builder, value: Value, shape: tuple[int, ...]) -> Value:

    return Value(shape, value.dtype, plain=builder.reshape(builder.plain(value), shape))


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None:
        return None
    shape = _new_shape(node, data.shape, inputs[1] if len(inputs) > 1 else None)
    if shape is None or int(np.prod(shape)) != int(np.prod(data.shape)):
        return None
    return [data] if shape == data.shape else [_reshaped(builder, data, shape)]


def _new_shape(node: Node, old: tuple[int, ...], operand: Value | None) -> tuple[int, ...] | None:
    if node.op_type == "Flatten":
        axis = int(node.get("axis", 1)) % (len(old) + 1) if node.get("axis", 1) < 0 else int(node.get("axis", 1))
        return int(np.prod(old[:axis])), int(np.prod(old[axis:]))
    key = "shape" if node.op_type == "Reshape" else "axes"
    given = node.get(key, None)
    if given is None and operand is not None and operand.const is not None:
        given = operand.const.reshape(-1).tolist()
    if node.op_type == "Reshape":
        if given is None:
            return None
        zero_stays = not node.get("allowzero", 0)
        wanted = [old[i] if d == 0 and zero_stays else int(d) for i, d in enumerate(given)]
        if wanted.count(-1) > 1:
            return None
        if -1 in wanted:
            known = int(np.prod([d for d in wanted if d != -1]))
            if known == 0:
                return None
            wanted[wanted.index(-1)] = int(np.prod(old)) // known
        return tuple(wanted)
    if node.op_type == "Squeeze":
        if operand is not None and operand.const is None:
            return None
        drop = {i for i, d in enumerate(old) if d == 1} if given is None else {int(a) % len(old) for a in given}
        return tuple(d for i, d in enumerate(old) if i not in drop)
    if given is None:
        return None
    rank = len(old) + len(given)
    places, rest = {int(a) % rank for a in given}, iter(old)
    return tuple(1 if i in places else next(rest) for i in range(rank))


@emits("Concat")
def concat(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    values = [v for v in inputs if v is not None]
    axis = int(node.get("axis", 1))
    if not values or any(not v.is_image for v in values) or axis % 4 != 1 or len({v.dtype for v in values}) != 1:
        return None
    if not any(v.blocked is not None for v in values):
        return None
    total = sum(v.channels for v in values)
    block = builder.block_for(total)
    if any(v.channels % block for v in values) or any(builder.block_for(v.channels) != block for v in values):
        return None
    joined = builder.emit(relax.op.concat([builder.blocked(v) for v in values], axis=1))
    shape = values[0].shape
    assert shape is not None
    return _image(builder, (shape[0], total, *shape[2:]), joined, values[0].dtype)


@emits("Slice")
def slice_(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """All bounds known now, so that their forms (attributes before opset 10, operands after) become one."""
    from tvm import relax

    data = inputs[0]
    if data is None or data.shape is None:
        return None
    if node.opset < 10:
        starts, ends, axes, steps = (node.get(key, None) for key in ("starts", "ends", "axes", "steps"))
    else:
        operands = [inputs[i] if len(inputs) > i else None for i in range(1, 5)]
        if any(v is not None and v.const is None for v in operands):
            return None
        starts, ends, axes, steps = (v if v is None else v.const.reshape(-1).tolist() for v in operands)  # type: ignore[union-attr]
    if starts is None or ends is None:
        return None
    rank = len(data.shape)
    axes = [int(a) % rank for a in (range(len(starts)) if axes is None else axes)]
    steps = [1] * len(axes) if steps is None else steps
    whole, begin, end, stride = list(data.shape), [], [], []
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        taken = range(*slice(int(start), int(stop), int(step)).indices(data.shape[axis]))
        if len(taken) == 0 or step < 0:
            return None
        begin.append(taken.start)
        end.append(taken[-1] + 1)
        stride.append(int(step))
        whole[axis] = len(taken)
    cut: Any = relax.op.strided_slice
    sliced = builder.emit(cut(builder.plain(data), axes, begin, end, stride))
    return [Value(tuple(whole), data.dtype, plain=sliced)]


# ---- matrix products


@emits("Gemm", "MatMul")
def matmul(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    if data is None or weight is None or data.dtype != "float32" or data.shape is None or weight.const is None:
        return None
    matrix = weight.const
    if matrix.ndim != 2 or len(data.shape) < 2 or node.get("transA", 0):
        return None
    if node.op_type == "Gemm":
        if node.get("transB", 0):
            matrix = matrix.T
        matrix = matrix * np.float32(node.get("alpha", 1.0))
    rows = int(np.prod(data.shape[:-1]))
    block = column_block(matrix.shape[1], rows, builder.lanes)
    packed = pack_matrix(matrix, block)
    product = builder.call(
        computes.matmul,
        builder.plain(data),
        builder.constant(packed),
        columns=matrix.shape[1],
        pattern=FUSABLE_ROOT,
    )
    shape = (*data.shape[:-1], matrix.shape[1])
    beta = float(node.get("beta", 1.0))
    if node.op_type == "Gemm" and bias is not None:
        addend = builder.plain(bias)
        if beta != 1.0:
            addend = builder.emit(relax.op.multiply(addend, relax.const(beta, "float32")))
        product = builder.emit(relax.op.add(product, addend))
    return [Value(shape, "float32", plain=product)]


def column_block(columns: int, rows: int, lanes: int) -> int:
    """How many columns of the weight are packed together: a few vectors, dividing `columns` where possible."""
    widest = 8 * lanes if rows < 4 else 4 * lanes
    for block in range(widest, lanes - 1, -lanes):
        if columns % block == 0:
            return block
    if columns < lanes:
        return columns if columns in (1, 2, 4, 8) else lanes
    for block in range(widest, lanes - 1, -(lanes // 2)):
        if columns % block == 0:
            return block
    return 2 * lanes if columns > 2 * lanes else lanes


def pack_matrix(matrix: np.ndarray, block: int) -> np.ndarray:
    """(K, N) -> (ceil(N / block), K, block), zeros for padded columns."""
    depth, columns = matrix.shape
    tiles = -(-columns // block)
    padded = np.zeros((depth, tiles * block), np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(depth, tiles, block).transpose(1, 0, 2))
