"""The rules of types and shapes, against the results that ONNX's own node tests state."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from graphopt.shapes.constants import lift_constants
from graphopt.shapes.inference import infer_facts
from graphopt.shapes.rules import RULES, RULES_OF_SEVERAL

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference code that makes the cases
_OPERATORS = sorted({*RULES, *RULES_OF_SEVERAL, "Shape", "Size"})


@functools.cache
def _cases() -> dict[str, list]:
    found: dict[str, list] = {}
    for case in collect_testcases(None):
        graph = case.model.graph if case.model is not None else onnx.GraphProto()
        if len(graph.node) == 1 and [v.name for v in graph.input] == [name for name in graph.node[0].input if name]:
            found.setdefault(graph.node[0].op_type, []).append(case)
    return found


@pytest.mark.parametrize("operator", _OPERATORS)
def test_a_rule_says_what_the_node_tests_do(operator, monkeypatch):
    """Whatever is told without ONNX's inference is right: with constant operands, and with operands that are fed."""
    monkeypatch.setattr("graphopt.shapes.inference.infer_shapes", lambda model: None)
    told = 0
    for case in _cases().get(operator, []):
        for inputs, outputs in case.data_sets:
            if not any(isinstance(each, list) or each is None for each in (*inputs, *outputs)):  # sequences, optionals
                fed, made = [*map(_array, inputs)], [*map(_array, outputs)]
                if not any(array.dtype.kind in "OU" for array in (*fed, *made)):  # text
                    told += _told(case.model, fed, made, constant=True)
                    _told(case.model, fed, made, constant=False)
    if operator not in _NOT_ANSWERED:
        assert told, "no node test of this operator was answered: is the rule one of those that never apply?"


_NOT_ANSWERED = frozenset(
    {
        "DequantizeLinear", "GlobalLpPool", "LayerNormalization",
    }
)  # fmt: skip


def _array(given) -> np.ndarray:
    return onnx.numpy_helper.to_array(given) if isinstance(given, onnx.TensorProto) else np.asarray(given)


_OF_CONTENTS = ("ConstantOfShape", "Range")
"""What these make depends on the contents of their first operand."""


def _told(proto: onnx.ModelProto, inputs: list, outputs: list, constant: bool) -> bool:
    """Compare what is known; whether all is."""
    model = ir.from_proto(proto)
    node = next(iter(model.graph))
    fed = [v for v in node.inputs if v is not None]
    for place, (value, array) in enumerate(zip(fed, inputs, strict=True)):
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        if constant and (place or node.op_type in _OF_CONTENTS) and array.dtype.kind in "iufb":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    for value in node.outputs:
        value.type = value.shape = None
    lift_constants(model)
    facts = infer_facts(model)
    complete = True
    for value, array in zip((v for v in node.outputs if v.name), outputs, strict=True):
        shape = facts.shape(value)
        complete = complete and shape is not None and all(isinstance(size, int) for size in shape)
        if shape is not None:
            assert len(shape) == array.ndim, (node.op_type, shape, array.shape)
            for size, actual in zip(shape, array.shape, strict=True):
                assert not isinstance(size, int) or size == actual, (node.op_type, shape, array.shape)
        if value.dtype is not None:
            assert value.dtype == ir.DataType.from_numpy(array.dtype)
        complete = complete and value.dtype is not None
    return complete
