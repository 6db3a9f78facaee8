"""Pairs of numbers turned by an angle that depends on the position.

    x1, x2 = the even and odd elements of each head, or its two halves
    Concat(x1 c - x2 s, x1 s + x2 c), interleaved again or not  =  RotaryEmbedding(x, c, s)

Heads behind positions (x: (B, S, H, D), c and s: (1 or B, S, 1, D/2)) or before them (x: (B, H, S, D), c and s:
(1 or B, 1, S, D/2)). Halves are parts of a Split, slices, or elements gathered from a last axis of two.

Conditions: float32; H and D known; the shapes of c and s proven to be these. The operator wants c and s for each
sample, so where the batch is not known to be 1 they are repeated, once for the whole model.
Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.cleanup.redundant import slice_operands
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, producer
from graphopt.shapes.dimensions import Size

ANCHORS = ("Concat",)
OPSET = 23


@dataclass(frozen=True)
class _Half:
    """One of the two parts of `source` along its last axis: every other element, or the first or second half."""

    source: ir.Value
    second: bool
    interleaved: bool
    nodes: frozenset[ir.Node]


def match(node: ir.Node, view: View) -> Fusion | None:
    shape = view.shape(node.outputs[0])
    if len(node.inputs) != 2 or shape is None or not is_float(node.outputs[0]):
        return None
    if g.attribute(node, "axis", 0) not in (-1, len(shape) - 1):
        return None
    real, imaginary = node.inputs
    opened = [producer(v, "Unsqueeze", "Reshape") for v in (real, imaginary)]
    interleaved = shape[-1] == 2 and len(shape) == 5 and None not in opened
    nodes: set[ir.Node] = {node}
    if interleaved:
        for each in opened:
            assert each is not None
            if view.shape(each.inputs[0]) != shape[:-1] or view.shape(each.outputs[0]) != (*shape[:-1], 1):
                return None
            nodes.add(each)
        real, imaginary = (each.inputs[0] for each in opened if each is not None)
    minus, plus = producer(real, "Sub"), producer(imaginary, "Add")
    if minus is None or plus is None:
        return None
    turned = _turned(view, minus, plus)
    if turned is None or turned[0].interleaved != interleaved:
        return None
    half, cosine, sine, inner = turned
    source = view.shape(half.source)
    if source is None or source != shape or len(source) != (5 if interleaved else 4):
        return None
    return _fusion(view, node, half, cosine, sine, frozenset(nodes | inner))


def _turned(view: View, minus: ir.Node, plus: ir.Node):
    """(the first half, cosine, sine, nodes) of x1 c - x2 s and x1 s + x2 c."""
    parts = [producer(v, "Mul") for v in (*minus.inputs, *plus.inputs)]
    if any(part is None for part in parts):
        return None
    first, second, third, fourth = (part for part in parts if part is not None)
    for x1, cosine in (first.inputs, first.inputs[::-1]):
        for x2, sine in (second.inputs, second.inputs[::-1]):
            if cosine is None or sine is None:
                continue
            wanted = {frozenset([x1, sine]), frozenset([x2, cosine])}
            if {frozenset(third.inputs), frozenset(fourth.inputs)} != wanted:
                continue
            one, two = _half(view, x1), _half(view, x2)
            if one is None or two is None or one.second or not two.second:
                continue
            if one.source is not two.source or one.interleaved != two.interleaved:
                continue
            nodes = {minus, plus, first, second, third, fourth, *one.nodes, *two.nodes}
            return one, cosine, sine, nodes
    return None


def _half(view: View, value: ir.Value | None) -> _Half | None:
    if value is None:
        return None
    narrowed = producer(value, "Squeeze", "Reshape")
    if narrowed is not None:
        inside, outside = view.shape(narrowed.inputs[0]), view.shape(value)
        if inside is None or outside is None or inside != (*outside, 1):
            return None
        part = _part(view, narrowed.inputs[0])
        if part is None or not part.interleaved:
            return None
        return _Half(part.source, part.second, True, part.nodes | {narrowed})
    gathered = producer(value, "Gather")
    if gathered is not None:
        shape, index = view.shape(gathered.inputs[0]), g.constant_of(gathered.inputs[1])
        source, axis = gathered.inputs[0], g.attribute(gathered, "axis", 0)
        if source is None or shape is None or shape[-1] != 2 or axis not in (-1, len(shape) - 1):
            return None
        if index is None or index.ndim or int(index) not in (0, 1, -1, -2):
            return None
        return _Half(source, int(index) % 2 == 1, True, frozenset([gathered]))
    part = _part(view, value)
    return part if part is not None and not part.interleaved else None


def _part(view: View, value: ir.Value | None) -> _Half | None:
    """One of two equal pieces along the last axis; `interleaved` where that axis has but two elements."""
    node = value.producer() if value is not None else None
    if node is None or not g.is_onnx(node, "Split", "Slice") or node.inputs[0] is None:
        return None
    shape, piece = view.shape(node.inputs[0]), view.shape(value)
    if not shape or piece is None or not isinstance(shape[-1], int) or shape[-1] % 2 or piece[-1] != shape[-1] // 2:
        return None
    if piece[:-1] != shape[:-1]:
        return None
    if node.op_type == "Split":
        second = node.outputs.index(value) == 1 if len(node.outputs) == 2 else None
    else:
        operands = slice_operands(node)
        if operands is None or len(operands[0]) != 1 or operands[3] != [1]:
            return None
        start = operands[0][0]
        second = {0: False, shape[-1] // 2: True, -(shape[-1] // 2): True}.get(start)
    if second is None:
        return None
    return _Half(node.inputs[0], second, shape[-1] == 2 and len(shape) == 5, frozenset([node]))


def _fusion(
    view: View, node: ir.Node, half: _Half, cosine: ir.Value, sine: ir.Value, nodes: frozenset[ir.Node]
) -> Fusion | None:
    shape = view.shape(half.source)
    assert shape is not None
    batch, second, third = shape[0], shape[1], shape[2]
    pairs = shape[3] if half.interleaved else shape[3] // 2 if isinstance(shape[3], int) else None
    if not isinstance(pairs, int):
        return None
    size = 2 * pairs
    behind = _angles(view, cosine, sine, batch, second, pairs, head_axis=2)
    if behind is not None and isinstance(third, int):
        heads, positions_first = third, True
    else:
        behind = _angles(view, cosine, sine, batch, third, pairs, head_axis=1)
        heads, positions_first = second, False
        if behind is None or not isinstance(heads, int):
            return None
    repeated = behind

    def build(writer: Writer) -> ir.Value:
        angles = [
            angle_table(view, writer, value, half.source, batch, 2 if positions_first else 1, repeated)
            for value in (cosine, sine)
        ]
        attributes = {"interleaved": 1} if half.interleaved else {}
        if positions_first:
            rows = writer.reshaped(half.source, [0, 0, heads * size])
            turned = writer.node("RotaryEmbedding", [rows, *angles], {**attributes, "num_heads": heads})
            last = [0, 0, heads, pairs, 2] if half.interleaved else [0, 0, heads, size]
            return writer.reshaped(turned, last)
        flat = writer.reshaped(half.source, [0, 0, 0, size]) if half.interleaved else half.source
        turned = writer.node("RotaryEmbedding", [flat, *angles], attributes)
        return writer.reshaped(turned, [0, 0, 0, pairs, 2]) if half.interleaved else turned

    return Fusion(node, nodes, OPSET, build)


def _angles(
    view: View, cosine: ir.Value, sine: ir.Value, batch: Size, positions: Size, pairs: int, head_axis: int
) -> bool | None:
    """Whether the angles have to be repeated for each sample; None where their shapes are others."""
    found = set()
    for value in (cosine, sine):
        shape = view.shape(value)
        if shape is None or len(shape) != 4:
            return None
        rest = shape[1:3] if head_axis == 2 else (shape[2], shape[1])
        if rest != (positions, 1) or shape[3] != pairs or shape[0] not in (1, batch):
            return None
        found.add(shape[0] != batch)
    return found.pop() if len(found) == 1 else None


def angle_table(
    view: View, writer: Writer, value: ir.Value, source: ir.Value, batch: Size, head_axis: int, repeated: bool
) -> ir.Value:
    """`value` as (B, S, D/2), made once for all places that read it."""
    key = ("angles", value, head_axis, batch if repeated else None)
    if key not in view.shared:
        flat = writer.node("Squeeze", [value, writer.constant("axis", np.array([head_axis], np.int64))])
        if repeated:
            flat = writer.node("Expand", [flat, batch_target(view, writer, source, batch, 3)])
        view.shared[key] = flat
    return view.shared[key]


def batch_target(view: View, writer: Writer, source: ir.Value, batch: Size, rank: int) -> ir.Value:
    """The shape (B, 1, 1 ...), to expand to; B is the first dimension of `source`."""
    ones = [1] * (rank - 1)
    if isinstance(batch, int):
        return writer.constant("target", np.array([batch, *ones], np.int64))
    key = ("target", batch, rank)
    if key not in view.shared:
        rest = writer.constant("ones", np.array(ones, np.int64))
        view.shared[key] = writer.node("Concat", [dimension(view, writer, source, 0), rest], {"axis": 0})
    return view.shared[key]


def dimension(view: View, writer: Writer, source: ir.Value, axis: int) -> ir.Value:
    """A dimension of `source` as a vector of one, read off an input of the model where one has it."""
    shape = view.shape(source)
    assert shape is not None
    for given in view.model.graph.inputs:
        for place, size in enumerate(view.shape(given) or ()):
            if size == shape[axis]:
                source, axis = given, place
                break
    found = writer.node("Shape", [source], {"start": axis, "end": axis + 1})
    found.type = ir.TensorType(ir.DataType.INT64)
    return found
