"""Scaled dot-product attention over heads.

    MatMul(Softmax(MatMul(q, k^T) * s + mask), v)  =  Attention(q, k, v, mask, scale=s)

q, k and v are (B, H, S, D), or (B, S, H, D) transposed, k also as matrices (B*H, S, D); the scale a constant factor or
divisor of the scores, of q, of k or of both, or none; the mask any value added to the scores. Where all three come as
(B, S, H, D), and the result goes on as (B, S, H, D), the operator takes them as (B, S, H*D) and no transposition is
left. Heads of k and v that were repeated for groups of heads of q (by Tile or Expand of a new axis behind the heads,
both alike) are not repeated any more. What PyTorch puts behind the softmax of its scaled dot-product attention, zeros
where it is NaN, goes: the operator makes zeros of a row that -inf masks throughout (`attention_mask.py`).

Conditions: float32; H and D known; the shape of the mask proven to be (.., S of q, S of k), or (.., 1, S of k), which
is repeated for all rows, once for the whole model; softmax over the last axis. Differences accepted: a row that -inf
masks throughout is finite, where an original without a guard gives NaN; and a NaN in q or k stays one, where a guard
makes zeros of it.
Reference: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2.1; Ainslie et al., GQA, EMNLP 2023.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.attention_mask import expanded, mask_rows, prepared
from graphopt.passes.fusion.pattern import Fusion, View, Writer, is_float, producer, reader, scalar
from graphopt.shapes.dimensions import Size

ANCHORS = ("Softmax",)
OPSET = 23
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
    guard = _guard(node.outputs[0])
    weights = node.outputs[0] if not guard else guard[-1].outputs[0]
    times = reader(weights, "MatMul")
    if times is None or times.inputs[0] is not weights or not is_float(node.outputs[0]):
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
    (batch, rows), (_, columns) = q.shape(view), k.shape(view)
    one_row = mask_rows(view, scores.mask, (batch, q.heads, rows, columns))
    if one_row is None:
        return None
    top, nodes = times, {node, times, *guard, *scores.nodes, *q.nodes, *k.nodes, *v.nodes}
    back = reader(times.outputs[0], "Transpose")
    rows_first = all(each.rows_first for each in (q, k, v))
    if back is not None and tuple(g.attribute(back, "perm", ())) == _SWAP and rows_first:
        top = back
        nodes.add(back)
    else:
        rows_first = False
    found = _Attention(view, q, k, v, scores, one_row, rows_first, bool(guard))
    return Fusion(top, frozenset(nodes), OPSET, found.build)


def _guard(weights: ir.Value) -> list[ir.Node]:
    """IsNaN and Where that make zeros of NaN in a softmax's result; empty where it is read as it is."""
    readers = {usage.node for usage in weights.uses()}
    chosen = next((n for n in readers if g.is_onnx(n, "Where") and n.inputs[2] is weights), None)
    found = None if chosen is None else producer(chosen.inputs[0], "IsNaN")
    if chosen is None or found is None or found.inputs[0] is not weights or scalar(chosen.inputs[1]) != 0:
        return []
    zero = g.constant_of(chosen.inputs[1])
    return [found, chosen] if zero is not None and zero.ndim <= 4 and readers == {found, chosen} else []


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
    batched = _transposed_in_batches(view, value)
    if batched is not None:
        return batched
    moved = producer(value, "Transpose")
    perm = tuple(g.attribute(moved, "perm", ())) if moved is not None else ()
    if moved is None or perm not in ((0, 1, 3, 2), (0, 2, 3, 1)):
        return None
    if perm == (0, 2, 3, 1):
        return _heads(view, moved.inputs[0], True, frozenset([moved]))
    inner = _plain(view, moved.inputs[0])
    return None if inner is None else replace(inner, nodes=inner.nodes | {moved})


def _transposed_in_batches(view: View, value: ir.Value | None) -> _Heads | None:
    """k as matrices (B * H, S, D) that are transposed: Reshape, Transpose, Reshape."""
    after = producer(value, "Reshape")
    moved = producer(after.inputs[0], "Transpose") if after is not None else None
    before = producer(moved.inputs[0], "Reshape") if moved is not None else None
    if after is None or moved is None or before is None or tuple(g.attribute(moved, "perm", ())) != (0, 2, 1):
        return None
    shapes = [view.shape(v) for v in (before.inputs[0], before.outputs[0], value)]
    if any(shape is None for shape in shapes):
        return None
    given, matrices, turned = (shape for shape in shapes if shape is not None)
    if len(given) != 4 or matrices[1:] != given[2:] or turned != (*given[:2], given[3], given[2]):
        return None
    inner = _plain(view, before.inputs[0])
    return None if inner is None else replace(inner, nodes=inner.nodes | {after, moved, before})


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
    guarded: bool

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
        if self.scores.mask is None:
            return None
        mask = prepared(self.view, writer, self.scores.mask, self.guarded)
        return expanded(self.view, writer, mask, self.q.value, 1 if self.q.rows_first else 2) if self.one_row else mask
