"""Inputs of a model that decide shapes or steer an operator, which a compiled model has to know when it is compiled.

ONNX gives `Reshape` its shape and `ReduceSum` its axes as operands, and some models take these as inputs. Code with
static shapes holds for one value of them, as it holds for one shape of the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

STEERING: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split", "TopK", "Trilu", "CumSum",
         "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare", "AffineGrid", "CenterCropPad", "Upsample", "CumProd"),
        (1,),
    ),
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow", "If"), (0,)),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 2, 3),
    "Resize": (1, 2, 3),
    "Range": (0, 1, 2),
    "Dropout": (1, 2),
    "OneHot": (1,),
    "DFT": (1, 2),
    "STFT": (1, 3),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "MaxUnpool": (2,),
    "Col2Im": (1, 2),
    "Loop": (0, 1),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), (4,)),
}  # fmt: skip
"""Operands, by operator, that are usually constants and that code is made for: shapes, axes, bounds, conditions."""
MOST_ELEMENTS = 64
"""Of an input that steers."""


def steering_inputs(model: ir.Model) -> tuple[str, ...]:
    """Names of the small inputs that such an operand of the main graph is, or is computed from; in order."""
    pending = [
        node.inputs[index]
        for node in model.graph
        if node.domain in ("", "ai.onnx")
        for index in STEERING.get(node.op_type, ())
        if index < len(node.inputs)
    ]
    found: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value is None or value in found:
            continue
        found.add(value)
        producer = value.producer()
        if producer is not None and producer.op_type not in ("Shape", "Size"):
            pending.extend(producer.inputs)
    return tuple(str(v.name) for v in model.graph.inputs if v in found and not v.is_initializer() and _is_small(v))


def _is_small(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and shape.is_static() and int(np.prod(shape.numpy(), dtype=np.int64)) <= MOST_ELEMENTS


def with_constants(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy whose named inputs are constants instead."""
    fixed = model.clone()
    for value in [v for v in fixed.graph.inputs if v.name in arrays]:
        fixed.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[str(value.name)], name=value.name)
        fixed.graph.register_initializer(value)
    return fixed
