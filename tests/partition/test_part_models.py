"""Random models cut anywhere: the parts, run one after another, compute what the whole computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import model as models
from graphopt.model import check
from graphopt.partition import (
    Nodes,
    Part,
    cut,
    extract,
    fewest_parts,
    inlined,
    known_types,
    record_types,
    segments,
    store_constants,
)
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.targets.base import TensorType

KIND = TensorType("float32", (2, 3))
FEEDS = {
    name: np.array(rows, np.float32)
    for name, rows in (("x0", [[1, -2, 3], [0, 5, -1]]), ("x1", [[2, 2, 1], [-1, 0, 1]]))
}
OPERATORS = ("Relu", "Neg", "Add", "Mul", "Sub", "Max")


def if_node(number: int, positive: str, captured: tuple[str, str]) -> list:
    """If the sum of a value is positive, the sum of two others that the branches capture, else their difference."""
    kind = helper.make_tensor_value_info
    branches = [
        helper.make_graph(
            [helper.make_node(op, list(captured), [f"b{number}{op}"])], op, [], [kind(f"b{number}{op}", 1, [2, 3])]
        )
        for op in ("Add", "Sub")
    ]
    return [
        helper.make_node("ReduceSum", [positive], [f"s{number}"], f"sum{number}", keepdims=0),
        helper.make_node("Greater", [f"s{number}", "zero"], [f"p{number}"], f"greater{number}"),
        helper.make_node(
            "If", [f"p{number}"], [f"v{number}"], f"if{number}", then_branch=branches[0], else_branch=branches[1]
        ),
    ]


@st.composite
def random_models(draw) -> ir.Model:
    values = ["x0", "x1", "w"]
    nodes = []
    for number in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from((*OPERATORS, "If", "Constant")))
        pick = st.sampled_from(values)
        if op == "Constant":  # w * w: depends on an initializer alone
            nodes.append(helper.make_node("Mul", ["w", "w"], [f"v{number}"], f"n{number}"))
        elif op == "If":
            nodes += if_node(number, draw(pick), (draw(pick), draw(pick)))
        else:
            reads = [draw(pick) for _ in range(1 if op in ("Relu", "Neg") else 2)]
            nodes.append(helper.make_node(op, reads, [f"v{number}"], f"n{number}"))
        values.append(f"v{number}")
    made = [v for v in values if v.startswith("v")]
    outputs = {made[-1], *draw(st.lists(st.sampled_from(made), max_size=2))}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in FEEDS]
    graph = helper.make_graph(
        nodes,
        "random",
        infos,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in sorted(outputs)],
        [
            numpy_helper.from_array(np.full((2, 3), 0.5, "f"), "w"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        ],
    )
    made_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(made_model)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return OnnxRuntimeEngine(models.to_bytes(model), 1, optimize=False).run(feeds)


@settings(max_examples=60)
@given(random_models(), st.data())
def test_parts_compute_what_the_whole_computes(tmp_path_factory, model, data):
    whole = run(model, FEEDS)
    before = models.to_bytes(model)
    types = known_types(models.fix_inputs(model, {"x0": (2, 3)}), tmp_path_factory.getbasetemp())
    nodes = Nodes.of(model)
    kinds = data.draw(
        st.lists(st.sampled_from(["tvm", "onnxruntime"]), min_size=len(nodes.nodes), max_size=len(nodes.nodes))
    )
    parts = [Part(kinds[p[0]], tuple(p), "") for p in fewest_parts(nodes.predecessors, kinds)]
    made = extract(model, nodes, parts, types)
    values = dict(FEEDS)
    for each in made:
        check(each.model, "a part")
        assert set(each.outputs) & set(each.inputs) == set()
        values.update(run(each.model, {name: values[name] for name in each.inputs}))
    for name, wanted in whole.items():
        np.testing.assert_array_equal(values[name], wanted)
    assert models.to_bytes(model) == before


def chain(count: int) -> ir.Model:
    nodes = [helper.make_node("Relu", [f"v{i}" if i else "x0"], [f"v{i + 1}"], f"relu{i}") for i in range(count)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", 1, [2, 3])],
        [helper.make_tensor_value_info(f"v{count}", 1, [2, 3])],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_islands_that_are_not_worth_a_switch_are_given_up_and_said_so():
    nodes = Nodes.of(chain(7))
    refused = {2: "TVM lacks A", 4: "TVM lacks A"}
    parts = cut(nodes, refused, [1e-3, 1e-3, 0, 1e-6, 0, 1e-3, 1e-3])
    assert [(p.engine, p.nodes) for p in parts] == [("tvm", (0, 1)), ("onnxruntime", (2, 3, 4)), ("tvm", (5, 6))]
    assert parts[1].why == "TVM lacks A (relu2, relu4); 1 node beside them: too little work to switch engines for"
    worth = cut(nodes, refused, [1e-3] * 7)
    assert [p.nodes for p in worth] == [(0, 1), (2,), (3,), (4,), (5, 6)]
    (nothing,) = cut(nodes, {}, [1e-7] * 7)
    assert nothing.engine == "onnxruntime" and nothing.why == "7 nodes: too little work to switch engines for"


def test_shapes_of_values_in_other_parts_become_constants(tmp_path):
    """Reshape(v, Shape(u)): a part that reads v alone must know the shape."""
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x0"], ["u"], "relu"),
            helper.make_node("Shape", ["u"], ["s"], "shape"),
            helper.make_node("Reshape", ["x1", "s"], ["v"], "reshape"),
        ],
        "shapes",
        [helper.make_tensor_value_info("x0", 1, ["a", "b"]), helper.make_tensor_value_info("x1", 1, ["n"])],
        [helper.make_tensor_value_info("u", 1, None), helper.make_tensor_value_info("v", 1, None)],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    model = models.fix_inputs(model, {"x0": (2, 3), "x1": (6,)})
    store_constants(model, {"s": np.array([2, 3]), "u": np.zeros((2, 3), "f")})
    assert [node.op_type for node in model.graph] == ["Relu", "Reshape"]  # an output of the model stays computed
    nodes = Nodes.of(model)
    parts = [Part("tvm", (1,), ""), Part("onnxruntime", (0,), "")]
    first, second = extract(model, nodes, parts, known_types(model, tmp_path))
    assert (first.inputs, first.outputs, second.inputs, second.outputs) == (("x1",), ("v",), ("x0",), ("u",))


def test_functions_are_inlined_and_other_domains_typed_by_onnx_runtime(tmp_path):
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [
            helper.make_node("Twice", ["x0"], ["t"], "twice", domain="local"),
            helper.make_node("QuickGelu", ["t"], ["g"], "gelu", domain="com.microsoft"),
            helper.make_node("NonZero", ["g"], ["z"], "nonzero"),
            helper.make_node("Relu", ["g"], ["y"], "relu"),
        ],
        "g",
        [helper.make_tensor_value_info("x0", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 3]), helper.make_tensor_value_info("z", 7, [2, None])],
    )
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 17), ("local", 1), ("com.microsoft", 1))]
    model = ir.from_proto(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8))
    model = models.fix_inputs(inlined(model), {"x0": (2, 3)})
    assert not model.functions and [n.op_type for n in model.graph] == ["Add", "QuickGelu", "NonZero", "Relu"]
    types = known_types(model, tmp_path)
    assert types["g"] == KIND and "z" not in types
    record_types(model, types)
    assert [v.shape and v.shape.is_static() for n in model.graph for v in n.outputs] == [True, True, False, True]


@given(random_models(), st.integers(1, 6), st.data())
def test_segments_are_all_nodes_in_order(model, count, data):
    nodes = Nodes.of(model)
    work = data.draw(st.lists(st.floats(0, 1), min_size=len(nodes.nodes), max_size=len(nodes.nodes)))
    found = segments(nodes, work, count)
    assert [i for each in found for i in each] == list(range(len(nodes.nodes)))
    assert len(found) <= count and all(found)


def test_segments_are_cut_where_few_values_cross():
    """x -> a -> (b, c) -> d -> e: behind d one value crosses, behind b two do."""
    edges = [("Relu", ["x0"], "a"), ("Neg", ["a"], "b"), ("Relu", ["a"], "c"), ("Add", ["b", "c"], "d"),
             ("Neg", ["d"], "e")]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(op, reads, [made], made) for op, reads, made in edges],
        "diamond",
        [helper.make_tensor_value_info("x0", 1, [2, 3])],
        [helper.make_tensor_value_info("e", 1, [2, 3])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert segments(Nodes.of(model), [1.5, 0.5, 0.5, 0.5, 3], 2) == [(0, 1, 2, 3), (4,)]
    assert segments(Nodes.of(model), [2, 0.5, 0.5, 0.1, 1.5], 2) == [(0,), (1, 2, 3, 4)]
