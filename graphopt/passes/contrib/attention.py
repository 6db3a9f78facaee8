"""Attention and MultiHeadAttention, without caches: written out, as exporters do."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.contrib.writing import Site, Unknown, Unwritable


def attention(site: Site) -> list[ir.Value | None]:
    """One product makes queries, keys and values of the input."""
    x, weights, bias, mask = site.needed(0), site.needed(1), site.input(2), site.input(3)
    if site.input(4) is not None or site.input(6) is not None or site.wants(1):
        raise Unwritable("it has a cache")
    if g.attribute(site.node, "do_rotary", 0):
        raise Unwritable("it turns queries and keys by their position")
    width = weights.shape[-1] if weights.shape is not None else None
    if not isinstance(width, int):
        raise Unknown("the shape of its weights is not known")
    sizes = list(g.attribute(site.node, "qkv_hidden_sizes", ())) or [width // 3] * 3
    whole = site.call("MatMul", x, weights)
    if bias is not None:
        whole = site.call("Add", whole, bias)
    added = [each for each in (_mask(site, mask), site.input(5)) if each is not None]
    return [_attended(site, site.split(whole, sizes), sizes[0], added, x)]


def multi_head(site: Site) -> list[ir.Value | None]:
    """Queries, keys and values are given, (B, S, heads * size) each; `bias` is for all three, one behind the other."""
    if any(site.input(i) is not None for i in range(6, len(site.node.inputs))) or site.wants(1) or site.wants(2):
        raise Unwritable("it has a cache")
    key, value, bias = site.input(1), site.input(2), site.input(3)
    if key is None or value is None or site.rank(key) != 3 or site.rank(value) != 3:
        raise Unwritable("its queries, keys and values come packed")
    operands = [site.needed(0), key, value]
    widths = [v.shape[-1] if v.shape is not None else None for v in operands]
    sizes = [int(width) for width in widths if isinstance(width, int)]
    if len(sizes) < len(operands):
        raise Unknown("the sizes of its heads are not known")
    if bias is not None:
        parts = site.split(bias, sizes)
        operands = [site.call("Add", v, part) for v, part in zip(operands, parts, strict=True)]
    added = [each for each in (_mask(site, site.input(4)), site.input(5)) if each is not None]
    return [_attended(site, operands, sizes[0], added, operands[0])]


def _attended(site: Site, operands: list[ir.Value], width: int, added: list[ir.Value], like: ir.Value) -> ir.Value:
    """softmax(q k^T * scale + what is added) v, over heads; `width`: of all queries together; `like`: (B, S, ..), for
    the size of a causal mask."""
    heads = int(g.attribute(site.node, "num_heads", 0))
    if heads < 1:
        raise Unwritable("it does not say how many heads it has")
    queries, keys, values = (
        site.call("Transpose", site.writer.reshaped(v, [0, 0, heads, -1]), perm=perm)
        for v, perm in zip(operands, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    for value, operand in zip((queries, keys, values), operands, strict=True):
        value.type = operand.type
    scale = float(g.attribute(site.node, "scale", 0.0)) or 1 / math.sqrt(width / heads)
    scores = site.call("Mul", site.call("MatMul", queries, keys), scale)
    if g.attribute(site.node, "unidirectional", 0):
        added = [*added, _causal(site, like)]
    for each in added:
        scores = site.call("Add", scores, each)
    weights = site.call("Softmax", scores, axis=-1)
    context = site.call("Transpose", site.call("MatMul", weights, values), perm=[0, 2, 1, 3])
    return site.writer.reshaped(context, [0, 0, -1])


def _mask(site: Site, mask: ir.Value | None) -> ir.Value | None:
    """What is added to scores: 0 where a mask is 1, else `mask_filter_value`."""
    if mask is None:
        return None
    rank = site.rank(mask)
    if rank not in (2, 3):
        raise Unwritable("its mask says how long rows are, or has four axes")
    told = site.cast(mask, ir.DataType.FLOAT)
    hidden = site.call("Mul", site.call("Sub", 1.0, told), _hidden(site))
    return site.unsqueezed(hidden, [1, 2] if rank == 2 else [1])


def _hidden(site: Site) -> float:
    return float(g.attribute(site.node, "mask_filter_value", -10000.0))


def _causal(site: Site, like: ir.Value) -> ir.Value:
    """0 where a key is no later than the query, else a number that hides it: (S, S)."""
    shape = site.call("Shape", like)
    shape.type = ir.TensorType(ir.DataType.INT64)
    count = site.call("Gather", shape, np.array(1, np.int64))
    steps = site.call("Range", np.array(0, np.int64), count, np.array(1, np.int64))
    later = site.call("Greater", site.unsqueezed(steps, [0]), site.unsqueezed(steps, [1]))
    later.type = ir.TensorType(ir.DataType.BOOL)
    low = np.array(np.finfo(np.float32).min, np.float32)
    made = site.call("Where", later, low, np.array(0, np.float32))
    made.type = ir.TensorType(ir.DataType.FLOAT)
    return made
