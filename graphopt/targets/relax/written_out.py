"""Operators that `fuse-operators` makes and TVM has no converter for (or one for another operator of the name), as the
products, sums and reshapes they stand for, in the form that our kernels run best.

    InstanceNormalization   x - m, times scale / sqrt(v + e) a channel, plus bias
    RMSNormalization        x times 1 / sqrt(mean(x x) + e), times scale
    RotaryEmbedding         halves turned by tables that hold a row a position
    Attention               heads of q that share one of k and v are rows of one product: nothing is repeated
    Swish                   x Sigmoid(a x)

Shapes must be known. Forms that `fuse-operators` does not make (caches, softcap, positions as an operand) stay as they
are, for the importer to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.onnx_inference import infer_shapes
from graphopt.targets.relax.stand_ins import Writer


def rewrite(model: ir.Model) -> None:
    """Write out every such operator of the main graph, in place. Input shapes must be static."""
    infer_shapes(model)
    for node in list(model.graph):
        rule = _RULES.get(node.op_type) if g.is_onnx(node) else None
        if rule is None or len(node.outputs) != 1 or any(v is not None and v.dtype != _FLOAT for v in node.inputs):
            continue
        writer = _Writer(node, g.opset_of(model))
        result = rule(writer, node)
        if result is None:
            continue
        writer.replace(node, result)


_FLOAT = ir.DataType.FLOAT


class _Writer(Writer):
    """Takes arrays and numbers for operands; shapes are followed by hand."""

    def __init__(self, node: ir.Node, opset: int):
        super().__init__(node)
        self.opset = opset

    def add(self, op_type: str, *inputs: ir.Value | np.ndarray | float, **attributes) -> ir.Value:
        return self.emit(op_type, [self._operand(x) for x in inputs], attributes)

    def _operand(self, x: ir.Value | np.ndarray | float) -> ir.Value:
        if isinstance(x, ir.Value):
            return x
        array = np.asarray(x, np.float32) if not isinstance(x, np.ndarray) else x
        return self.emit("Constant", [], {"value": ir.tensor(array)})

    def mean(self, x: ir.Value, axes: list[int]) -> ir.Value:
        if self.opset >= 18:
            return self.add("ReduceMean", x, np.array(axes, np.int64), keepdims=1)
        return self.add("ReduceMean", x, axes=axes, keepdims=1)

    def reshaped(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.add("Reshape", x, np.array(shape, np.int64))

    def cut(self, x: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
        """Elements of the last axis."""
        bounds = [np.array([n], np.int64) for n in (start, end, -1, step)]
        return self.add("Slice", x, *bounds)


def _instance_normalization(w: _Writer, node: ir.Node) -> ir.Value | None:
    x, scale, bias = node.inputs
    shape = g.static_shape(x)
    if x is None or scale is None or bias is None or shape is None:
        return None
    axes = list(range(2, len(shape)))
    column = (1, shape[1], *[1] * len(axes))
    difference = w.add("Sub", x, w.mean(x, axes))
    variance = w.mean(w.add("Mul", difference, difference), axes)
    root = w.add("Sqrt", w.add("Add", variance, g.attribute(node, "epsilon", 1e-5)))
    factor = w.add("Div", w.reshaped(scale, *column), root)
    return w.add("Add", w.add("Mul", difference, factor), w.reshaped(bias, *column))


def _rms_normalization(w: _Writer, node: ir.Node) -> ir.Value | None:
    x, scale = node.inputs
    if x is None or scale is None or x.shape is None:
        return None
    rank = len(x.shape)
    axes = list(range(g.attribute(node, "axis", -1) % rank, rank))
    mean = w.mean(w.add("Mul", x, x), axes)
    root = w.add("Sqrt", w.add("Add", mean, g.attribute(node, "epsilon", 1e-5)))
    return w.add("Mul", w.add("Div", x, root), scale)


def _swish(w: _Writer, node: ir.Node) -> ir.Value | None:
    x, alpha = node.inputs[0], g.attribute(node, "alpha", 1.0)
    return None if x is None else w.add("Mul", x, w.add("Sigmoid", x if alpha == 1 else w.add("Mul", x, alpha)))


def _rotary_embedding(w: _Writer, node: ir.Node) -> ir.Value | None:
    shape = g.static_shape(node.inputs[0])
    if len(node.inputs) != 3 or shape is None or g.attribute(node, "rotary_embedding_dim", 0):
        return None
    x, cosine, sine = node.inputs
    if x is None or cosine is None or sine is None:
        return None
    if len(shape) == 4:
        (batch, heads, places, size), tables = shape, (shape[0], 1, shape[2], shape[3] // 2)
        split = x
    else:
        batch, places, width = shape
        heads = g.attribute(node, "num_heads", 0)
        if not heads:
            return None
        size = width // heads
        tables = (batch, places, 1, size // 2)
        split = w.reshaped(x, batch, places, heads, size)
    c, s = w.reshaped(cosine, *tables), w.reshaped(sine, *tables)
    if g.attribute(node, "interleaved", 0):
        one, two = w.cut(split, 0, size, 2), w.cut(split, 1, size, 2)
    else:
        one, two = w.cut(split, 0, size // 2), w.cut(split, size // 2, size)
    real = w.add("Sub", w.add("Mul", one, c), w.add("Mul", two, s))
    imaginary = w.add("Add", w.add("Mul", one, s), w.add("Mul", two, c))
    if g.attribute(node, "interleaved", 0):
        lead = (batch, heads, places) if len(shape) == 4 else (batch, places, heads)
        parts = [w.reshaped(v, *lead, size // 2, 1) for v in (real, imaginary)]
        return w.reshaped(w.add("Concat", *parts, axis=4), *shape)
    return w.reshaped(w.add("Concat", real, imaginary, axis=3), *shape)


def _attention(w: _Writer, node: ir.Node) -> ir.Value | None:
    operands = [g.input_of(node, i) for i in range(3)]
    shapes = [g.static_shape(v) for v in operands]
    mask = g.input_of(node, 3)
    plain = not any(g.attribute(node, name, 0) for name in ("softcap", "softmax_precision", "qk_matmul_output_mode"))
    windowed = any(g.attribute(node, f"{side}_window_size", -1) != -1 for side in ("left", "right"))
    if len(node.inputs) > 4 or not plain or windowed or g.attribute(node, "is_causal", 0):
        return None
    if shapes[0] is None or shapes[1] is None or shapes[2] is None:
        return None
    rank = len(shapes[0])
    if rank == 3:
        heads, groups = g.attribute(node, "q_num_heads", 0), g.attribute(node, "kv_num_heads", 0)
        split = []
        for value, shape, count in zip(operands, shapes, (heads, groups, groups), strict=True):
            assert value is not None and shape is not None
            opened = w.reshaped(value, shape[0], shape[1], count, shape[2] // count)
            split.append((w.add("Transpose", opened, perm=[0, 2, 1, 3]), shape[0], shape[1], shape[2] // count))
    else:
        heads, groups = shapes[0][1], shapes[1][1]
        split = [(v, s[0], s[2], s[3]) for v, s in zip(operands, shapes, strict=True) if s is not None]
    (q, batch, rows, size), (k, _, columns, _), (v, _, _, width) = split
    assert q is not None and k is not None and v is not None
    shared = heads // groups
    if shared > 1:
        q = w.reshaped(q, batch, groups, shared * rows, size)
    scores = w.add("MatMul", q, w.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = w.add("Mul", scores, g.attribute(node, "scale", 0.0) or 1 / math.sqrt(size))
    if mask is not None:
        if shared > 1:
            scores = w.reshaped(scores, batch, heads, rows, columns)
        scores = w.add("Add", scores, mask)
    shares = w.add("Softmax", scores, axis=-1)
    if mask is not None and _may_be_endless(mask):  # a row that -inf masks throughout is zero
        shares = w.add("Where", w.add("IsNaN", shares), 0.0, shares)
    if shared > 1 and mask is not None:
        shares = w.reshaped(shares, batch, groups, shared * rows, columns)
    done = w.add("MatMul", shares, v)
    if shared > 1:
        done = w.reshaped(done, batch, heads, rows, width)
    if rank == 4:
        return done
    return w.reshaped(w.add("Transpose", done, perm=[0, 2, 1, 3]), batch, rows, heads * width)


def _may_be_endless(mask: ir.Value) -> bool:
    """Whether -inf may mask a row throughout."""
    node = mask.producer()
    if node is not None and g.is_onnx(node, "Max"):
        bounds = [g.constant_of(v) for v in node.inputs]
        if any(bound is not None and np.isfinite(bound).all() for bound in bounds):
            return False
    constant = g.constant_of(mask)
    if constant is not None:
        return bool(np.isneginf(constant).all(axis=-1).any())
    chosen = g.chosen_constants(mask)
    return chosen is None or any(np.isneginf(array).any() for array in chosen)


_RULES: dict[str, Callable[[_Writer, ir.Node], ir.Value | None]] = {
    "InstanceNormalization": _instance_normalization,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Attention": _attention,
    "Swish": _swish,
}
OPERATORS = frozenset(_RULES)
