"""Scaled dot-product attention over heads.

    MatMul(Softmax(MatMul(q, k^T) * s + mask), v)  =  Attention(q, k, v, mask, scale=s)

q, k and v are (B, H, S, D), or (B, S, H, D) transposed; the scale a constant factor or divisor of the scores, of q or
of k, or none; the mask any value added to the scores. Where all three come as (B, S, H, D), and the result goes on as
(B, S, H, D), the operator takes them as (B, S, H*D) and no transposition is left. Heads of k and v that were repeated
for groups of heads of q (by Tile or Expand of a new axis behind the heads, both alike) are not repeated any more.

Conditions: float32; H and D known; the shape of the mask proven to be (.., S of q, S of k), or (.., 1, S of k), which
is repeated for all rows (ONNX Runtime wants that), once for the whole model; softmax over the last axis. A row that is
masked throughout is the mean of all values, where masks are large numbers; ONNX Runtime's operator takes the lowest
float32 for -inf then, and gives zeros, so what callers say of masks is kept above it. A row whose mask is -inf
throughout is finite, where the original gives NaN.
Reference: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2.1; Ainslie et al., GQA, EMNLP 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, producer, reader, scalar
from graphopt.passes.fusion.rotary_embedding import dimension
from graphopt.shapes.dimensions import Size

ANCHORS = ("Softmax",)
OPSET = 23
LOWEST = -3e38
"""Just above the lowest float32."""
_SWAP = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Heads:
    """q, k or v: `value` is (B, S, H, D) if `rows_first`, else (B, H, S, D); `nodes` make it what MatMul reads."""

    value: ir.Value
    rows_first: bool
    heads: int
    size: int
    nodes: frozenset[ir.Node] = frozenset()

    def shape(self, view: View) -> tuple[Size, Size]:
        """Batch and positions."""
        shape = view.shape(self.value)
        assert shape is not None
        return shape[0], shape[1 if self.rows_first else 2]


@dataclass(frozen=True)
class _Scores:
    q: ir.Value
    k: ir.Value
    """Transposed."""
    mask: ir.Value | None
    scale: float
    nodes: frozenset[ir.Node]


def match(node: ir.Node, view: View) -> Fusion | None:
    shape = view.shape(node.outputs[0])
    if shape is None or len(shape) != 4 or g.attribute(node, "axis", -1) not in (-1, 3) or view.opset < 11:
        return None
    times = reader(node.outputs[0], "MatMul")
    if times is None or times.inputs[0] is not node.outputs[0] or not is_float(node.outputs[0]):
        return None
    scores = _scores(node.inputs[0])
    if scores is None:
        return None
    q, k, v = _plain(view, scores.q), _transposed(view, scores.k), _plain(view, times.inputs[1])
    if q is None or k is None or v is None:
        return None
    k, v = _ungrouped(view, k, q.heads), _ungrouped(view, v, q.heads)
    if k.heads != v.heads:
        return None
    mask_rows = _mask_rows(view, scores.mask, q, k)
    if mask_rows is None:
        return None
    top, nodes = times, {node, times, *scores.nodes, *q.nodes, *k.nodes, *v.nodes}
    back = reader(times.outputs[0], "Transpose")
    rows_first = all(each.rows_first for each in (q, k, v))
    if back is not None and tuple(g.attribute(back, "perm", ())) == _SWAP and rows_first:
        top = back
        nodes.add(back)
    else:
        rows_first = False
    found = _Attention(view, q, k, v, scores, mask_rows, rows_first)
    return Fusion(top, frozenset(nodes), OPSET, found.build)


def _scores(value: ir.Value | None) -> _Scores | None:
    """Scale, mask and product that a softmax reads."""
    nodes: set[ir.Node] = set()
    mask = None
    node = producer(value, "Add", "Mul", "Div", "MatMul")
    if node is not None and node.op_type == "Add":
        nodes.add(node)
        for data, other in (node.inputs, node.inputs[::-1]):
            inner = producer(data, "Mul", "Div", "MatMul")
            if inner is not None and _scores(data) is not None:
                node, mask = inner, other
                break
        else:
            return None
    scale = 1.0
    if node is not None and node.op_type in ("Mul", "Div"):
        nodes.add(node)
        data, factor = _scaled(node)
        if data is None:
            return None
        scale, node = factor, producer(data, "MatMul")
    if node is None or node.op_type != "MatMul":
        return None
    nodes.add(node)
    operands = []
    for operand in node.inputs:
        scaled = producer(operand, "Mul", "Div")
        data, factor = _scaled(scaled) if scaled is not None else (None, 1.0)
        if data is not None and scaled is not None:
            nodes.add(scaled)
            scale *= factor
            operand = data
        operands.append(operand)
    if None in operands or not math.isfinite(scale) or scale <= 0:  # a scale of 0 means the default
        return None
    return _Scores(operands[0], operands[1], mask, scale, frozenset(nodes))


def _scaled(node: ir.Node) -> tuple[ir.Value | None, float]:
    """A value and the constant that it is multiplied by."""
    for data, other in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
        factor = scalar(node.inputs[other])
        constant = g.constant_of(node.inputs[other])
        if factor and constant is not None and constant.ndim <= 4:
            return node.inputs[data], factor if node.op_type == "Mul" else 1 / factor
    return None, 1.0


def _plain(view: View, value: ir.Value | None) -> _Heads | None:
    """q or v as MatMul reads it: (B, H, S, D)."""
    moved = producer(value, "Transpose")
    if moved is not None and tuple(g.attribute(moved, "perm", ())) == _SWAP:
        return _heads(view, moved.inputs[0], True, frozenset([moved]))
    return _heads(view, value, False)


def _transposed(view: View, value: ir.Value | None) -> _Heads | None:
    """k as MatMul reads it: (B, H, D, S)."""
    moved = producer(value, "Transpose")
    perm = tuple(g.attribute(moved, "perm", ())) if moved is not None else ()
    if moved is None or perm not in ((0, 1, 3, 2), (0, 2, 3, 1)):
        return None
    if perm == (0, 2, 3, 1):
        return _heads(view, moved.inputs[0], True, frozenset([moved]))
    inner = _plain(view, moved.inputs[0])
    return None if inner is None else replace(inner, nodes=inner.nodes | {moved})


def _heads(
    view: View, value: ir.Value | None, rows_first: bool, nodes: frozenset[ir.Node] = frozenset()
) -> _Heads | None:
    shape = view.shape(value)
    if value is None or shape is None or len(shape) != 4 or not is_float(value):
        return None
    heads, size = shape[2 if rows_first else 1], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return _Heads(value, rows_first, heads, size, nodes)


def _ungrouped(view: View, found: _Heads, heads: int) -> _Heads:
    """k or v before its heads were repeated; as it is where they were not.

    (.., G, 1, ..) -> Tile or Expand -> (.., G, n, ..) -> Reshape -> (.., G*n, ..): head h reads group h // n.
    """
    joined = producer(found.value, "Reshape")
    repeated = producer(joined.inputs[0], "Tile", "Expand") if joined is not None else None
    opened = producer(repeated.inputs[0], "Reshape", "Unsqueeze") if repeated is not None else None
    if joined is None or repeated is None or opened is None:
        return found
    before, five = view.shape(repeated.inputs[0]), view.shape(repeated.outputs[0])
    after = view.shape(found.value)
    axis = 2 if found.rows_first else 1
    if before is None or after is None or len(before) != 5 or before[axis + 1] != 1 or after[axis] != heads:
        return found
    groups = before[axis]
    if not isinstance(groups, int) or heads % groups:
        return found
    if five is None:  # Expand: what is not known of its result follows from what it becomes
        five = (*before[: axis + 1], heads // groups, *before[axis + 2 :])
        if producer(repeated.outputs[0], "Expand") is None or not _expands_to(
            view, repeated, before, axis, heads // groups
        ):
            return found
    rest = (*before[:axis], *before[axis + 2 :])
    if five != (*before[: axis + 1], heads // groups, *before[axis + 2 :]) or rest != (
        *after[:axis],
        *after[axis + 1 :],
    ):
        return found
    source = opened.inputs[0]
    if view.shape(source) == (*before[: axis + 1], *before[axis + 2 :]) and source is not None:
        return replace(found, value=source, heads=groups, nodes=found.nodes | {joined, repeated, opened})
    # the reshape before did more: it stays, and a reshape drops the axis of one
    return replace(found, value=repeated.inputs[0], heads=groups, nodes=found.nodes | {joined, repeated})


def _expands_to(view: View, node: ir.Node, before: tuple[Size, ...], axis: int, times: int) -> bool:
    target = view.facts.content(node.inputs[1])
    if target is None or len(target) != len(before):
        return False
    return all(
        want == times if place == axis + 1 else want == have or (isinstance(want, int) and want == 1)
        for place, (want, have) in enumerate(zip(target, before, strict=True))
    )


def _mask_rows(view: View, mask: ir.Value | None, q: _Heads, k: _Heads) -> bool | None:
    """Whether a mask is one row for all positions of q; None where it does not fit."""
    if mask is None:
        return False
    shape = view.shape(mask)
    batch, rows = q.shape(view)
    columns = k.shape(view)[1]
    if shape is None or not 2 <= len(shape) <= 4 or not is_float(mask) or shape[-1] != columns:
        return None
    lead = (1,) * (4 - len(shape)) + shape[:-2]
    if lead[0] not in (1, batch) or lead[1] not in (1, q.heads):
        return None
    return False if shape[-2] == rows else True if shape[-2] == 1 else None


def _is_told(mask: ir.Value) -> bool:
    """Whether a mask depends on what callers feed, not only on sizes: then it may leave nothing of a row."""
    waiting, seen = [mask], {mask}
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                return True
        elif not g.is_onnx(node, "Shape", "Size"):
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            waiting += fresh
    return False


@dataclass(frozen=True)
class _Attention:
    """All that the operator needs."""

    view: View
    q: _Heads
    k: _Heads
    v: _Heads
    scores: _Scores
    one_row: bool
    rows_first: bool

    def build(self, writer: Writer) -> ir.Value:
        attributes: dict[str, float | int] = {"scale": self.scores.scale}
        if self.rows_first:
            attributes |= {"q_num_heads": self.q.heads, "kv_num_heads": self.k.heads}
            operands = [
                writer.reshaped(each.value, [0, 0, each.heads * each.size]) for each in (self.q, self.k, self.v)
            ]
        else:
            operands = [self._heads_first(writer, each) for each in (self.q, self.k, self.v)]
        mask = self._mask(writer)
        done = writer.node("Attention", [*operands, *([] if mask is None else [mask])], attributes)
        return writer.reshaped(done, [0, 0, self.q.heads, self.v.size]) if self.rows_first else done

    def _heads_first(self, writer: Writer, each: _Heads) -> ir.Value:
        value = each.value
        shape = self.view.shape(value)
        if shape is not None and len(shape) == 5:  # an axis of one was left behind the groups
            value = writer.reshaped(
                value, [0, 0, each.heads, each.size] if each.rows_first else [0, each.heads, -1, each.size]
            )
        return writer.node("Transpose", [value], {"perm": _SWAP}) if each.rows_first else value

    def _mask(self, writer: Writer) -> ir.Value | None:
        mask, shared = self.scores.mask, self.view.shared
        if mask is not None and _is_told(mask):
            key = ("finite", mask)
            if key not in shared:
                shared[key] = writer.node("Max", [mask, writer.constant("lowest", np.array(LOWEST, np.float32))])
            mask = shared[key]
        if mask is None or not self.one_row:
            return mask
        rows = self.q.shape(self.view)[1]
        key = ("rows", mask, rows)
        if key not in shared:
            shared[key] = writer.node("Expand", [mask, self._rows_target(writer, rows)])
        return shared[key]

    def _rows_target(self, writer: Writer, rows: Size) -> ir.Value:
        """The shape (S of q, 1)."""
        if isinstance(rows, int):
            return writer.constant("target", np.array([rows, 1], np.int64))
        count = dimension(self.view, writer, self.q.value, 1 if self.q.rows_first else 2)
        return writer.node("Concat", [count, writer.constant("one", np.array([1], np.int64))], {"axis": 0})
