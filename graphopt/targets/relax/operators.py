"""ONNX operators that graphopt lowers itself, in blocked form where that pays; convolutions are in `convolution`.

Each emitter takes `(builder, node, inputs)` and returns its output values, or None when it does not apply: the
importer then asks TVM's own converter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from graphopt.targets.relax import (
    block_weights,
    byte_functions,
    computes,
    elementwise,
    integer_computes,
    integer_layers,
    views,
)
from graphopt.targets.relax import matmul as products
from graphopt.targets.relax.emitters import Inputs, Node, emits, image, is_float_image, output_size, pads_of
from graphopt.targets.relax.values import (
    ELEMENTWISE,
    FUSABLE_ROOT,
    OPAQUE,
    Builder,
    Encoded,
    Joint,
    Origin,
    Value,
    element_type,
)

# ---- elementwise


def _unary(
    builder: Builder,
    value: Value,
    function: Callable,
    name: str,
    dtype: str | None = None,
    numbers: Callable | None = None,
) -> list[Value]:
    """`function` of every element; `numbers` is the same for numpy arrays, where there is such a form."""
    found = byte_functions.applied(builder, value, function, numbers)
    if found is not None:
        return [found]
    dtype = dtype or value.dtype
    if value.coded is not None:  # read the bytes: a float32 value made of them could end up in memory
        decode = value.coded.decode
        return _unary(builder, value.coded.source, lambda q: function(decode(q)), name, dtype)
    expression = elementwise.mapped(function, name)
    if value.is_blocked:
        source = builder.wide(value) if value.dtype == "float32" else value.blocked
        done = builder.call(expression, source, pattern=ELEMENTWISE, name=name)
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
        return _clipped(builder, data, 0.0, None, "relu")
    if node.opset < 11:
        bounds = [node.get("min", None), node.get("max", None)]
    else:
        given = [inputs[i] if len(inputs) > i else None for i in (1, 2)]
        if any(v is not None and v.const is None for v in given):
            return None
        bounds = [_scalar(v) for v in given]
    return _clipped(builder, data, bounds[0], bounds[1], "clip")


def _clipped(builder: Builder, data: Value, low: float | None, high: float | None, name: str) -> list[Value]:
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    if data.sums is not None and data.readers == 1:
        return [replace(data, sums=data.sums.clipped(least, most))]
    if data.joint is not None and data.readers == 1:
        return [replace(data, joint=data.joint.clipped(least, most))]

    def numbers(x: np.ndarray) -> np.ndarray:
        return np.maximum(np.minimum(x, most), least)

    return _unary(builder, data, elementwise.clip_of(low, high), name, numbers=numbers)


@emits("LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Exp", "Erf", "Gelu")
def activation(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None or data.dtype != "float32":
        return None
    divide = elementwise.divides(builder.lanes)
    function = {
        "LeakyRelu": lambda: elementwise.leaky_relu_of(float(node.get("alpha", 0.01))),
        "HardSigmoid": lambda: elementwise.hard_sigmoid_of(float(node.get("alpha", 0.2)), float(node.get("beta", 0.5))),
        "HardSwish": lambda: elementwise.hard_swish_of,
        "Sigmoid": lambda: partial(elementwise.sigmoid_of, divide=divide),
        "Tanh": lambda: partial(elementwise.tanh_of, divide=divide),
        "Exp": lambda: elementwise.exp_of,
        "Erf": lambda: elementwise.erf_of,
        "Gelu": lambda: partial(elementwise.gelu_tanh_of, divide=divide) if _tanh_form(node) else elementwise.gelu_of,
    }[node.op_type]()
    if node.op_type == "Exp" and data.has_filler:
        return None
    return _unary(builder, data, function, node.op_type.lower(), numbers=_numbers(node))


def _numbers(node: Node) -> Callable:
    """An activation as a function of float64 arrays."""
    alpha, beta = float(node.get("alpha", 0.01 if node.op_type == "LeakyRelu" else 0.2)), float(node.get("beta", 0.5))
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return {
        "LeakyRelu": lambda x: np.where(x < 0, alpha * x, x),
        "HardSigmoid": lambda x: np.clip(alpha * x + beta, 0, 1),
        "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "Sigmoid": lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700))),
        "Tanh": np.tanh,
        "Exp": np.exp,
        "Erf": erf,
        "Gelu": (lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
        if _tanh_form(node)
        else (lambda x: x / 2 * (1 + erf(x * np.sqrt(0.5)))),
    }[node.op_type]


def _tanh_form(node: Node) -> bool:
    form = node.get("approximate", b"none")
    return form in (b"tanh", "tanh")


@emits("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")
def binary(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    operation = {
        "Add": "add",
        "Sub": "subtract",
        "Mul": "multiply",
        "Div": "divide",
        "Max": "maximum",
        "Min": "minimum",
        "Sum": "add",
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


def _combine(builder: Builder, operation: str, a: Value, b: Value, divides: bool) -> Value | None:
    if a.shape is None or b.shape is None:
        return None
    divisor = _scalar(b) if divides else None
    if divisor and np.isfinite(np.float32(1 / divisor)):  # within half a unit in the last place, and ten times as fast
        b = Value(b.shape, b.dtype, const=np.full(b.shape or (), 1 / divisor, np.float32))
        operation, divides = "multiply", False
    shape = np.broadcast_shapes(a.shape, b.shape or ())
    found = _of_bytes(builder, operation, a, b) if shape == a.shape else None
    if found is not None:
        return found
    factor = _scalar(b) if operation == "multiply" else None
    if isinstance(a, views.Strided) and factor is not None and shape == a.shape:
        return a.scaled(factor)
    builder.meet(a, b)
    for like in (a, b):
        if not like.is_blocked or (divides and like.has_filler) or not _spans(like, shape):
            continue
        left, right = builder.operand(a, like), builder.operand(b, like)
        if left is not None and right is not None:
            if a.encoded is not None and b.encoded is not None and operation in ("add", "multiply"):
                stored = left.expression, right.expression
                joint = Joint(operation, a.encoded, b.encoded, stored) if _are_bytes(*stored) else None
                if joint is not None:
                    return Value(shape, a.dtype, joint=joint, block=like.lanes)
            done = builder.combine(operation, left, right)
            return Value(shape, a.dtype, blocked=done, block=like.lanes)
    return Value(shape, a.dtype, plain=builder.combine(operation, builder.readable(a), builder.readable(b)))


def _are_bytes(*expressions) -> bool:
    return all(element_type(each) in computes.BYTES for each in expressions)


def _of_bytes(builder: Builder, operation: str, a: Value, b: Value) -> Value | None:
    """Two functions of the same bytes, or one and a number, as one function of bytes."""
    number = _scalar(b)
    if number is None or operation not in byte_functions.BINARY:
        return byte_functions.joined(builder, operation, a, b)
    return byte_functions.with_number(builder, operation, a, number)


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
        if data.dtype in computes.BYTES:
            levels = byte_functions.dequantized(builder, data, factor, int(offset))
            return [Value(data.shape, "float32", encoded=Encoded(data, factor, int(offset)), levels=levels)]
        return _unary(builder, data, elementwise.dequantize_of(factor, int(offset)), "dequantize", "float32")
    dtype = "uint8" if zero is None else zero.dtype
    known = data.encoded
    if known is not None and (known.source.dtype, known.scale, known.zero_point) == (dtype, factor, int(offset)):
        return [known.source]  # nothing happened to it since it was dequantized
    if dtype not in ("uint8", "int8", "int16", "uint16") or data.dtype != "float32":
        return None
    if data.readers == 1 and dtype in computes.BYTES and (data.sums is not None or data.joint is not None):
        finish = integer_layers.requantized if data.sums is not None else integer_layers.joint_bytes
        found = finish(builder, data, factor, int(offset), dtype)
        if found is not None:
            return [found]
    looked_up = byte_functions.quantized(builder, data, factor, int(offset), dtype) if dtype in computes.BYTES else None
    if looked_up is not None:
        return [looked_up]
    found = _unary(builder, data, elementwise.quantize_of(factor, int(offset), dtype), "quantize", dtype)
    if dtype == "uint8" and data.is_image and data.channels <= integer_computes.QUAD and found[0].blocked is None:
        found[0].origin = Origin(builder.plain(data), factor, int(offset))
    return found


# ---- pooling and reductions


@emits("MaxPool", "AveragePool")
def pool(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    is_max = node.op_type == "MaxPool"
    if data is None or not data.is_image or node.outputs > 1:
        return None
    if data.dtype != "float32" and not (is_max and data.dtype in computes.BYTES):
        return None
    assert data.shape is not None
    encoded, whole = data.encoded, data.shape
    data = data if encoded is None else encoded.source
    size, kernel = whole[2:], tuple(node.get("kernel_shape", ()))
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    if len(kernel) != 2 or (not is_max and dilations != (1, 1)):
        return None
    ceil = bool(node.get("ceil_mode", 0))
    include = bool(node.get("count_include_pad", 0))
    if ceil and include:
        return None
    pads = pads_of(node, size, kernel, strides, dilations)
    out = output_size(size, kernel, strides, dilations, pads, ceil)
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
        zero_point=0 if encoded is None else encoded.zero_point,
        pattern=FUSABLE_ROOT,
    )
    shape = (*whole[:2], *out)
    if encoded is None:
        return image(builder, shape, done, data.dtype)
    if is_max:
        return [Value(shape, "float32", encoded=Encoded(image(builder, shape, done, data.dtype)[0], *encoded.scheme))]
    return image(builder, shape, _scaled(builder, done, encoded.scale))


@emits("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax")
def spatial_reduction(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if not is_float_image(data):
        return None
    assert data is not None and data.shape is not None
    keep = True
    if node.op_type.startswith("Reduce"):
        axes = node.get("axes", None)
        if axes is None and len(inputs) > 1 and inputs[1] is not None and inputs[1].const is not None:
            axes = inputs[1].const.tolist()
        if axes is None or sorted(a % 4 for a in axes) != [2, 3] or not data.is_blocked:
            return None
        keep = bool(node.get("keepdims", 1))
    encoded = data.encoded
    if node.op_type.endswith("Max") or node.op_type == "GlobalMaxPool":
        done = builder.call(computes.spatial_max, builder.blocked(data), pattern=FUSABLE_ROOT)
    else:
        mean = node.op_type != "ReduceSum"
        if encoded is None:
            done = builder.call(computes.spatial_sum, builder.blocked(data), mean=mean, pattern=FUSABLE_ROOT)
        else:
            found = integer_layers.spatial_sum(builder, data, encoded, mean)
            return [found] if keep else [_reshaped(builder, found, data.shape[:2])]
    value = image(builder, (*data.shape[:2], 1, 1), done)[0]
    return [value] if keep else [_reshaped(builder, value, data.shape[:2])]


def _scaled(builder: Builder, expression, factor: float):
    """A float32 Relax expression times a number, in registers."""

    def scale(x):
        return x * np.float32(factor)

    return builder.call(elementwise.mapped(scale, "scale"), expression, pattern=ELEMENTWISE, name="scale")


# ---- shapes


def _reshaped(builder: Builder, value: Value, shape: tuple[int, ...]) -> Value:

    return Value(shape, value.dtype, plain=builder.reshape(builder.moved(value), shape))


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if data is None or data.shape is None:
        return None
    shape = _new_shape(node, data.shape, inputs[1] if len(inputs) > 1 else None)
    if shape is None or int(np.prod(shape)) != int(np.prod(data.shape)):
        return None
    if shape == data.shape:
        return [data]
    return [views.reshaped(builder, data, shape) or _reshaped(builder, data, shape)]


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


FEWEST_LANES = 4
"""A concatenation whose parts end within a block moves at least so many channels at a time, else by TVM's own means."""


@emits("Concat")
def concat(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    values = [v for v in inputs if v is not None]
    axis = int(node.get("axis", 1))
    if not values or any(not v.is_image for v in values) or axis % 4 != 1 or len({v.dtype for v in values}) != 1:
        return None
    if not any(v.is_blocked for v in values):
        return None
    total = sum(v.channels for v in values)
    block = builder.block_for(total)
    channels = [v.channels for v in values]
    if math.gcd(block, *channels) < FEWEST_LANES:
        return None
    parts = [builder.blocked(v) for v in values]
    if any(v.channels % block or v.block != block for v in values):
        joined = builder.call(computes.concat_lanes, *parts, channels=channels, block=block, pattern=OPAQUE)
    else:
        joined = builder.emit(relax.op.concat(parts, axis=1))
    shape = values[0].shape
    assert shape is not None
    return image(builder, (shape[0], total, *shape[2:]), joined, values[0].dtype)


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
    sliced = builder.emit(cut(builder.moved(data), axes, begin, end, stride))
    return [Value(tuple(whole), data.dtype, plain=sliced)]


# ---- matrix products


@emits("Gemm", "MatMul")
def matmul(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    if data is None or weight is None or data.dtype != "float32" or data.shape is None:
        return None
    if weight.const is None:
        done = products.product_of_activations(builder, data, weight) if node.op_type == "MatMul" else None
        return None if done is None else [done]
    matrix = weight.const
    if matrix.ndim != 2 or len(data.shape) < 2 or node.get("transA", 0):
        return None
    found = _integer_product(builder, node, data, weight, bias)
    if found is not None:
        return [found]
    if node.op_type == "Gemm":
        if node.get("transB", 0):
            matrix = matrix.T
        matrix = matrix * np.float32(node.get("alpha", 1.0))
    rows = int(np.prod(data.shape[:-1]))
    block = column_block(matrix.shape[1], rows, builder.lanes)
    packed = pack_matrix(matrix, block)
    product = builder.call(
        computes.matmul,
        builder.narrowed(data),
        builder.constant(builder.narrow_constant(packed)),
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


def _integer_product(builder: Builder, node: Node, data: Value, weight: Value, bias: Value | None) -> Value | None:
    if node.op_type == "MatMul":
        found = block_weights.product(builder, data, weight)
        return integer_layers.product(builder, data, weight, None) if found is None else found
    if node.get("alpha", 1.0) != 1.0 or (bias is not None and bias.const is None):
        return None
    addend = None if bias is None or bias.const is None else bias.const * np.float32(node.get("beta", 1.0))
    return integer_layers.product(builder, data, weight, addend, bool(node.get("transB", 0)))


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
