"""Attention as one kernel: scores, mask, softmax and the weighted values of a head stay in the first-level cache.

`in_rows` makes of an Attention between Reshapes and Transposes, which split rows into heads and join them again, one
operator on rows, `RowAttention`: its heads are ranges of the columns of (B, M, H * D). Products of bytes leave rows in
blocks; the kernel reads these, and leaves its own rows in blocks for the product behind it.

Source: Dao et al., FlashAttention, NeurIPS 2022, section 3.1 (scores that never reach memory).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.shapes.onnx_inference import infer_shapes
from graphopt.targets.relax.elementwise import share_of
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.form import Form
from graphopt.targets.relax.rows import Rows, rows_of
from graphopt.targets.relax.values import FUSABLE_ROOT, Builder, Value

OPERATOR = "RowAttention"
"""q (B, M, C), k (B, N, C), v (B, N, C) and a mask that broadcasts to (B, H, M, N) or none -> (B, M, H * E); attributes
`heads` and `scale`, `size` D and `width` E, and `offsets`, the first columns of q, k and v. The importer's own: no ONNX
operator."""
FEWEST_LANES = 8
GEOMETRY, OFFSETS = "graphopt.attention", "graphopt.offsets"
"""Annotations of the last block: B, H, M, N, D, E; and the first columns of q, k and v."""
LEAST = 1e-30
"""Shares of a row add up to 1 at least before they are divided by their sum; to 0 where -inf masks it throughout, and
the row is 0 then."""
_SPLIT = [0, 2, 1, 3]


def applies(form: Form) -> bool:
    """Whether kernels of this form exist: float32 in vectors of enough lanes."""
    return form.precision == "float32" and form.lanes >= FEWEST_LANES


def in_rows(model: ir.Model, form: Form) -> None:
    """Make RowAttention of every Attention that has the form for it, in place. Input shapes must be static."""
    infer_shapes(model)
    for node in list(model.graph):
        if g.is_onnx(node, "Attention"):
            _rewrite(model, node, form.lanes)


def _rewrite(model: ir.Model, node: ir.Node, lanes: int) -> None:
    """Cases: 1. four axes, between Transposes and Reshapes; 2. three axes, which are rows already."""
    mask = _unexpanded(g.input_of(node, 3))
    operands = [g.input_of(node, i) for i in range(3)]
    if len(node.inputs) > 4 or len(node.outputs) != 1 or not _is_plain(node):
        return
    if any(v is None or v.dtype != ir.DataType.FLOAT for v in operands):
        return
    shapes = [g.static_shape(v) for v in operands]
    if shapes[0] is not None and len(shapes[0]) == 4:
        sources = [_source(v) for v in operands if v is not None]
        joined = _joined(node.outputs[0])
        heads, groups = shapes[0][1], (shapes[1] or (0, 0))[1]
    else:
        sources = [_unreshaped(v) for v in operands if v is not None]
        joined = _reshaped_back(node.outputs[0])
        heads, groups = (g.attribute(node, f"{side}_num_heads", 0) for side in ("q", "kv"))
    if any(v is None for v in sources) or joined is None or heads != groups or not heads:
        return
    q, k, v = (g.static_shape(value) for value in sources)
    if q is None or k is None or v is None or not q[0] == k[0] == v[0] or q[2] != k[2]:
        return
    size, width = q[2] // heads, v[2] // heads
    if size % lanes or width % lanes or 0 in (*q, *k, *v) or (mask is not None and not _fits(mask, q, k, heads)):
        return
    scale = g.attribute(node, "scale", 0.0) or 1 / math.sqrt(size)
    last = joined.producer()
    assert last is not None
    merged, offsets = _merged(model, last, [v for v in sources if v is not None]), (0, 0, 0)
    if merged is not None:
        sources, offsets = [merged] * 3, (0, q[2], q[2] + k[2])
    attributes = [
        ir.AttrInt64("heads", heads), ir.AttrInt64("size", size), ir.AttrInt64("width", width),
        ir.AttrInt64s("offsets", offsets), ir.AttrFloat32("scale", scale),
    ]  # fmt: skip
    inputs = [*sources, *([] if mask is None else [mask])]
    made = ir.Node("", OPERATOR, inputs, attributes, num_outputs=1, name=node.name)
    result = made.outputs[0]
    result.name, result.type, result.shape = joined.name, joined.type, joined.shape
    joined.name = None
    model.graph.insert_before(last, made)
    joined.replace_all_uses_with(result, replace_graph_outputs=True)
    _remove_unread(model, last)


def _merged(model: ir.Model, before: ir.Node, parts: list[ir.Value]) -> ir.Value | None:
    """The columns of several products of the same rows as those of one, made before a node; None where they are not
    such, or others read them too."""
    products = [_Product.of(value) for value in parts]
    found = [product for product in products if product is not None]
    if len(found) < len(parts) or len(set(parts)) < len(parts) or any(p.data is not found[0].data for p in found):
        return None
    if len({(p.scale is None, p.bias is None, str(p.weight.dtype)) for p in found}) > 1:
        return None

    def constant(name: str, arrays: list[np.ndarray], axis: int) -> ir.Value:
        return g.add_initializer(model.graph, f"{parts[0].name}_{name}", np.concatenate(arrays, axis))

    first, nodes = found[0], []

    def add(op_type: str, inputs: list[ir.Value], name: str | None = None, **attributes) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, name=name or f"{parts[0].name}/{op_type}")
        made.outputs[0].name = g.fresh_name(model.graph, f"{parts[0].name}_{op_type}")
        nodes.append(made)
        return made.outputs[0]

    weight = constant("weights", [p.weight for p in found], 1)
    if first.scale is not None:
        scale = constant("scales", [p.scale for p in found if p.scale is not None], 0)
        zero = constant("zero_points", [p.zero for p in found if p.zero is not None], 0)
        weight = add("DequantizeLinear", [weight, scale, zero], axis=1)
    result = add("MatMul", [first.data, weight], g.label(first.node))  # a kernel's time is found by this name
    if first.bias is not None:
        result = add("Add", [result, constant("biases", [p.bias for p in found if p.bias is not None], 0)])
    model.graph.insert_before(before, nodes)
    return result


@dataclass(frozen=True)
class _Product:
    """Rows times a constant matrix, stored as float32 or as integers, and a bias."""

    node: ir.Node
    data: ir.Value
    weight: np.ndarray
    scale: np.ndarray | None
    """Of integers: one a column."""
    zero: np.ndarray | None
    bias: np.ndarray | None

    @classmethod
    def of(cls, value: ir.Value) -> _Product | None:
        """None where `value` is something else, or has other readers than the one it is asked for."""
        node, bias = value.producer(), None
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if g.is_onnx(node, "Add"):
            sides = [_known(v) for v in node.inputs]
            index = next((i for i, side in enumerate(sides) if side is not None), None)
            inner = None if index is None else node.inputs[1 - index]
            if index is None or inner is None or len(inner.uses()) != 1 or inner.is_graph_output():
                return None
            bias, node = sides[index], inner.producer()
        if node is None or not g.is_onnx(node, "MatMul") or node.inputs[0] is None or node.inputs[1] is None:
            return None
        weight, scale, zero = _stored_integers(node.inputs[1])
        if weight is None:
            weight = g.constant_of(node.inputs[1])
        if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[1:]):
            return None
        return cls(node, node.inputs[0], weight, scale, zero, bias)


def _stored_integers(value: ir.Value) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Integers, scales and zero points, one of each a column, of a dequantized constant matrix; else None."""
    maker = value.producer()
    if maker is None or not g.is_onnx(maker, "DequantizeLinear") or g.attribute(maker, "block_size", 0):
        return None, None, None
    integers, scale, zero = (g.constant_of(g.input_of(maker, i)) for i in range(3))
    if integers is None or scale is None or integers.ndim != 2 or scale.dtype != np.float32:
        return None, None, None
    zero = np.zeros(1, integers.dtype) if zero is None else zero
    columns = integers.shape[1:]
    if max(scale.size, zero.size) > 1 and g.attribute(maker, "axis", 1) % 2 != 1:
        return None, None, None
    return integers, np.broadcast_to(scale.reshape(-1), columns), np.broadcast_to(zero.reshape(-1), columns)


def _known(value: ir.Value | None) -> np.ndarray | None:
    """A constant, or a dequantized one, as float32."""
    found = g.constant_of(value)
    maker = None if value is None else value.producer()
    if found is not None or maker is None or not g.is_onnx(maker, "DequantizeLinear"):
        return found
    integers, scale, zero = (g.constant_of(g.input_of(maker, i)) for i in range(3))
    if integers is None or scale is None or integers.ndim != 1 or g.attribute(maker, "block_size", 0):
        return None
    return (integers.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))).astype(np.float32) * scale


def _is_plain(node: ir.Node) -> bool:
    if any(g.attribute(node, name, 0) for name in ("softcap", "softmax_precision", "qk_matmul_output_mode")):
        return False
    windowed = any(g.attribute(node, f"{side}_window_size", -1) != -1 for side in ("left", "right"))
    return not windowed and not g.attribute(node, "is_causal", 0)


def _unexpanded(mask: ir.Value | None) -> ir.Value | None:
    """What an Expand makes a mask from: the kernel broadcasts by itself."""
    maker = None if mask is None else mask.producer()
    return maker.inputs[0] if maker is not None and g.is_onnx(maker, "Expand") else mask


def _unreshaped(value: ir.Value) -> ir.Value:
    """What a chain of Reshapes makes the value from, where that has the same shape."""
    shape, found, at = g.static_shape(value), value, value
    while (maker := at.producer()) is not None and g.is_onnx(maker, "Reshape") and maker.inputs[0] is not None:
        at = maker.inputs[0]
        if g.static_shape(at) == shape:
            found = at
    return found


def _reshaped_back(value: ir.Value) -> ir.Value:
    """What a chain of Reshapes makes of the value, where that has the same shape again."""
    shape, found, at = g.static_shape(value), value, value
    while (reader := g.sole_consumer(at)) is not None and g.is_onnx(reader, "Reshape"):
        at = reader.outputs[0]
        if g.static_shape(at) == shape:
            found = at
    return found


def _source(value: ir.Value) -> ir.Value | None:
    """The rows (B, M, H * D) that a value (B, H, M, D) is split from."""
    turn = value.producer()
    split = None if turn is None or turn.inputs[0] is None else turn.inputs[0].producer()
    if turn is None or split is None or not g.is_onnx(turn, "Transpose") or not g.is_onnx(split, "Reshape"):
        return None
    rows, shape = g.static_shape(split.inputs[0]), g.static_shape(value)
    if list(g.attribute(turn, "perm", ())) != _SPLIT or rows is None or shape is None or len(rows) != 3:
        return None
    batch, heads, count, size = shape
    return split.inputs[0] if rows == (batch, count, heads * size) else None


def _joined(value: ir.Value) -> ir.Value | None:
    """The rows (B, M, H * E) that a value (B, H, M, E) alone becomes."""
    turn = g.sole_consumer(value)
    join = None if turn is None else g.sole_consumer(turn.outputs[0])
    if turn is None or join is None or not g.is_onnx(turn, "Transpose") or not g.is_onnx(join, "Reshape"):
        return None
    rows, shape = g.static_shape(join.outputs[0]), g.static_shape(value)
    if list(g.attribute(turn, "perm", ())) != _SPLIT or rows is None or shape is None:
        return None
    batch, heads, count, size = shape
    return join.outputs[0] if rows == (batch, count, heads * size) else None


def _fits(mask: ir.Value, q: tuple[int, ...], k: tuple[int, ...], heads: int) -> bool:
    shape = g.static_shape(mask)
    if mask.dtype != ir.DataType.FLOAT or shape is None or len(shape) > 4:
        return False
    whole = (q[0], heads, q[1], k[1])
    return all(d in (1, w) for d, w in zip(shape[::-1], whole[::-1], strict=False))


def _remove_unread(model: ir.Model, node: ir.Node) -> None:
    """Remove a node, and what was only made for it. Whoever imports a view of rows takes them out of their blocks."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        before = [v.producer() for v in node.inputs if v is not None]
        model.graph.remove(node, safe=True)
        waiting += [n for n in before if n is not None]


@emits(OPERATOR)
def row_attention(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    mask = inputs[3] if len(inputs) > 3 else None
    rows = [value for value in inputs[:3] if value is not None and value.shape is not None]
    (batch, count), columns = (rows[0].shape or (1, 1))[:2], (rows[1].shape or (1, 1))[1]
    heads, size, width = (int(node.get(name, 1)) for name in ("heads", "size", "width"))
    different = list({id(value): value for value in rows}.values())
    operands = [_stored(builder, value) for value in different]
    if mask is not None:
        assert mask.shape is not None
        shape = (1,) * (4 - len(mask.shape)) + mask.shape
        operands.append(builder.plain(mask) if shape == mask.shape else builder.reshape(builder.plain(mask), shape))
    done = builder.call(
        attention_of_rows,
        *operands,
        places=tuple(next(i for i, v in enumerate(different) if v is value) for value in rows),
        offsets=tuple(int(n) for n in node.get("offsets", (0, 0, 0))),
        geometry=(batch, heads, count, columns, size, width),
        factor=float(node.get("scale", 1.0)),
        block=builder.block_for(heads * width),
        pattern=FUSABLE_ROOT,
        name="attention",
    )
    shape = (batch, count, heads * width)
    image = Value((1, shape[2], 1, batch * count), "float32", blocked=done, block=int(done.ty.shape[3]))
    return [rows_of(builder, image, shape)]


def _stored(builder: Builder, value: Value) -> Any:
    """Rows (B, M, C) as (1, C / b, B * M, b), the blocks in which they are, or one block."""
    assert value.shape is not None
    if isinstance(value, Rows) and value.in_blocks:
        return builder.blocked(value.image)
    batch, count, depth = value.shape
    return builder.reshape(builder.plain(value), (1, 1, batch * count, depth))


def attention_of_rows(
    *operands,
    places: tuple[int, ...],
    offsets: tuple[int, ...],
    geometry: tuple[int, ...],
    factor: float,
    block: int,
):
    """softmax(factor * q k^T + mask) v for each of H ranges of columns.

    operands: rows (1, C / b, B * M, b), each with a b of its own, then a mask (B or 1, H or 1, M or 1, N or 1) or none;
    places: which of them are q, k and v; offsets: the first columns of each; geometry: B, H, M, N, D, E
    -> (1, H * E / block, B * M, block) float32.
    """
    from tvm import te, tirx

    q, k, v = (operands[place] for place in places)
    mask = operands[max(places) + 1 :]
    batch, heads, rows, columns, size, width = geometry
    times = tirx.const(factor, "float32")

    def at(x, row, column):
        lanes = int(x.shape[3])
        return x[0, column // lanes, row, column % lanes]

    d, n, j, i = (te.reduce_axis((0, e), x) for e, x in ((size, "d"), (columns, "n"), (columns, "j"), (columns, "i")))
    whole = (batch, heads, rows, columns)
    scores: Any = te.compute(
        whole,
        lambda b, h, m, c: te.sum(
            (at(q, b * rows + m, offsets[0] + h * size + d) * times)
            * at(k, b * columns + c, offsets[1] + h * size + d),
            axis=d,
        ),
        name="attention_scores",
    )
    if mask:
        extents = [int(e) for e in mask[0].shape]

        def masked(*place):
            return scores[place] + mask[0][tuple(0 if e == 1 else p for e, p in zip(extents, place, strict=True))]

        scores = te.compute(whole, masked, name="attention_masked")
    top: Any = te.compute(whole[:3], lambda *p: te.max(scores[(*p, i)], axis=i), name="attention_max")
    total: Any = te.compute(
        whole[:3], lambda *p: te.sum(share_of(scores[(*p, j)] - top[p]), axis=j), name="attention_sum"
    )
    least = tirx.const(LEAST, "float32")
    shares: Any = te.compute(
        whole, lambda *p: share_of(scores[p] - top[p[:3]]) / tirx.max(total[p[:3]], least), name="attention_shares"
    )

    def cell(_one, c, p, lane):
        column = c * block + lane
        share = shares[p // rows, column // width, p % rows, n]
        return te.sum(share * at(v, p // rows * columns + n, offsets[2] + column), axis=n)

    return te.compute(
        (1, heads * width // block, batch * rows, block),
        cell,
        name="attention",
        attrs={GEOMETRY: list(geometry), OFFSETS: list(offsets)},
    )
