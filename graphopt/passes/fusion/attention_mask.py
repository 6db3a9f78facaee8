"""What is added to the scores of attention, in the form that the operator Attention wants.

A row that is masked throughout by -inf is zero in the operator (ONNX 1.23 says so of every version of it), and NaN in
a softmax that nothing guards. One that is masked by a large number is the mean of all values, in both; but ONNX
Runtime's operator gives zeros where the mask is the lowest float32, as exporters write it. So that number is raised
above it a little, and -inf is left alone where a guard makes zeros of such rows.

Cases, of a mask that depends on what callers feed:

1. Where(condition, c1, c2), reshaped or repeated or not: nothing is done if the constants hold no such number.
2. Where(condition, c1, c2): the constants are raised.
3. What may hold -inf, with a guard: Where(Equal(mask, lowest), raised, mask).
4. Else: Max(mask, raised).

A mask that depends on sizes alone is left as it is: it hides no whole row.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import View, Writer, is_float, producer
from graphopt.passes.fusion.rotary_embedding import dimension
from graphopt.shapes.dimensions import Size

LOWEST = np.float32(np.finfo(np.float32).min)
RAISED = np.float32(-3e38)


def mask_rows(view: View, mask: ir.Value | None, whole: tuple[Size, Size, Size, Size]) -> bool | None:
    """Whether a mask is one row for all positions of q; None where it does not fit `whole`, the scores' (B, H, M, N).

    The operator would broadcast a mask of one row, but ONNX Runtime's does not.
    """
    if mask is None:
        return False
    batch, heads, rows, columns = whole
    shape = view.shape(mask)
    if shape is None or not 2 <= len(shape) <= 4 or not is_float(mask) or shape[-1] != columns:
        return None
    lead = (1,) * (4 - len(shape)) + shape[:-2]
    if lead[0] not in (1, batch) or lead[1] not in (1, heads):
        return None
    return False if shape[-2] == rows else True if shape[-2] == 1 else None


def prepared(view: View, writer: Writer, mask: ir.Value, guarded: bool) -> ir.Value:
    """The mask, float32, as the operator may read it; made once for all that read it. `guarded`: a row of -inf is zero
    in the original, not NaN."""
    if not _is_told(mask):
        return mask
    chosen = g.chosen_constants(mask)
    if chosen is not None and all((_raised(each) == each).all() for each in chosen):
        return mask
    endless = chosen is None or any(np.isneginf(each).any() for each in chosen)
    key = ("raised", mask, guarded and endless)
    if key not in view.shared:
        view.shared[key] = _rewritten(writer, mask, guarded and endless)
    return view.shared[key]


def _rewritten(writer: Writer, mask: ir.Value, keeps_endless: bool) -> ir.Value:
    node = producer(mask, "Where")
    branches = [] if node is None else [g.constant_of(v) for v in node.inputs[1:]]
    if node is not None and all(each is not None for each in branches):
        raised = [writer.constant("branch", _raised(each)) for each in branches if each is not None]
        made = writer.node("Where", [node.inputs[0], *raised])
        made.type = ir.TensorType(ir.DataType.FLOAT)
        return made
    number = writer.constant("raised", np.array(RAISED))
    if not keeps_endless:
        return writer.node("Max", [mask, number])
    found = writer.node("Equal", [mask, writer.constant("lowest", np.array(LOWEST))])
    found.type = ir.TensorType(ir.DataType.BOOL)
    made = writer.node("Where", [found, number, mask])
    made.type = ir.TensorType(ir.DataType.FLOAT)
    return made


def _raised(array: np.ndarray) -> np.ndarray:
    """Numbers below RAISED, but for -inf, as RAISED."""
    return np.where(np.isfinite(array), np.maximum(array, RAISED), array)


def expanded(view: View, writer: Writer, mask: ir.Value, q: ir.Value, axis: int) -> ir.Value:
    """A mask of one row, repeated for all positions of q, which are its axis `axis`; once for the whole model."""
    shape = view.shape(q)
    assert shape is not None
    key = ("rows", mask, shape[axis])
    if key not in view.shared:
        view.shared[key] = writer.node("Expand", [mask, _target(view, writer, q, axis, shape[axis])])
    return view.shared[key]


def _target(view: View, writer: Writer, q: ir.Value, axis: int, rows: Size) -> ir.Value:
    """The shape (S of q, 1)."""
    if isinstance(rows, int):
        return writer.constant("target", np.array([rows, 1], np.int64))
    count = dimension(view, writer, q, axis)
    return writer.node("Concat", [count, writer.constant("one", np.array([1], np.int64))], {"axis": 0})


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
