"""What is proved holds: padded models compute, for the real part, what unpadded ones do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.sizes.padding import Padding, Refusal, prove
from graphopt.targets.cpu import Cpu
from tests.passes.test_fusion_attention import Guarded, guarded

WIDTH = 4


class Drawn:
    """A model written node by node; `kinds` says by name where a tensor has the dimension: 'bsw' is (1, S, 4)."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.kinds: dict[str, str] = {"x": "bsw"}
        self.rng = np.random.default_rng(0)

    def constant(self, array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op: str, inputs: list[str], kind: str, **attributes) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        self.kinds[name] = kind
        return name

    def model(self, outputs) -> onnx.ModelProto:
        """Of what the outputs depend on."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if node.output[0] in needed:
                needed.update(node.input)
                kept.insert(0, node)
        infos = [helper.make_tensor_value_info(name, T.FLOAT, [None] * len(self.kinds[name])) for name in outputs]
        inputs = [
            helper.make_tensor_value_info("x", T.FLOAT, [1, "S", WIDTH]),
            helper.make_tensor_value_info("mask", T.INT64, [1, "S"]),
        ]
        graph = helper.make_graph(kept, "drawn", inputs, infos, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def weights(self):
        return self.constant(self.rng.standard_normal((WIDTH, WIDTH)).astype("f4") / 2)

    def of(self, kind):
        return [name for name, own in self.kinds.items() if own == kind]


def _added(draw, drawn: Drawn) -> None:
    """One more node, of any kind that fits, whether it can be padded or not."""
    rows = draw(st.sampled_from(drawn.of("bsw")))
    axis = {"axis": 1}
    one = drawn.constant(np.array([1], np.int64))

    def pair():
        return [rows, draw(st.sampled_from(drawn.of("bsw")))]

    def scores():
        turned = drawn.node("Transpose", [draw(st.sampled_from(drawn.of("bsw")))], "bws", perm=[0, 2, 1])
        drawn.node("MatMul", [rows, turned], "bss")

    def masked():
        wide = drawn.node("Cast", ["mask"], "bs", to=T.FLOAT)
        gone = drawn.node("Sub", [drawn.constant(np.float32(1)), wide], "bs")
        low = drawn.constant(np.float32(draw(st.sampled_from([-1e4, -3e38, -1.0]))))
        bias = drawn.node("Unsqueeze", [drawn.node("Mul", [gone, low], "bs"), one], "b1s")
        drawn.node("Add", [draw(st.sampled_from(drawn.of("bss"))), bias], "bss")

    def causal():
        shape = drawn.node("Shape", ["x"], "n")
        size = drawn.node("Gather", [shape, drawn.constant(np.array(1, np.int64))], "")
        steps = drawn.node("Range", [drawn.constant(np.int64(0)), size, drawn.constant(np.int64(1))], "n")
        column = drawn.node("Unsqueeze", [steps, one], "n1")
        seen = drawn.node(draw(st.sampled_from(["LessOrEqual", "GreaterOrEqual"])), [steps, column], "nn")
        hidden = drawn.constant(np.float32(-1e9))
        bias = drawn.node("Where", [seen, drawn.constant(np.float32(0)), hidden], "nn")
        drawn.node("Add", [draw(st.sampled_from(drawn.of("bss"))), bias], "bss")

    def pooled():
        kept = drawn.node("Unsqueeze", [drawn.node("Cast", ["mask"], "bs", to=T.FLOAT),
                                        drawn.constant(np.array([2], np.int64))], "bs1")  # fmt: skip
        drawn.node("Mul", [rows, kept], "bsw")

    def attention():
        scores()
        for _ in range(draw(st.integers(1, 2))):
            draw(st.sampled_from([masked, causal]))()
        (table,) = drawn.of("bss")[-1:]
        weights = drawn.node("Softmax", [table], "bss", axis=draw(st.sampled_from([-1, -1, -1, 1])))
        drawn.node("MatMul", [weights, draw(st.sampled_from(drawn.of("bsw")))], "bsw")

    def by_size():
        size = drawn.node("Cast", [drawn.node("Shape", ["x"], "n")], "n", to=T.FLOAT)
        size = drawn.node("Gather", [size, drawn.constant(np.array(1, np.int64))], "")
        drawn.node("Div", [rows, size], "bsw")

    choices = {
        "add": lambda: drawn.node("Add", pair(), "bsw"),
        "multiply": lambda: drawn.node("Mul", pair(), "bsw"),
        "bias": lambda: drawn.node("Add", [rows, drawn.constant(np.arange(4, dtype=np.float32))], "bsw"),
        "tanh": lambda: drawn.node("Tanh", [rows], "bsw"),
        "sigmoid": lambda: drawn.node("Sigmoid", [rows], "bsw"),
        "dense": lambda: drawn.node("MatMul", [rows, drawn.weights()], "bsw"),
        "norm": lambda: drawn.node("LayerNormalization", [rows, drawn.constant(np.ones(4, "f4"))], "bsw", axis=-1),
        "norm over steps": lambda: drawn.node("Softmax", [rows], "bsw", **axis),
        "sum": lambda: drawn.node("ReduceSum", [rows, one], "b1w"),
        "mean": lambda: drawn.node("ReduceMean", [rows, one], "b1w"),
        "most": lambda: drawn.node("ReduceMax", [rows, one], "b1w"),
        "running": lambda: drawn.node("CumSum", [rows, drawn.constant(np.array(1, np.int64))], "bsw",
                                      reverse=int(draw(st.booleans()))),
        "first": lambda: drawn.node("Gather", [rows, drawn.constant(np.array([draw(st.integers(-1, 4))]))], "b1w",
                                    **axis),
        "twice": lambda: drawn.node("Concat", pair(), "bdw", **axis),
        "scores": scores, "pooled": pooled, "by size": by_size, "attention": attention, "attention too": attention,
    }  # fmt: skip
    if drawn.of("bss"):
        table = draw(st.sampled_from(drawn.of("bss")))
        choices |= {
            "masked": masked,
            "causal": causal,
            "softmax": lambda: drawn.node("Softmax", [table], "bss", axis=draw(st.sampled_from([-1, 1]))),
            "context": lambda: drawn.node("MatMul", [table, rows], "bsw"),
        }
    if drawn.of("b1w"):
        choices["broadcast"] = lambda: drawn.node("Mul", [rows, draw(st.sampled_from(drawn.of("b1w")))], "bsw")
    choices[draw(st.sampled_from(sorted(choices)))]()


@st.composite
def drawn_models(draw):
    drawn = Drawn()
    for _ in range(draw(st.integers(1, 9))):
        _added(draw, drawn)
    named = [name for name, kind in drawn.kinds.items() if name != "x" and kind.startswith("b")]
    floats = [name for name in named if drawn.kinds[name] in ("bsw", "bss", "b1w", "bdw")]
    return drawn.model([draw(st.sampled_from(floats))] if floats else [])


PLACES = [("x", 1), ("mask", 1)]


def _padded_as_unpadded(proto, low, high, masks, seed):
    run = OnnxRuntimeEngine(proto.SerializeToString(), 1, optimize=False).run
    rng = np.random.default_rng(seed)
    name = proto.graph.output[0].name
    for n in range(low, high + 1):
        x = rng.standard_normal((1, n, WIDTH)).astype("f4")
        mask = rng.integers(0, 2, (1, n))
        mask[:, 0] = 1
        want = run({"x": x, "mask": mask})[name]
        padded = {
            "x": np.pad(x, [(0, 0), (0, high - n), (0, 0)]),
            "mask": np.pad(mask, [(0, 0), (0, high - n)]),
        }
        got = run(padded)[name]
        cut = tuple(slice(n) if have == high and size == n else slice(None)
                    for have, size in zip(got.shape, want.shape, strict=True))  # fmt: skip
        np.testing.assert_allclose(got[cut], want, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(want).max())))


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(proto=drawn_models(), high=st.integers(6, 9), seed=st.integers(0, 9))
def test_what_is_proved_holds(proto, high, seed):
    if not proto.graph.output:
        return
    with tempfile.TemporaryDirectory() as work:
        found = prove(models.from_proto(proto), PLACES, 5, high, Path(work))
    if isinstance(found, Padding):
        _padded_as_unpadded(proto, 5, high, found.masks, seed)


def _attention(drawn: Drawn, *, mask=None, axis=-1):
    """x attends to itself; the name of the result. `mask`: what is added to the scores, if anything is."""
    turned = drawn.node("Transpose", ["x"], "bws", perm=[0, 2, 1])
    scores = drawn.node("MatMul", ["x", turned], "bss")
    if mask == "told":
        wide = drawn.node("Cast", ["mask"], "bs", to=T.FLOAT)
        gone = drawn.node("Sub", [drawn.constant(np.float32(1)), wide], "bs")
        bias = drawn.node("Mul", [gone, drawn.constant(np.finfo(np.float32).min)], "bs")
        bias = drawn.node("Unsqueeze", [bias, drawn.constant(np.array([1]))], "b1s")
        scores = drawn.node("Add", [scores, bias], "bss")
    return drawn.node("MatMul", [drawn.node("Softmax", [scores], "bss", axis=axis), "x"], "bsw")


def _of(write, high=8) -> Padding | Refusal:
    drawn = Drawn()
    with tempfile.TemporaryDirectory() as work:
        return prove(models.from_proto(drawn.model([write(drawn)])), PLACES, 5, high, Path(work))


def test_a_mask_makes_attention_paddable():
    assert _of(lambda d: _attention(d, mask="told")) == Padding(frozenset({("mask", 1)}))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_attention, "Softmax: it is over the padded axis, and what is behind is not masked"),
        (lambda d: _attention(d, mask="told", axis=1), "Softmax: it is over the padded axis"),
        (lambda d: d.node("ReduceMean", ["x", d.constant(np.array([1]))], "b1w"), "ReduceMean: it is over the padded"),
        (lambda d: d.node("Gather", ["x", d.constant(np.array([-1]))], "b1w", axis=1), "Gather: it picks elements"),
        (lambda d: d.node("Gather", ["x", d.constant(np.array([5]))], "b1w", axis=1), "Gather: it picks elements"),
        (lambda d: d.node("Concat", ["x", "x"], "bdw", axis=1), "Concat: it puts something behind"),
        (lambda d: d.node("Reshape", ["x", d.constant(np.array([2, -1]))], "nn"), "its shape depends on the size in"),
        (lambda d: d.node("Flatten", ["x"], "nn", axis=1), "Flatten: its shape depends on the size"),
    ],
)
def test_what_forbids_padding(write, reason):
    found = _of(write)
    assert isinstance(found, Refusal)
    assert reason in found.reason
    assert found.node


def test_one_size_needs_no_proof():
    assert _of(lambda d: d.node("ReduceMean", ["x", d.constant(np.array([1]))], "b1w"), high=5) == Padding()


def test_a_causal_decoder(shared_model):
    """Its mask, its positions and its rotary embeddings depend on sizes alone."""
    pipeline = Pipeline.parse(PRESETS["exact"])
    model, _ = pipeline.run(models.load(shared_model("stories260k")), Context(Cpu().capabilities))
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, ir.SymbolicDim("seq")])
    with tempfile.TemporaryDirectory() as work:
        assert prove(model, [("input_ids", 1)], 4, 24, Path(work)) == Padding()


def test_a_network_with_batches(shared_model):
    model = models.load(shared_model("squeezenet1_1"))
    with tempfile.TemporaryDirectory() as work:
        assert prove(model, [("data", 0)], 1, 4, Path(work)) == Padding()


@pytest.mark.parametrize("hidden", [-np.inf, float(np.finfo(np.float32).min)])
def test_guarded_attention(hidden):
    """PyTorch's attention, as exported and fused: padded positions are masked as those are that callers mask."""
    w, outputs = guarded(Guarded(hidden=hidden))
    w.inputs = {name: (1, *("S" if d in ("S", "T") else d for d in dims[1:])) for name, dims in w.inputs.items()}
    model, _ = Pipeline.parse(PRESETS["exact"]).run(w.model(*outputs), Context(Cpu().capabilities))
    assert "Attention" in [node.op_type for node in model.graph]
    places = [("q", 1), ("k", 1), ("v", 1), ("m", 2), ("m", 3)]
    with tempfile.TemporaryDirectory() as work:
        assert prove(model, places, 4, 8, Path(work)) == Padding(frozenset({("m", 3)}))
    rng = np.random.default_rng(0)
    run = OnnxRuntimeEngine(ir.to_proto(model).SerializeToString(), 1, optimize=False).run
    shapes = {name: [d if isinstance(d, int) else 5 for d in dims] for name, dims in w.inputs.items()}
    feeds = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    padded = {name: np.pad(a, [(0, 3 if (name, axis) in places else 0) for axis in range(4)])
              for name, a in feeds.items()}  # fmt: skip
    (wanted,), (found,) = run(feeds).values(), run(padded).values()
    np.testing.assert_allclose(found[:, :5], wanted, rtol=1e-5, atol=1e-6)
