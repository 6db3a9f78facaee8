"""Where ONNX Runtime computes something else than the ONNX standard says: found by ONNX's own backend tests.

A model that came from ONNX Runtime's world wants these results, so `optimize` does not mind them. `graphopt.backend`
promises the standard, and refuses such a node by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import attribute, constant_of, input_of

Operand = Callable[[int], "np.ndarray | None"]
"""The node's operand by number, where its value is known."""


def _attention(node: ir.Node, operand: Operand) -> str | None:
    if (
        len(node.outputs) > 3
        and attribute(node, "is_causal", 0)
        and input_of(node, 3) is not None
        and attribute(node, "qk_matmul_output_mode", 0) > 0
    ):
        return "its product of queries and keys lacks the causal mask"
    return None


def _dropout(node: ir.Node, operand: Operand) -> str | None:
    training, ratio = operand(2), operand(1)
    if training is not None and bool(training) and (ratio is None or float(ratio) != 0):
        return "which elements training drops is not defined by the standard"
    return None


def _max_unpool(node: ir.Node, operand: Operand) -> str | None:
    if input_of(node, 2) is not None:
        return "it places elements by output_shape, the standard by the shape that was pooled"
    return None


def _resize(node: ir.Node, operand: Operand) -> str | None:
    data, scales = input_of(node, 0), operand(2)
    if attribute(node, "coordinate_transformation_mode", "half_pixel") != "align_corners" or scales is None:
        return None
    shape = operand(0).shape if operand(0) is not None else None  # pyright: ignore[reportOptionalMemberAccess]
    if shape is None and data is not None and data.shape is not None and data.shape.is_static():
        shape = data.shape.numpy()
    axes = attribute(node, "axes", None)
    sizes = None if shape is None else [shape[a] for a in (range(len(shape)) if axes is None else axes)]
    if not scales.size or sizes is None or len(sizes) != scales.size:
        return None
    resized = np.asarray(sizes) * scales
    if np.any(np.abs(resized - np.rint(resized)) > 1e-4):
        return "with align_corners it aligns the rounded size, the standard the size before rounding"
    return None


_RULES: Mapping[str, Callable[[ir.Node, Operand], str | None]] = {
    "Attention": _attention,
    "Dropout": _dropout,
    "MaxUnpool": _max_unpool,
    "Resize": _resize,
}


_FOLLOWED = frozenset({"Resize"})
"""Operators that compiled code computes as ONNX Runtime does."""


class Differences:
    """The nodes of a model that may be computed otherwise than the standard says; `compiled`: by compiled code."""

    def __init__(self, model: ir.Model, compiled: bool = False):
        watched = _FOLLOWED if compiled else _RULES
        self._nodes = [node for node in model.graph if node.domain in ("", "ai.onnx") and node.op_type in watched]

    def check(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Raises UnsupportedOperatorError naming the first node that is, for these inputs."""
        for node in self._nodes:

            def operand(index: int, node: ir.Node = node) -> np.ndarray | None:
                value = input_of(node, index)
                if value is None:
                    return None
                return feeds[str(value.name)] if value.name in feeds else constant_of(value)

            reason = _RULES[node.op_type](node, operand)
            if reason is not None:
                raise UnsupportedOperatorError(
                    f"ONNX Runtime's {node.op_type} is not that of the standard here: {reason}",
                    node=node.name or str(node.outputs[0].name),
                )
