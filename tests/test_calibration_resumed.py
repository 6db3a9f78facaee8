"""Runs that begin where the one before ended give the same values as runs from the data on."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graph as g
from graphopt import model as models
from graphopt.calibration import random_dataset
from graphopt.calibration.dataset import Dataset
from graphopt.calibration.observe import watch
from graphopt.calibration.resumed import ResumedRuns
from graphopt.errors import ModelError
from graphopt.passes.channels.edits import set_constant

CHANNELS = 3


class Counting(Dataset):
    """A data set that counts the runs over it."""

    runs = 0

    def batches(self, size: int):
        self.runs += 1
        return super().batches(size)


def network(kinds: list[str], links: list[int], seed: int, batch: int | None) -> ir.Model:
    """Operators in a row, each also fed from an earlier value; small integers, so that all arithmetic is exact."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants = [numpy_helper.from_array(np.array([0, -1, 2, 2], np.int64), "sizes")]
    values = ["x"]
    for index, (kind, link) in enumerate(zip(kinds, links, strict=True)):
        last, other, name = values[-1], values[link % len(values)], f"v{index}"
        if kind == "conv":
            weights = rng.integers(-1, 2, (CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
            constants.append(numpy_helper.from_array(weights, f"w{index}"))
            nodes.append(helper.make_node("Conv", [last, f"w{index}"], [name], f"n{index}"))
        elif kind == "reshape":  # by the shape of another value, which is held, too
            nodes.append(helper.make_node("Shape", [other], [f"s{index}"], f"shape{index}"))
            nodes.append(helper.make_node("Reshape", [last, f"s{index}"], [name], f"n{index}"))
        elif kind == "constant":
            one = numpy_helper.from_array(rng.integers(-2, 3, (1, CHANNELS, 1, 1)).astype(np.float32))
            nodes.append(helper.make_node("Constant", [], [f"k{index}"], f"constant{index}", value=one))
            nodes.append(helper.make_node("Add", [last, f"k{index}"], [name], f"n{index}"))
        else:
            inputs = {"Relu": [last], "Sub": [last, other], "Max": [last, other]}[kind]
            nodes.append(helper.make_node(kind, inputs, [name], f"n{index}"))
        values.append(name)
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, CHANNELS, 2, 2])
    output = helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, [batch, CHANNELS, 2, 2])
    graph = helper.make_graph(nodes, "row", [info], [output], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return ir.from_proto(made)


def whole_numbers(model: ir.Model, count: int, seed: int) -> Counting:
    made = random_dataset(models.signature(model), count, seed)
    for array in made._storage.arrays.values():  # pyright: ignore[reportAttributeAccessIssue]
        np.round(array, out=array)
    made.__class__ = Counting
    return made  # pyright: ignore[reportReturnType]


KINDS = st.sampled_from(["conv", "Relu", "Sub", "Max", "reshape", "constant"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(KINDS, st.integers(0, 20)), min_size=2, max_size=9),
    st.integers(1, 11),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([0, 500, 1 << 20]),
    st.integers(0, 2**31),
    st.data(),
)
def test_as_from_the_data_on(row, count, batch, most_bytes, seed, data):
    """Whatever is asked for, in the order of the graph, with weights changed behind it, and whatever can be held."""
    kinds, links = [kind for kind, _ in row], [link for _, link in row]
    model = network(kinds, links, seed, batch)
    dataset = whole_numbers(model, count, seed)
    runs, rng = ResumedRuns(dataset, most_bytes), np.random.default_rng(seed)
    names = ["x", *(f"v{index}" for index in range(len(row)))]
    stops = sorted(data.draw(st.sets(st.integers(0, len(row)), min_size=1)))
    for number, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        wanted = [*data.draw(st.lists(st.sampled_from(names[begin : end + 1]), unique=True)), names[end]]
        taken = runs.watch(model, wanted, label="run")
        expected = list(watch(model, wanted, dataset, label="run"))
        if number == 1 and data.draw(st.booleans()):
            next(taken)  # a run broken off is one that holds nothing
            taken = runs.watch(model, wanted, label="run")
        got = list(taken)
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
        for node in model.graph:
            if node.op_type == "Conv" and names.index(str(node.outputs[0].name)) > end:
                set_constant(model.graph, node, 1, rng.integers(-1, 2, (CHANNELS, CHANNELS, 1, 1)).astype(np.float32))


def row_of_layers() -> tuple[ir.Model, Counting]:
    model = network(["conv", "Relu", "conv", "Sub", "conv"], [0, 0, 0, 2, 0], 1, None)
    return model, whole_numbers(model, 10, 2)


def test_data_is_read_once_where_values_are_held():
    model, dataset = row_of_layers()
    for most_bytes, expected in ((1 << 20, 1), (0, 3)):
        dataset.runs, runs = 0, ResumedRuns(dataset, most_bytes)
        for name in ("v0", "v2", "v4"):
            assert sum(len(batch[name]) for batch in runs.watch(model, [name], label="run")) == 10
        assert dataset.runs == expected


def test_what_was_computed_before_is_not_computed_again():
    """The first layer is changed against the rules: what follows does not see it."""
    model, dataset = row_of_layers()
    runs = ResumedRuns(dataset)
    list(runs.watch(model, ["v1"], label="run"))
    before = list(runs.watch(model, ["v2"], label="run"))
    first = next(node for node in model.graph if node.op_type == "Conv")
    weights = g.constant_of(first.inputs[1])
    assert weights is not None
    set_constant(model.graph, first, 1, 5 * weights + 1)
    after = list(runs.watch(model, ["v2"], label="run"))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one["v2"], other["v2"])


def test_an_unknown_value():
    model, dataset = row_of_layers()
    with pytest.raises(ModelError, match="'nothing'"):
        next(ResumedRuns(dataset).watch(model, ["v0", "nothing"], label="run"))
