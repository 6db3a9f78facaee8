"""Operators without a converter of TVM's: by ONNX's definition, by unrolling, or refused by name with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.errors import TargetError, UnsupportedOperatorError
from graphopt.targets.relax import recurrent
from tests.targets.oracle import TARGET, agree, compiled, model, node, sum_tolerance
from tests.targets.test_operators import CASES, uniform

FLOAT = TensorProto.FLOAT


def _recurrent(kind, steps, batch, width, hidden, direction="forward", bias=True, states=False, **attributes):
    directions, gates = (2 if direction == "bidirectional" else 1), recurrent._GATES[kind]
    x = uniform(1, steps, batch, width)
    constants = {
        "w": uniform(2, directions, gates * hidden, width),
        "r": uniform(3, directions, gates * hidden, hidden) / 2,
    }
    inputs = ["x", "w", "r", "b" if bias else "", "", "h" if states else ""]
    if bias:
        constants["b"] = uniform(4, directions, 2 * gates * hidden)
    feeds = {"x": x} | ({"h": uniform(5, directions, batch, hidden)} if states else {})
    if kind == "LSTM" and states:
        inputs.append("c")
        feeds["c"] = uniform(6, directions, batch, hidden)
    outputs = ["y", "yh"] + (["yc"] if kind == "LSTM" else [])
    while inputs[-1] == "":
        inputs.pop()
    made = model(
        [node(kind, inputs, outputs, hidden_size=hidden, direction=direction, **attributes)], feeds, outputs, constants
    )
    return made, feeds


@settings(CASES, max_examples=10)
@given(
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    steps=st.integers(1, 5),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    hidden=st.integers(1, 17),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    bias=st.booleans(),
    states=st.booleans(),
    after=st.booleans(),
)
def test_recurrent_operators_are_unrolled(kind, steps, batch, width, hidden, direction, bias, states, after):
    options = {"linear_before_reset": int(after)} if kind == "GRU" else {}
    made, feeds = _recurrent(kind, steps, batch, width, hidden, direction, bias, states, **options)
    agree(made, feeds, sum_tolerance((width + hidden) * steps))


def test_peepholes_clip_and_coupled_gates():
    """Against ONNX Runtime: the forms that few models have."""
    hidden, feeds = 5, {"x": uniform(1, 3, 2, 4)}
    constants = {"w": uniform(2, 1, 20, 4), "r": uniform(3, 1, 20, 5), "b": uniform(4, 1, 40), "p": uniform(5, 1, 15)}
    for options in ({}, {"clip": 0.5}, {"input_forget": 1}):
        made = model(
            [node("LSTM", ["x", "w", "r", "b", "", "", "", "p"], ["y"], hidden_size=hidden, **options)],
            feeds,
            ["y"],
            constants,
        )
        agree(made, feeds, sum_tolerance(60))


def test_long_sequences_are_refused_with_their_length():
    made, _ = _recurrent("GRU", recurrent.MOST_STEPS + 1, 1, 2, 2)
    with pytest.raises(TargetError, match=rf"GRU.*{recurrent.MOST_STEPS + 1} steps.*node 'GRU_y'"):
        TARGET.lower(made)


def test_other_activations_are_refused_by_name():
    made, _ = _recurrent("RNN", 2, 1, 2, 2, activations=["Softsign"])
    with pytest.raises(TargetError, match=r"RNN: activation Softsign"):
        TARGET.lower(made)


def test_attention_by_its_definition():
    feeds = {name: uniform(i, 1, 2, 5, 8) for i, name in enumerate("qkv")}
    made = model([node("Attention", list("qkv"), ["y"], is_causal=1)], feeds, ["y"], opset=23)
    agree(made, feeds, sum_tolerance(16))


def _branch(name: str, op_type: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(name, FLOAT, [2, 3])
    return helper.make_graph([helper.make_node(op_type, ["x"], [name])], name, [], [out])


@pytest.mark.parametrize("taken", [True, False])
def test_an_if_whose_condition_is_known(taken):
    """Both branches call their value `a`, and read the value around them."""
    x = uniform(1, 2, 3)
    branches: dict[str, Any] = {"then_branch": _branch("a", "Relu"), "else_branch": _branch("a", "Neg")}
    made = model([helper.make_node("If", ["c"], ["y"], **branches)], {"x": x}, ["y"], {"c": np.array(taken)})
    agree(made, {"x": x}, 0)


def test_an_if_whose_condition_is_data_is_refused():
    x = uniform(1, 2, 3)
    branches: dict[str, Any] = {"then_branch": _branch("a", "Relu"), "else_branch": _branch("b", "Neg")}
    made = model([helper.make_node("If", ["c"], ["y"], name="fork", **branches)], {"x": x, "c": np.array(True)}, ["y"])
    with pytest.raises(TargetError, match=r"If: its condition is known at run time only.*'fork'"):
        TARGET.lower(made)


def _loop_body() -> onnx.GraphProto:
    infos = {"i": (TensorProto.INT64, []), "on": (TensorProto.BOOL, []), "s": (FLOAT, [2, 3])}
    nodes = [
        helper.make_node("Identity", ["on"], ["still"]),
        helper.make_node("Add", ["s", "x"], ["next"]),
        helper.make_node("Relu", ["next"], ["row"]),
    ]
    outputs = [("still", TensorProto.BOOL, []), ("next", FLOAT, [2, 3]), ("row", FLOAT, [2, 3])]
    return helper.make_graph(
        nodes,
        "body",
        [helper.make_tensor_value_info(n, *k) for n, k in infos.items()],
        [helper.make_tensor_value_info(*o) for o in outputs],
    )


def _with_loop(known: bool) -> ir.Model:
    """Its number of turns is a constant, or an input."""
    turns = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "x"], ["last", "rows"], name="turns", body=_loop_body())],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [2, 3])] + ([] if known else [turns]),
        [helper.make_tensor_value_info("last", FLOAT, [2, 3]), helper.make_tensor_value_info("rows", FLOAT, [4, 2, 3])],
        [onnx.numpy_helper.from_array(np.array(4, np.int64), "n")] if known else [],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def test_a_loop_of_known_length():
    x = uniform(1, 2, 3)
    made = _with_loop(known=True)
    agree(made, {"x": x}, 16 * float(np.finfo(np.float32).eps))


def test_a_loop_whose_length_is_data_is_refused():
    with pytest.raises(TargetError, match=r"Loop: the number of its turns is known at run time only.*'turns'"):
        TARGET.lower(_with_loop(known=False))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3])
def test_flatten_at_any_axis(axis):
    x = uniform(1, 2, 3, 4)
    agree(model([node("Flatten", ["x"], ["y"], axis=axis)], {"x": x}, ["y"]), {"x": x}, 0)


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (0.5, -0.5)])
@pytest.mark.parametrize("known", [True, False])
def test_clip_whose_bounds_may_cross(low, high, known):
    """The upper bound wins, also where bounds are operands."""
    x = uniform(1, 40)
    bounds = {"lo": np.array(low, np.float32), "hi": np.array(high, np.float32)}
    feeds = {"x": x} | ({} if known else bounds)
    made = model([node("Clip", ["x", "lo", "hi"], ["y"])], feeds, ["y"], bounds if known else None)
    found = compiled(made, feeds)["y"]
    np.testing.assert_array_equal(found, np.minimum(np.maximum(x, np.float32(low)), np.float32(high)))


@settings(CASES, max_examples=10)
@given(
    op=st.sampled_from(["ReduceMax", "ReduceMin"]),
    axes=st.sampled_from([(0,), (1,), (-1,), (0, 2), (0, 1, 2)]),
    keep=st.integers(0, 1),
    infinite=st.booleans(),
)
def test_extremes_of_infinities(op, axes, keep, infinite):
    x = uniform(1, 2, 3, 5)
    if infinite:
        x = np.full_like(x, -np.inf if op == "ReduceMax" else np.inf)
    made = model([node(op, ["x"], ["y"], axes=axes, keepdims=keep)], {"x": x}, ["y"])
    pick = np.max if op == "ReduceMax" else np.min
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], pick(x, axis=axes, keepdims=bool(keep)))


def test_tensors_without_elements():
    """An empty input is a constant, and a constant without elements may be an output."""
    feeds = {"x": uniform(1, 2, 3), "none": np.zeros((0, 3), np.float32)}
    nodes = [node("Concat", ["x", "none"], ["y"], axis=0), node("Relu", ["none"], ["z"])]
    agree(model(nodes, feeds, ["y", "z"]), feeds, 0)


REFUSED = {
    "RoiAlign": (
        {"mode": "max"},
        [uniform(1, 1, 1, 4, 4), np.array([[0, 0, 2, 2]], np.float32), np.array([0], np.int64)],
        r"RoiAlign: mode max",
    ),
    "Dropout": ({}, [uniform(1, 4), np.array(0.5, np.float32), np.array(True)], r"Dropout: whether it trains"),
}


@pytest.mark.parametrize("op", REFUSED)
def test_what_tvm_computes_wrongly_is_refused(op):
    attributes, arrays, message = REFUSED[op]
    feeds = {f"x{i}": array for i, array in enumerate(arrays)}
    made = model([node(op, list(feeds), ["y"], **attributes)], feeds, ["y"], opset=20)
    with pytest.raises(UnsupportedOperatorError, match=message):
        TARGET.lower(made)


def test_a_definition_that_cannot_be_compiled_names_both_operators():
    feeds = {"x": uniform(1, 2, 3)}
    made = model([node("Bernoulli", ["x"], ["y"])], feeds, ["y"])
    with pytest.raises(UnsupportedOperatorError, match=r"Bernoulli.*RandomUniformLike.*node 'Bernoulli_y'"):
        TARGET.lower(made)


def test_a_model_with_functions_and_equal_names_in_both_graphs():
    """A function's inner value has the name of the model's input."""
    body = [helper.make_node("Neg", ["v"], ["x"]), helper.make_node("Relu", ["x"], ["w"])]
    function = helper.make_function("local", "Part", ["v"], ["w"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph(
        [helper.make_node("Part", ["x"], ["y"], domain="local")],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [4])],
        [helper.make_tensor_value_info("y", FLOAT, [4])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    made = ir.from_proto(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10))
    x = uniform(1, 4)
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], np.maximum(-x, 0))


@settings(CASES, max_examples=10)
@given(repeats=st.tuples(*[st.integers(1, 7)] * 4))
@example((7, 6, 4, 2))
def test_tiles(repeats):
    """With these sizes, TVM's own tile was wrong in every second row."""
    x = uniform(1, 2, 3, 4, 5)
    made = model([node("Tile", ["x", "r"], ["y"])], {"x": x}, ["y"], {"r": np.array(repeats, np.int64)})
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], np.tile(x, repeats))
