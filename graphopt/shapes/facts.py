"""What can be known of shapes and of integer vectors computed from shapes, while some dimensions stay dynamic.

`ShapeFacts(model)` walks the graph once. `shape(value)` is a tuple of integers and `Dim`s, `content(value)` the
elements of an integer scalar or vector that shape arithmetic produced. Dimension names are taken at their word
(ONNX: equal names, equal sizes), so run `onnx_inference.infer_shapes` first: it keeps the names of the model's inputs
and forgets those on other values, where exporters write names that hold for one trace only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.dimensions import Dim, Size, at_most, floor_divide, is_capped, is_natural
from graphopt.shapes.vectors import STEPS, objects, scalar

Shape = tuple[Size, ...]

_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
_NAMELESS = frozenset({"none", "unk", "unknown", "dynamic", "dyn", "any"})
_LONGEST_VECTOR = 64
_KEEPS_SHAPE = frozenset(
    {
        "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp",
        "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN",
        "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Not", "PRelu", "QuantizeLinear",
        "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Round", "Selu", "Sigmoid", "Sign", "Sin",
        "Softmax", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
_BROADCASTS = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
     "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"}
)  # fmt: skip


class ShapeFacts:
    """Shapes and shape vectors of a model's main graph, as they are now."""

    def __init__(self, model: ir.Model):
        self._opset = g.opset_of(model)
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, np.ndarray | None] = {}
        for node in model.graph:
            if g.is_onnx(node) and not g.holds_subgraphs(node):
                content = self._evaluate(node)
                if content is not None and content.size <= _LONGEST_VECTOR:
                    self._contents[node.outputs[0]] = content
                    self._shapes[node.outputs[0]] = content.shape
                    continue
                if node.op_type == "Split":
                    self._infer_split(node)
                    continue
                if node.op_type in ("GRU", "LSTM", "RNN"):
                    self._infer_recurrent(node)
                    continue
                shape = self._infer(node)
                if shape is not None:
                    self._shapes[node.outputs[0]] = self._sharpen(shape, node.outputs[0])

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The dimensions of `value`; None when its rank is unknown."""
        if value is None:
            return None
        if value not in self._shapes:
            self._shapes[value] = self._recorded(value)
        return self._shapes[value]

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """Elements of an integer scalar or vector: an object array of integers and `Dim`s; None when unknown.

        Of truth values too: 0 and 1.
        """
        if value is None:
            return None
        if value not in self._contents:
            array = g.constant_of(value)
            small = array is not None and array.ndim <= 1 and array.size <= _LONGEST_VECTOR
            kept = array is not None and small and array.dtype in (np.int64, np.int32, np.bool_)
            self._contents[value] = objects(array) if array is not None and kept else None
        return self._contents[value]

    def are_complete(self, model: ir.Model) -> bool:
        """Whether every shape is known, in numbers and in dimensions of the model's inputs: nothing can be added."""
        named = {
            atom
            for value in model.graph.inputs
            for size in self.shape(value) or ()
            if isinstance(size, Dim)
            for monomial in size.terms
            for atom in monomial
        }
        for node in model.graph:
            for value in node.outputs:
                shape = self._shapes.get(value) if value.name else ()
                if shape is None or (value.type is None and value.name):
                    return False
                for size in shape:
                    if isinstance(size, Dim) and not all(a in named for m in size.terms for a in m):
                        return False
        return True

    def vectors(self) -> list[tuple[ir.Value, np.ndarray]]:
        """The computed integer values that are known at least in part, in topological order."""
        return [(v, c) for v, c in self._contents.items() if c is not None and v.producer() is not None]

    def _recorded(self, value: ir.Value) -> Shape | None:
        array = value.const_value
        if array is not None and not value.is_graph_input():
            return tuple(int(d) for d in array.shape.numpy())
        if value.shape is None or not (value.type is None or isinstance(value.type, ir.TensorType)):
            return None
        return tuple(_size(d, f"{value.name}#{axis}") for axis, d in enumerate(value.shape))

    def _sharpen(self, shape: Shape, value: ir.Value) -> Shape:
        """Integers that ONNX's own inference found are better than anything derived here."""
        recorded = g.dims_of(value)
        if recorded is None or len(recorded) != len(shape):
            return shape
        return tuple(d if r is None else r for r, d in zip(recorded, shape, strict=True))

    # -- shapes ------------------------------------------------------------------------------------------------

    def _infer(self, node: ir.Node) -> Shape | None:
        op = node.op_type
        if op == "Range":
            return self._range(node)
        if op == "ConstantOfShape":
            target = self.content(g.input_of(node, 0))
            return None if target is None or np.ndim(target) != 1 else tuple(target)
        first = self.shape(g.input_of(node, 0))
        if op in _KEEPS_SHAPE:
            return first
        if op in _BROADCASTS:
            return _broadcast([self.shape(v) for v in node.inputs])
        if first is None:
            return None
        if op == "Transpose":
            perm = g.attribute(node, "perm", tuple(reversed(range(len(first)))))
            return tuple(first[axis] for axis in perm) if len(perm) == len(first) else None
        if op == "Concat":
            return self._concat(node)
        if op == "Reshape":
            return self._reshape(node, first)
        if op in ("Conv", "MaxPool", "AveragePool"):
            return self._window(node, first)
        if op == "ConvTranspose":
            return self._transposed_window(node, first)
        if op in ("Squeeze", "Unsqueeze"):
            return self._axes_changed(node, first)
        if op == "MatMul":
            return _product_shape(first, self.shape(node.inputs[1]))
        if op == "Gather":
            indices = self.shape(node.inputs[1])
            axis = g.attribute(node, "axis", 0)
            if indices is None or not -len(first) <= axis < len(first):
                return None
            axis %= len(first)
            return (*first[:axis], *indices, *first[axis + 1 :])
        if op == "GatherElements":
            return self.shape(node.inputs[1])
        if op == "Flatten":
            return _flattened(first, g.attribute(node, "axis", 1))
        if op == "GatherND":
            indices = self.shape(node.inputs[1])
            reach = indices[-1] if indices else None
            rest = first[g.attribute(node, "batch_dims", 0) :]
            if not indices or not isinstance(reach, int) or not 0 < reach <= len(rest):
                return None
            return (*indices[:-1], *rest[reach:])
        if op.startswith("Reduce"):
            return self._reduced(node, first)
        if op == "Expand":
            target = self.content(node.inputs[1])
            return None if target is None or np.ndim(target) != 1 else _broadcast([first, tuple(target)])
        if op == "Pad":
            return self._padded(node, first)
        if op == "Slice":
            return self._sliced(node, first)
        if op == "Tile":
            repeats = g.integers_of(node.inputs[1])
            same_rank = repeats is not None and len(repeats) == len(first)
            return tuple(size * n for size, n in zip(first, repeats, strict=True)) if repeats and same_rank else None
        return None

    def _range(self, node: ir.Node) -> Shape | None:
        """Range(0, n, 1) has n elements, where n is a dimension; with plain numbers it is arithmetic."""
        bounds = [self.content(v) for v in node.inputs]
        if any(b is None or b.ndim for b in bounds):
            return None
        start, limit, step = (b[()] for b in bounds if b is not None)
        if isinstance(start, int) and isinstance(limit, int) and isinstance(step, int) and step:
            return (len(range(start, limit, step)),)
        if start == 0 and step == 1 and isinstance(limit, Dim) and min(limit.terms.values()) >= 0:
            return (limit,)
        return None

    def _padded(self, node: ir.Node, data: Shape) -> Shape | None:
        pads = g.attribute(node, "pads", None)
        found = self.content(g.input_of(node, 1)) if pads is None else np.array(pads, dtype=object)
        if found is None or found.shape != (2 * len(data),) or g.input_of(node, 3) is not None:
            return None
        return tuple(size + found[axis] + found[axis + len(data)] for axis, size in enumerate(data))

    def _sliced(self, node: ir.Node, data: Shape) -> Shape | None:
        """Along axes of known size; and the first `n` of them, where `n` is a dimension, are min(n, size)."""
        if "starts" in node.attributes:
            operands = [g.attribute(node, name, None) for name in ("starts", "ends", "axes")] + [None]
        else:
            found = [(v, self.content(v)) for v in (g.input_of(node, k) for k in range(1, 5))]
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

    def _axes_changed(self, node: ir.Node, data: Shape) -> Shape | None:
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

    def _reduced(self, node: ir.Node, data: Shape) -> Shape | None:
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

    def _concat(self, node: ir.Node) -> Shape | None:
        shapes = [self.shape(v) for v in node.inputs]
        first = shapes[0]
        if first is None or not first:
            return None
        axis = g.attribute(node, "axis", 0) % len(first)
        total: Size = 0
        for shape in shapes:
            if shape is None or len(shape) != len(first):
                return None
            total = shape[axis] + total
        return (*first[:axis], total, *first[axis + 1 :])

    def _infer_split(self, node: ir.Node) -> None:
        whole = self.shape(node.inputs[0])
        if not whole:
            return
        axis = g.attribute(node, "axis", 0) % len(whole)
        sizes = g.attribute(node, "split", None)
        operand = g.input_of(node, 1)
        if sizes is None and operand is not None:
            found = self.content(operand)
            sizes = None if found is None else found.reshape(-1).tolist()
        for index, value in enumerate(node.outputs):
            if sizes is not None and len(sizes) == len(node.outputs):
                part: Size = sizes[index]
            elif operand is None and isinstance(whole[axis], int) and whole[axis] % len(node.outputs) == 0:  # type: ignore[operator]
                part = floor_divide(whole[axis], len(node.outputs))
            else:
                part = Dim.named(f"#{value.name}#{axis}")
            self._shapes[value] = self._sharpen((*whole[:axis], part, *whole[axis + 1 :]), value)

    def _infer_recurrent(self, node: ir.Node) -> None:
        """Y: (places, directions, batch, hidden); Y_h and Y_c: (directions, batch, hidden)."""
        data, weights = self.shape(node.inputs[0]), self.shape(g.input_of(node, 2))
        if data is None or weights is None or len(data) != 3 or len(weights) != 3 or g.attribute(node, "layout", 0):
            return
        shapes = [(data[0], weights[0], data[1], weights[2]), *[(weights[0], data[1], weights[2])] * 2]
        for value, shape in zip(node.outputs, shapes, strict=False):
            self._shapes[value] = self._sharpen(shape, value)

    def _reshape(self, node: ir.Node, data: Shape) -> Shape | None:
        target = self.content(g.input_of(node, 1))
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

    def _window(self, node: ir.Node, data: Shape) -> Shape | None:
        """Conv and pooling with explicit padding: floor((size + pads - dilation*(kernel-1) - 1)/stride) + 1."""
        if g.attribute(node, "auto_pad", "NOTSET") != "NOTSET" or g.attribute(node, "ceil_mode", 0):
            return None
        spatial = len(data) - 2
        weight = self.shape(g.input_of(node, 1)) if node.op_type == "Conv" else None
        if node.op_type == "Conv" and weight is None:
            return None
        kernel = g.attribute(node, "kernel_shape", weight[2:] if weight else None)
        if kernel is None or len(kernel) != spatial or not all(isinstance(k, int) for k in kernel):
            return None
        strides = g.attribute(node, "strides", (1,) * spatial)
        dilations = g.attribute(node, "dilations", (1,) * spatial)
        pads = g.attribute(node, "pads", (0,) * (2 * spatial))
        sizes: list[Size] = [data[0], weight[0] if weight else data[1]]
        for axis in range(spatial):
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            room = data[2 + axis] + (pads[axis] + pads[axis + spatial] - reach)
            sizes.append(floor_divide(room, strides[axis]) + 1)
        return tuple(sizes)

    def _transposed_window(self, node: ir.Node, data: Shape) -> Shape | None:
        """ConvTranspose with explicit padding: stride*(size-1) + output_padding + dilation*(kernel-1) + 1 - pads."""
        weight = self.shape(g.input_of(node, 1))
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

    # -- contents ----------------------------------------------------------------------------------------------

    def _evaluate(self, node: ir.Node) -> np.ndarray | None:
        op = node.op_type
        if op in ("Shape", "Size"):
            shape = self.shape(node.inputs[0])
            if shape is None:
                return None
            if op == "Shape":
                return objects(shape[slice(g.attribute(node, "start", None), g.attribute(node, "end", None))])
            total: Size = 1
            for size in shape:
                total = size * total
            return scalar(total)
        step = STEPS.get(op)
        truth = op == "Equal" and node.outputs[0].dtype == ir.DataType.BOOL
        if step is None or not (truth or node.outputs[0].dtype in (ir.DataType.INT64, ir.DataType.INT32)):
            return None
        operands = [None if v is None else self.content(v) for v in node.inputs]
        if any(v is not None and c is None for v, c in zip(node.inputs, operands, strict=True)):
            return None
        if not operands or operands[0] is None:
            return None
        try:
            found = step(node, operands, self._opset)
        except (IndexError, ValueError, TypeError, np.exceptions.AxisError):
            return None  # an invalid or unusual node: left to the runtime
        return found if found is None or found.ndim <= 1 else None


def store_known_vectors(model: ir.Model, facts: ShapeFacts) -> int:
    """Turn computed integer vectors without an unknown element into initializers; returns how many."""
    stored = 0
    for value, content in facts.vectors():
        producer = value.producer()
        if producer is None or producer.graph is not model.graph or len(producer.outputs) != 1 or not value.uses():
            continue
        if value.is_graph_output() or value.dtype is None or not all(isinstance(e, int) for e in content.reshape(-1)):
            continue
        constant = g.add_initializer(model.graph, str(value.name), content.astype(value.dtype.numpy()))
        if g.replace_value(value, constant):
            model.graph.remove(producer, safe=True)
            stored += 1
    return stored


def _size(dimension: int | ir.SymbolicDim, anonymous: str) -> Size:
    if isinstance(dimension, int):
        return dimension
    name = dimension.value
    if name and _NAME.fullmatch(name) and name.lower() not in _NAMELESS:
        return Dim.named(name)
    return Dim.named(f"#{anonymous}")


def _product_shape(left: Shape | None, right: Shape | None) -> Shape | None:
    """Of MatMul, for operands that are matrices or stacks of them."""
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    stack = _broadcast([left[:-2], right[:-2]])
    return None if stack is None else (*stack, left[-2], right[-1])


def _broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or not known:
        return None
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


def _flattened(data: Shape, axis: int) -> Shape | None:
    if not -len(data) <= axis <= len(data):
        return None
    split = axis + len(data) if axis < 0 else axis
    sizes: list[Size] = [1, 1]
    for place, size in enumerate(data):
        sizes[place >= split] = size * sizes[place >= split]
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
