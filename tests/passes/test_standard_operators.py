"""What is written out computes what ONNX Runtime's own operator does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.passes.standard_operators import StandardOperators
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

OPSETS = st.sampled_from([11, 13, 17, 18, 20])


def _model(op, feeds, constants, outputs, opset=17, left_out=(), rank=3, **attributes):
    """One node, in two dynamic dimensions where feeds have them; `left_out`: inputs by index."""
    names = iter([*feeds, *constants])
    total = len(feeds) + len(constants) + len(left_out)
    inputs = ["" if i in left_out else next(names) for i in range(total)]
    kinds = {np.dtype(np.float32): T.FLOAT, np.dtype(np.int32): T.INT32, np.dtype(np.uint8): T.UINT8}
    infos = [
        helper.make_tensor_value_info(name, kinds[array.dtype], [*["B", "S"][: array.ndim - 1], *array.shape[-1:]])
        for name, array in feeds.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, "it", domain="com.microsoft", **attributes)],
        "g",
        infos,
        [helper.make_tensor_value_info(name, T.FLOAT, [None] * rank) for name in outputs if name],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=8)


def _same(proto: onnx.ModelProto, feeds, tolerance=1e-5):
    """The written out model's operators; it computes the same, in ONNX Runtime."""
    wanted = OnnxRuntimeEngine(proto.SerializeToString(), 1, optimize=False).run(feeds)
    result = StandardOperators().run(models.from_proto(proto), Context())
    assert result.applied == 1, result.skipped
    models.check(result.model, "what was written out")
    found = OnnxRuntimeEngine(models.to_bytes(result.model), 1, optimize=False).run(feeds)
    for name, array in wanted.items():
        scale = max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(found[name], array, atol=tolerance * scale, rtol=0)
    return [node.op_type for node in result.model.graph]


def _normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("op", ["Gelu", "BiasGelu", "FastGelu", "FastGelu with bias", "QuickGelu"])
@pytest.mark.parametrize("opset", [11, 17])
def test_gelu(op, opset):
    feeds = {"x": _normal(0, 2, 3, 8) * 3}
    constants = {"b": _normal(1, 8)} if op in ("BiasGelu", "FastGelu with bias") else {}
    _same(_model(op.split()[0], feeds, constants, ["y"], opset), feeds)


@settings(max_examples=20)
@given(opset=OPSETS, op=st.sampled_from(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"]),
       bias=st.booleans(), beta=st.booleans(), total=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_skip_normalization(opset, op, bias, beta, total, seed):
    centred = op == "SkipLayerNormalization"
    feeds = {"x": _normal(seed, 2, 3, 16), "skip": _normal(seed + 1, 2, 3, 16)}
    constants = {"gamma": _normal(seed + 2, 16)}
    left_out = []
    if centred and beta:
        constants["beta"] = _normal(seed + 3, 16)
    elif centred and bias:
        left_out = [3]
    if bias:
        constants["bias"] = _normal(seed + 4, 16)
    outputs = ["y", "", "", "total"] if total else ["y"]
    made = _model(op, feeds, constants, outputs, opset, left_out, epsilon=1e-5)
    _same(made, feeds)


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_embeddings(segments, positions):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (2, 5)).astype(np.int32)
    proto = _model("EmbedLayerNormalization", {"ids": ids}, {}, ["y", "count"], epsilon=1e-5)
    node, graph = proto.graph.node[0], proto.graph
    del node.input[1:]
    tables = {"words": (20, 8), "places": (9, 8), "kinds": (2, 8), "gamma": (8,), "beta": (8,)}
    graph.initializer.extend(numpy_helper.from_array(_normal(i, *s), n) for i, (n, s) in enumerate(tables.items()))
    feeds = {"ids": ids}
    if segments:
        feeds["kind"] = rng.integers(0, 2, (2, 5)).astype(np.int32)
        graph.input.append(helper.make_tensor_value_info("kind", T.INT32, ["B", 5]))
    node.input.extend(["kind" if segments else "", "words", "places", "kinds" if segments else "", "gamma", "beta"])
    if positions:
        feeds["place"] = rng.integers(0, 9, (2, 5)).astype(np.int32)
        graph.input.append(helper.make_tensor_value_info("place", T.INT32, ["B", 5]))
        node.input.extend(["", "place"])
    del graph.output[1:]
    _same(proto, feeds)


@settings(max_examples=20)
@given(turned=st.tuples(st.booleans(), st.booleans()), alpha=st.sampled_from([1.0, 0.125]), opset=OPSETS)
def test_fused_matmul(turned, alpha, opset):
    a, b = _normal(0, 2, 3, 4), _normal(1, 2, 4, 5)
    feeds = {"a": np.swapaxes(a, 1, 2).copy() if turned[0] else a, "b": np.swapaxes(b, 1, 2).copy() if turned[1] else b}
    made = _model("FusedMatMul", feeds, {}, ["y"], opset, transA=int(turned[0]), transB=int(turned[1]), alpha=alpha)
    _same(made, feeds)


@pytest.mark.parametrize(
    ("name", "numbers"), [("Relu", []), ("LeakyRelu", [0.1]), ("Clip", [0.0, 0.5]), ("HardSigmoid", [0.2, 0.4])]
)
@pytest.mark.parametrize("added", [True, False])
def test_fused_conv(name, numbers, added):
    feeds = {"x": _normal(0, 1, 4, 6, 6)}
    constants = {"w": _normal(1, 8, 4, 3, 3), "b": _normal(2, 8)}
    proto = _model("FusedConv", feeds, constants, ["y"], 17, rank=4, activation=name, pads=[1, 1, 1, 1])
    if numbers:
        proto.graph.node[0].attribute.append(helper.make_attribute("activation_params", numbers))
    del proto.graph.input[:]
    proto.graph.input.append(helper.make_tensor_value_info("x", T.FLOAT, [1, 4, 6, 6]))
    if added:
        feeds["z"] = _normal(3, 1, 8, 6, 6)
        proto.graph.input.append(helper.make_tensor_value_info("z", T.FLOAT, [1, 8, 6, 6]))
        proto.graph.node[0].input.append("z")
    assert _same(proto, feeds)[-1] == name


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_bytes(bias):
    rng = np.random.default_rng(0)
    feeds = {"a": _normal(0, 2, 3, 16)}
    constants = {
        "b": rng.integers(0, 255, (16, 6)).astype(np.uint8), "scale": np.float32(0.02), "zero": np.uint8(120)
    }  # fmt: skip
    constants |= {"bias": _normal(1, 6)} if bias else {}
    _same(_model("DynamicQuantizeMatMul", feeds, constants, ["y"]), feeds)


@settings(max_examples=25)
@given(opset=st.sampled_from([11, 13, 17]), mask=st.sampled_from(["none", "rows", "tables"]), causal=st.booleans(),
       seed=st.integers(0, 99), scale=st.sampled_from([0.0, 0.3]))  # fmt: skip
def test_attention(opset, mask, causal, seed, scale):
    """With a bias: without one ONNX Runtime 1.31 crashes."""
    batch, steps, width, heads = 2, 5, 12, 3
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {"x": _normal(seed, batch, steps, width)}
    constants = {"w": _normal(1, width, 3 * width) / 3, "b": _normal(2, 3 * width)}
    proto = _model("Attention", feeds, constants, ["y"], opset, num_heads=heads, unidirectional=int(causal))
    if scale:
        proto.graph.node[0].attribute.append(helper.make_attribute("scale", scale))
    if mask != "none":
        shape = (batch, steps) if mask == "rows" else (batch, steps, steps)
        told = rng.integers(0, 2, shape).astype(np.int32)
        told[..., 0] = 1
        feeds["m"] = told
        proto.graph.node[0].input.append("m")
        proto.graph.input.append(helper.make_tensor_value_info("m", T.INT32, ["B", *["S"] * (len(shape) - 1)]))
    _same(proto, feeds)


@settings(max_examples=20)
@given(bias=st.booleans(), mask=st.booleans(), added=st.booleans(), cross=st.booleans(), seed=st.integers(0, 99))
def test_multi_head_attention(bias, mask, added, cross, seed):
    batch, queries, keys, width, heads = 2, 4, 6 if cross else 4, 12, 2
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {"q": _normal(seed, batch, queries, width)} | {
        n: _normal(seed + i, batch, keys, width) for i, n in enumerate("kv", 1)
    }
    proto = _model("MultiHeadAttention", feeds, {}, ["y"], num_heads=heads)
    graph, node = proto.graph, proto.graph.node[0]
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(n, T.FLOAT, a.shape) for n, a in feeds.items())
    if bias:
        graph.initializer.append(numpy_helper.from_array(_normal(9, 3 * width), "b"))
    if mask:
        feeds["m"] = rng.integers(0, 2, (batch, keys)).astype(np.int32)
        feeds["m"][:, 0] = 1
        graph.input.append(helper.make_tensor_value_info("m", T.INT32, [batch, keys]))
    if added:
        feeds["a"] = _normal(7, batch, heads, queries, keys)
        graph.input.append(helper.make_tensor_value_info("a", T.FLOAT, feeds["a"].shape))
    node.input.extend(["b" if bias else "", "m" if mask else "", "a" if added else ""])
    _same(proto, feeds)


def test_what_is_not_written_out_is_named():
    feeds = {"x": _normal(0, 2, 3, 8)}
    proto = _model("Attention", feeds, {"w": _normal(1, 8, 24), "b": _normal(2, 24)}, ["y", "cache"], num_heads=2)
    result = StandardOperators().run(models.from_proto(proto), Context())
    assert (result.applied, [s.node for s in result.skipped]) == (0, ["it"])
    assert "cache" in result.skipped[0].reason
    assert [n.op_type for n in result.model.graph] == ["Attention"]
    other = _model("BiasSplitGelu", {"x": _normal(0, 2, 3, 8)}, {"b": _normal(1, 8)}, ["y"])
    (skip,) = StandardOperators().run(models.from_proto(other), Context()).skipped
    assert "not among those that are written out" in skip.reason
