"""Computing a node whose operands are all known: shape arithmetic, quantized weights, folded initializers.

QuantizeLinear and DequantizeLinear are computed here (ONNX's reference implementation has them for opset 19 and later
only); every other operator by the reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

FOLD_LIMIT = 1 << 24
"""Elements: a constant larger than this is computed at run time rather than stored."""

_GROWING = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "OneHot", "EyeLike"})
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32")


def fold(node: onnx.NodeProto, operands: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """The node's outputs, or None where it is not to be computed or cannot be."""
    if node.op_type in _RANDOM or (node.op_type in _GROWING and _grows(operands)):
        return None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        found = _requantized(node.op_type, operands, attributes)
        return None if found is None else [found]
    named = {name: array for name, array in zip(node.input, operands, strict=True) if array is not None}
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in named.items()
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "fold", infos, outputs)
    try:
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, named)]
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, KeyError, AttributeError):
        return None  # the reference implementation lacks it or refuses it: leave it to the compiler


def _grows(operands: Sequence[np.ndarray | None]) -> bool:
    return any(a is not None and a.dtype == np.int64 and float(np.prod(a.astype(float))) > FOLD_LIMIT for a in operands)


def _requantized(
    op_type: str, operands: Sequence[np.ndarray | None], attributes: Mapping[str, Any]
) -> np.ndarray | None:
    data, scale = operands[0], operands[1]
    zero = operands[2] if len(operands) > 2 else None
    assert data is not None and scale is not None
    if scale.dtype != np.float32:
        return None
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))

    def spread(array: np.ndarray) -> np.ndarray:
        if not block:
            return _along(array, data.ndim, axis)
        return np.take(np.repeat(array, block, axis), range(data.shape[axis]), axis)

    factor = spread(scale)
    if op_type == "DequantizeLinear":
        if str(data.dtype) not in (*_INTEGERS, "int4", "uint4"):
            return None
        offset = 0 if zero is None else spread(zero.astype(np.int32))
        return ((data.astype(np.int32) - offset).astype(np.float32) * factor).astype(np.float32)
    kind = np.dtype(np.uint8) if zero is None else zero.dtype
    if str(kind) not in _INTEGERS or data.dtype != np.float32:
        return None
    offset = 0 if zero is None else spread(zero.astype(np.float32))
    info = np.iinfo(kind)
    return np.clip(np.rint(data / factor) + offset, info.min, info.max).astype(kind)


def _along(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A scalar as it is; a vector shaped to broadcast along `axis`."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis] = array.size
    return array.reshape(shape)
