"""What shape an operator makes of the shapes of its inputs, while some dimensions stay dynamic.

`RULES[op](facts, node)` is the shape of the first output, or None where it cannot be told; `RULES_OF_SEVERAL[op](facts,
node)` are those of all outputs, none where they cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim, Size, at_most, floor_divide, is_capped, is_natural

if TYPE_CHECKING:
    from graphopt.shapes.facts import ShapeFacts

Shape = tuple[Size, ...]
Rule = Callable[["ShapeFacts", ir.Node], Shape | None]


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape that operands of these shapes make together."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or not known:
        return None
    if all(s == known[0] for s in known[1:]):
        return known[0]
    rank = max(len(s) for s in known)
    sizes: list[Size] = []
    for axis in range(-rank, 0):
        column = {s[axis] for s in known if len(s) >= -axis} - {1}
        # min(n, S) beside S is S: where it is less, it is 1 or the node fails
        column = {d for d in column if not any(is_capped(d, other) for other in column)}
        fixed = [d for d in column if isinstance(d, int)]
        if len(column) > 1 and not fixed:
            return None
        sizes.append(fixed[0] if fixed else column.pop() if column else 1)
    return tuple(sizes)


def _first(facts: ShapeFacts, node: ir.Node) -> Shape | None:
    return facts.shape(g.input_of(node, 0))


def _broadcast_inputs(facts: ShapeFacts, node: ir.Node) -> Shape | None:
    return broadcast([facts.shape(v) for v in node.inputs])


def _constant_of_shape(facts: ShapeFacts, node: ir.Node) -> Shape | None:
    target = facts.content(g.input_of(node, 0))
    return None if target is None or np.ndim(target) != 1 else tuple(target)


def _transposed(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    perm = g.attribute(node, "perm", tuple(reversed(range(len(data)))))
    return tuple(data[axis] for axis in perm) if len(perm) == len(data) else None


def _product(facts: ShapeFacts, node: ir.Node, left: Shape) -> Shape | None:
    """Of MatMul, for operands that are matrices or stacks of them."""
    right = facts.shape(node.inputs[1])
    if right is None or len(left) < 2 or len(right) < 2:
        return None
    stack = broadcast([left[:-2], right[:-2]])
    return None if stack is None else (*stack, left[-2], right[-1])


def _gathered(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    indices = facts.shape(node.inputs[1])
    axis = g.attribute(node, "axis", 0)
    if indices is None or not -len(data) <= axis < len(data):
        return None
    axis %= len(data)
    return (*data[:axis], *indices, *data[axis + 1 :])


def _gathered_elements(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    return facts.shape(node.inputs[1])


def _gathered_slices(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """GatherND."""
    indices = facts.shape(node.inputs[1])
    reach = indices[-1] if indices else None
    rest = data[g.attribute(node, "batch_dims", 0) :]
    if not indices or not isinstance(reach, int) or not 0 < reach <= len(rest):
        return None
    return (*indices[:-1], *rest[reach:])


def _expanded(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    target = facts.content(node.inputs[1])
    return None if target is None or np.ndim(target) != 1 else broadcast([data, tuple(target)])


def _tiled(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    repeats = g.integers_of(node.inputs[1])
    same_rank = repeats is not None and len(repeats) == len(data)
    return tuple(size * n for size, n in zip(data, repeats, strict=True)) if repeats and same_rank else None


def _flattened(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    axis = g.attribute(node, "axis", 1)
    if not -len(data) <= axis <= len(data):
        return None
    split = axis + len(data) if axis < 0 else axis
    sizes: list[Size] = [1, 1]
    for place, size in enumerate(data):
        sizes[place >= split] = size * sizes[place >= split]
    return tuple(sizes)


def _range(facts: ShapeFacts, node: ir.Node) -> Shape | None:
    """Range(0, n, 1) has n elements, where n is a dimension; with plain numbers it is arithmetic."""
    bounds = [facts.content(v) for v in node.inputs]
    if any(b is None or b.ndim for b in bounds):
        return None
    start, limit, step = (b[()] for b in bounds if b is not None)
    if isinstance(start, int) and isinstance(limit, int) and isinstance(step, int) and step:
        return (len(range(start, limit, step)),)
    if start == 0 and step == 1 and isinstance(limit, Dim) and min(limit.terms.values()) >= 0:
        return (limit,)
    return None


def _padded(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    pads = g.attribute(node, "pads", None)
    found = facts.content(g.input_of(node, 1)) if pads is None else np.array(pads, dtype=object)
    if found is None or found.shape != (2 * len(data),) or g.input_of(node, 3) is not None:
        return None
    return tuple(size + found[axis] + found[axis + len(data)] for axis, size in enumerate(data))


def _sliced(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """Along axes of known size; and the first `n` of them, where `n` is a dimension, are min(n, size)."""
    if "starts" in node.attributes:
        operands = [g.attribute(node, name, None) for name in ("starts", "ends", "axes")] + [None]
    else:
        found = [(v, facts.content(v)) for v in (g.input_of(node, k) for k in range(1, 5))]
        if any(v is not None and (c is None or c.ndim != 1) for v, c in found):
            return None
        operands = [c for _, c in found]
    starts, ends = operands[0], operands[1]
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if operands[2] is None else operands[2]
    steps = [1] * len(starts) if operands[3] is None else operands[3]
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    sizes = list(data)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        whole = sizes[axis] if isinstance(axis, int) and -len(sizes) <= axis < len(sizes) else None
        if isinstance(end, Dim) and start == 0 and step == 1 and is_natural(end):
            if isinstance(whole, int) and whole > 0:
                sizes[axis] = at_most(whole, end)
                continue
            if whole == end:
                continue
            return None
        if not isinstance(whole, int) or not all(isinstance(n, int) for n in (start, end, step)):
            return None
        if step == 0 or whole < 0:
            return None
        sizes[axis] = len(range(*slice(start, end, step).indices(whole)))
    return tuple(sizes)


def _axes_changed(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    axes = g.attribute(node, "axes", None)
    axes = list(axes) if axes is not None else g.integers_of(g.input_of(node, 1))
    if axes is None:
        return None
    rank = len(data) + (len(axes) if node.op_type == "Unsqueeze" else 0)
    places = {axis % rank for axis in axes} if all(-rank <= axis < rank for axis in axes) else set()
    if len(places) != len(axes):
        return None
    if node.op_type == "Squeeze":
        return tuple(size for axis, size in enumerate(data) if axis not in places)
    rest = iter(data)
    return tuple(1 if axis in places else next(rest) for axis in range(rank))


def _reduced(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    axes = g.attribute(node, "axes", None)
    operand = g.input_of(node, 1)
    axes = list(axes) if axes is not None else g.integers_of(operand)
    if axes is None and operand is not None:
        return None
    if not axes:
        if g.attribute(node, "noop_with_empty_axes", 0):
            return data
        axes = list(range(len(data)))
    if not all(-len(data) <= axis < len(data) for axis in axes):
        return None
    gone = {axis % len(data) for axis in axes}
    if g.attribute(node, "keepdims", 1):
        return tuple(1 if axis in gone else size for axis, size in enumerate(data))
    return tuple(size for axis, size in enumerate(data) if axis not in gone)


def _concat(facts: ShapeFacts, node: ir.Node, first: Shape) -> Shape | None:
    shapes = [facts.shape(v) for v in node.inputs]
    if not first:
        return None
    axis = g.attribute(node, "axis", 0) % len(first)
    total: Size = 0
    for shape in shapes:
        if shape is None or len(shape) != len(first):
            return None
        total = shape[axis] + total
    return (*first[:axis], total, *first[axis + 1 :])


def _split(facts: ShapeFacts, node: ir.Node) -> list[Shape]:
    whole = facts.shape(node.inputs[0])
    if not whole:
        return []
    axis = g.attribute(node, "axis", 0) % len(whole)
    sizes = g.attribute(node, "split", None)
    operand = g.input_of(node, 1)
    if sizes is None and operand is not None:
        found = facts.content(operand)
        sizes = None if found is None else found.reshape(-1).tolist()
    shapes: list[Shape] = []
    for index, value in enumerate(node.outputs):
        if sizes is not None and len(sizes) == len(node.outputs):
            part: Size = sizes[index]
        elif operand is None and isinstance(whole[axis], int) and whole[axis] % len(node.outputs) == 0:  # type: ignore[operator]
            part = floor_divide(whole[axis], len(node.outputs))
        else:
            part = Dim.named(f"#{value.name}#{axis}")
        shapes.append((*whole[:axis], part, *whole[axis + 1 :]))
    return shapes


def _recurrent(facts: ShapeFacts, node: ir.Node) -> list[Shape]:
    """Y: (places, directions, batch, hidden); Y_h and Y_c: (directions, batch, hidden)."""
    data, weights = facts.shape(node.inputs[0]), facts.shape(g.input_of(node, 2))
    if data is None or weights is None or len(data) != 3 or len(weights) != 3 or g.attribute(node, "layout", 0):
        return []
    return [(data[0], weights[0], data[1], weights[2]), *[(weights[0], data[1], weights[2])] * 2]


def _reshape(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    target = facts.content(g.input_of(node, 1))
    if target is None or np.ndim(target) != 1 or g.attribute(node, "allowzero", 0):
        return None
    shape: list[Size] = list(target)
    for axis, size in enumerate(shape):
        if isinstance(size, int) and size == 0:
            if axis >= len(data):
                return None
            shape[axis] = data[axis]
    if any(isinstance(size, Dim) and min(size.terms.values()) < 0 for size in shape):
        return None  # a difference may come out as 0 or -1, which mean something else here
    if any(isinstance(size, int) and size == -1 for size in shape):
        known: Size = 1
        for size in shape:
            if not (isinstance(size, int) and size == -1):
                known = size * known
        total: Size = 1
        for size in data:
            total = size * total
        missing = _quotient(total, known)
        if missing is None:
            return None
        shape = [missing if isinstance(size, int) and size == -1 else size for size in shape]
    return tuple(shape)


def _window(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """Conv and pooling: floor((size + pads - dilation*(kernel-1) - 1)/stride) + 1, or ceil(size/stride) for SAME."""
    if g.attribute(node, "ceil_mode", 0):
        return None
    spatial = len(data) - 2
    weight = facts.shape(g.input_of(node, 1)) if node.op_type == "Conv" else None
    if node.op_type == "Conv" and weight is None:
        return None
    kernel = g.attribute(node, "kernel_shape", weight[2:] if weight else None)
    if kernel is None or len(kernel) != spatial or not all(isinstance(k, int) for k in kernel):
        return None
    strides = g.attribute(node, "strides", (1,) * spatial)
    dilations = g.attribute(node, "dilations", (1,) * spatial)
    padding = g.attribute(node, "auto_pad", "NOTSET")
    pads = g.attribute(node, "pads", (0,) * (2 * spatial)) if padding == "NOTSET" else (0,) * (2 * spatial)
    sizes: list[Size] = [data[0], weight[0] if weight else data[1]]
    for axis in range(spatial):
        if padding in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(floor_divide(data[2 + axis] + (strides[axis] - 1), strides[axis]))
            continue
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        room = data[2 + axis] + (pads[axis] + pads[axis + spatial] - reach)
        sizes.append(floor_divide(room, strides[axis]) + 1)
    return tuple(sizes)


def _global_window(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    return (*data[:2], *[1] * (len(data) - 2)) if len(data) > 2 else None


def _gemm(facts: ShapeFacts, node: ir.Node, left: Shape) -> Shape | None:
    right = facts.shape(node.inputs[1])
    if right is None or len(left) != 2 or len(right) != 2:
        return None
    return left[1 if g.attribute(node, "transA", 0) else 0], right[0 if g.attribute(node, "transB", 0) else 1]


def _resized(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """By constant scales, floor(size * scale) in float32, or to sizes; on all axes."""
    if {"axes", "keep_aspect_ratio_policy"} & node.attributes.keys():
        return None
    if g.attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return None
    if g.input_of(node, 3) is not None:
        target = facts.content(node.inputs[3])
        return tuple(target) if target is not None and target.shape == (len(data),) else None
    scales = facts.constant(g.input_of(node, 1 if len(node.inputs) == 2 else 2))  # two inputs up to opset 10
    if scales is None or scales.shape != (len(data),):
        return None
    sizes: list[Size] = []
    for size, scale in zip(data, scales.astype(np.float32), strict=True):
        if isinstance(size, int):
            sizes.append(int(np.floor(np.float32(size) * scale)))
        elif scale == np.floor(scale) and scale >= 1:
            sizes.append(size * int(scale))
        else:
            return None
    return tuple(sizes)


def _depth_to_space(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """And SpaceToDepth, its inverse."""
    block = g.attribute(node, "blocksize", 0)
    if len(data) != 4 or block < 1:
        return None
    batch, channels, height, width = data
    if node.op_type == "DepthToSpace":
        return batch, floor_divide(channels, block * block), height * block, width * block
    return batch, channels * (block * block), floor_divide(height, block), floor_divide(width, block)


def _index_of_extreme(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """ArgMax and ArgMin."""
    axis = g.attribute(node, "axis", 0)
    if not -len(data) <= axis < len(data):
        return None
    axis %= len(data)
    return (*data[:axis], *[1] * bool(g.attribute(node, "keepdims", 1)), *data[axis + 1 :])


def _transposed_window(facts: ShapeFacts, node: ir.Node, data: Shape) -> Shape | None:
    """ConvTranspose with explicit padding: stride*(size-1) + output_padding + dilation*(kernel-1) + 1 - pads."""
    weight = facts.shape(g.input_of(node, 1))
    explicit = g.attribute(node, "auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attributes
    if weight is None or len(weight) != len(data) or not explicit:
        return None
    spatial = len(data) - 2
    strides = g.attribute(node, "strides", (1,) * spatial)
    dilations = g.attribute(node, "dilations", (1,) * spatial)
    more = g.attribute(node, "output_padding", (0,) * spatial)
    pads = g.attribute(node, "pads", (0,) * (2 * spatial))
    sizes: list[Size] = [data[0], weight[1] * g.attribute(node, "group", 1)]
    for axis in range(spatial):
        reach = (weight[2 + axis] + -1) * dilations[axis] + (1 + more[axis] - pads[axis] - pads[axis + spatial])
        sizes.append((data[2 + axis] + -1) * strides[axis] + reach)
    return tuple(sizes)


def _quotient(total: Size, known: Size) -> Size | None:
    """total/known where it comes out even, for the -1 of a Reshape."""
    if isinstance(known, int):
        if known <= 0:
            return None
        if isinstance(total, int):
            return total // known if total % known == 0 else None
        return floor_divide(total, known)
    if not isinstance(total, Dim) or len(total.terms) != 1 or len(known.terms) != 1:
        return None
    (above, a), (below, b) = next(iter(total.terms.items())), next(iter(known.terms.items()))
    rest = list(above)
    for atom in below:
        if atom not in rest:
            return None
        rest.remove(atom)
    return None if a % b else Dim.named("*".join(rest)) * (a // b) if len(rest) == 1 else a // b if not rest else None


def _of_known(rule: Callable[[ShapeFacts, ir.Node, Shape], Shape | None]) -> Rule:
    """A rule that is asked only where the shape of the first input is known."""

    def asked(facts: ShapeFacts, node: ir.Node) -> Shape | None:
        data = facts.shape(node.inputs[0]) if node.inputs else None
        return None if data is None else rule(facts, node, data)

    return asked


_KEEPS_SHAPE = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "BitwiseNot", "Cast", "Ceil",
        "Celu", "Clip", "Cos", "Cosh", "CumSum", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu",
        "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "InstanceNormalization", "IsInf",
        "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "LpNormalization",
        "MeanVarianceNormalization", "Mish", "Neg", "Not", "PRelu", "QuantizeLinear", "RMSNormalization", "Reciprocal",
        "Relu", "RotaryEmbedding", "Round", "ScatterElements", "ScatterND", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
        "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Trilu",
    }
)  # fmt: skip
_BROADCASTS = frozenset(
    {
        "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
        "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_OF_KNOWN = {
    "ArgMax": _index_of_extreme,
    "ArgMin": _index_of_extreme,
    "AveragePool": _window,
    "Concat": _concat,
    "Conv": _window,
    "ConvTranspose": _transposed_window,
    "DepthToSpace": _depth_to_space,
    "Expand": _expanded,
    "Flatten": _flattened,
    "Gather": _gathered,
    "GatherElements": _gathered_elements,
    "GatherND": _gathered_slices,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_window,
    "GlobalLpPool": _global_window,
    "GlobalMaxPool": _global_window,
    "MatMul": _product,
    "MaxPool": _window,
    "Pad": _padded,
    "Reshape": _reshape,
    "Resize": _resized,
    "Slice": _sliced,
    "SpaceToDepth": _depth_to_space,
    "Squeeze": _axes_changed,
    "Tile": _tiled,
    "Transpose": _transposed,
    "Unsqueeze": _axes_changed,
    **{f"Reduce{kind}": _reduced for kind in _REDUCTIONS},
}
RULES: dict[str, Rule] = {
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    **dict.fromkeys(_KEEPS_SHAPE, _first),
    **dict.fromkeys(_BROADCASTS, _broadcast_inputs),
    **{op: _of_known(rule) for op, rule in _OF_KNOWN.items()},
}
RULES_OF_SEVERAL: dict[str, Callable[[ShapeFacts, ir.Node], list[Shape]]] = {
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "RNN": _recurrent,
    "Split": _split,
}
