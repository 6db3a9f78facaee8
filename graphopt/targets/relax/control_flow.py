"""Nodes that say what runs, not what is computed: imported as what runs, once that is known.

The branch of an If takes its place; the turns of a Loop or Scan, and the steps of an RNN, GRU or LSTM, come one after
another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx

from graphopt.targets.relax import recurrent
from graphopt.targets.relax.nodes import attributes as attributes_of
from graphopt.targets.relax.nodes import refused
from graphopt.targets.relax.values import Value, constant, known

STEERS = frozenset({"If", "Loop", "Scan", "RNN", "GRU", "LSTM"})
MOST_TURNS = 64
"""Of a Loop or Scan that is unrolled."""


class Subgraph(Protocol):
    """Imports the nodes of a graph, some of whose names are `bound`; returns its outputs."""

    def __call__(self, graph: onnx.GraphProto, bound: Mapping[str, Value], opset: int | None = None) -> list[Value]: ...


def steered(node: onnx.NodeProto, inputs: list[Value | None], subgraph: Subgraph, opset: int) -> list[Value]:
    """The outputs of a node of `STEERS`, of the model's `opset`. Raises TargetError where it cannot be unrolled."""
    graphs = {a.name: a.g for a in node.attribute if a.HasField("g")}
    if node.op_type == "If":
        condition = known(inputs[0])
        if condition is None:
            raise refused(node, "its condition is known at run time only")
        return subgraph(graphs["then_branch" if condition.reshape(-1)[0] else "else_branch"], {})
    if node.op_type == "Loop":
        return _loop(node, graphs["body"], inputs, subgraph)
    if node.op_type == "Scan":
        return _scan(node, graphs["body"], inputs, subgraph, opset)
    shapes = [None if value is None else value.shape for value in inputs]
    reason = recurrent.refusal(node, shapes, known(inputs[4]) if len(inputs) > 4 else None)
    if reason is not None:
        raise refused(node, reason)
    bound = {name: value for name, value in zip(node.input, inputs, strict=True) if value is not None}
    made = iter(subgraph(recurrent.unrolled(node, shapes), bound, recurrent.OPSET))
    return [next(made) if name else Value(None, "float32") for name in node.output]


def _loop(node: onnx.NodeProto, body: onnx.GraphProto, inputs: list[Value | None], subgraph: Subgraph) -> list[Value]:
    turns, condition = (known(value) for value in inputs[:2])
    if (inputs[0] is not None and turns is None) or (inputs[1] is not None and condition is None):
        raise refused(node, "the number of its turns is known at run time only")
    going = condition is None or bool(condition.reshape(-1)[0])
    carried: list[Any] = list(inputs[2:])
    collected: list[list[Value]] = [[] for _ in body.output[1 + len(carried) :]]
    turn = 0
    while going and (turns is None or turn < int(turns.reshape(-1)[0])):
        if turn == MOST_TURNS:
            raise refused(node, f"over {MOST_TURNS} turns are not unrolled")
        counters = [constant(np.asarray(turn, np.int64)), constant(np.asarray(True))]
        bound = dict(zip([info.name for info in body.input], [*counters, *carried], strict=True))
        on, *made = subgraph(body, bound)
        if on.const is None:
            raise refused(node, "the number of its turns is known at run time only")
        going, carried = bool(on.const.reshape(-1)[0]), made[: len(carried)]
        for rows_, value in zip(collected, made[len(carried) :], strict=True):
            rows_.append(value)
        turn += 1
    return [*carried, *(_stacked(node, each, 0, subgraph) for each in collected)]


def _scan(
    node: onnx.NodeProto, body: onnx.GraphProto, inputs: list[Value | None], subgraph: Subgraph, opset: int
) -> list[Value]:
    attributes = attributes_of(node)
    count = int(attributes["num_scan_inputs"])
    states: list[Any] = list(inputs[: len(inputs) - count])
    scanned: list[Any] = list(inputs[len(inputs) - count :])
    made_count = len(body.output) - len(states)
    axes = attributes.get("scan_input_axes", (0,) * count)
    if opset < 9 or any(v is None or not v.shape for v in scanned):
        raise refused(node, "Scan of this opset or with these operands")
    turns = scanned[0].shape[axes[0]]
    if turns > MOST_TURNS:
        raise refused(node, f"over {MOST_TURNS} turns are not unrolled")
    collected: list[list[Value]] = [[] for _ in range(made_count)]
    backward = attributes.get("scan_input_directions", (0,) * count)
    for turn in range(turns):
        rows_ = [
            _row(value, axis, turns - 1 - turn if back else turn, subgraph)
            for value, axis, back in zip(scanned, axes, backward, strict=True)
        ]
        bound = dict(zip([info.name for info in body.input], [*states, *rows_], strict=True))
        made = subgraph(body, bound)
        states = made[: len(states)]
        for each, value in zip(collected, made[len(states) :], strict=True):
            each.append(value)
    out_axes = attributes.get("scan_output_axes", (0,) * made_count)
    out_backward = attributes.get("scan_output_directions", (0,) * made_count)
    stacked = [
        _stacked(node, each[::-1] if back else each, axis, subgraph)
        for each, axis, back in zip(collected, out_axes, out_backward, strict=True)
    ]
    return [*states, *stacked]


def _row(value: Value, axis: int, index: int, subgraph: Subgraph) -> Value:
    """value[index] along an axis, which goes."""
    helper = onnx.helper
    axis = axis % len(value.shape or ())
    nodes = [helper.make_node("Gather", ["value", "index"], ["row"], axis=axis)]
    graph = helper.make_graph(nodes, "row", [], [helper.make_empty_tensor_value_info("row")])
    index_of = constant(np.asarray(index, np.int64))
    return subgraph(graph, {"value": value, "index": index_of}, recurrent.OPSET)[0]


def _stacked(node: onnx.NodeProto, values: list[Value], axis: int, subgraph: Subgraph) -> Value:
    """Values of one shape, side by side along a new axis."""
    if not values:
        raise refused(node, "it takes no turn, and nothing says what shape its outputs have")
    helper = onnx.helper
    names = [f"row_{i}" for i in range(len(values))]
    nodes = [helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_"]) for name in names]
    nodes.append(helper.make_node("Concat", [f"{name}_" for name in names], ["stacked"], axis=axis))
    graph = helper.make_graph(nodes, "stacked", [], [helper.make_empty_tensor_value_info("stacked")])
    bound = {**dict(zip(names, values, strict=True)), "axis": constant(np.asarray([axis], np.int64))}
    return subgraph(graph, bound, recurrent.OPSET)[0]
