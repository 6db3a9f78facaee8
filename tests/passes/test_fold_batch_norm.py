"""`fold-batch-norm` against ONNX Runtime without optimisations, over random shapes, groups, pads and strides."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.simplify import Simplify
from tests.passes.oracle import SHAPES, random_feeds, run

EXAMPLES = settings(max_examples=60, deadline=None)


def build(nodes, inputs, outputs, initializers, opset=17, elem=TensorProto.FLOAT) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, elem, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, elem, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def statistics(rng: np.random.Generator, channels: int, dtype=np.float32) -> dict[str, np.ndarray]:
    """Variance away from zero, so that a = scale / sqrt(var + eps) stays within [-3, 3]."""
    return {
        "s": rng.uniform(-1.5, 1.5, channels).astype(dtype),
        "b": rng.uniform(-1, 1, channels).astype(dtype),
        "m": rng.uniform(-1, 1, channels).astype(dtype),
        "v": rng.uniform(0.25, 4, channels).astype(dtype),
    }


def assert_same(model: ir.Model, folded: ir.Model, reduction: int, dtype=np.float32) -> None:
    """Equal up to rounding.

    Each way of computing makes at most `reduction` + 8 roundings, each relative to a partial sum: a sum of products
    bounded by the largest |x| (5 for the inputs here), |w| (5), and |a| (3), plus |b| + |m a| (4). Twice that bounds
    the difference; rounding the folded weights once more is among the 8.
    """
    feeds = random_feeds(model, {})
    size = max(float(np.abs(f).max()) for f in feeds.values())
    largest = max(float(np.abs(t.numpy()).max()) for v in model.graph.initializers.values() if (t := v.const_value))
    bound = reduction * size * max(largest, 1.0) * 3 + 8
    tolerance = 2 * (reduction + 8) * float(np.finfo(dtype).eps) * bound
    for a, b in zip(run(model, feeds), run(folded, feeds), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance)


def fold(model: ir.Model) -> tuple[ir.Model, int, tuple]:
    result = FoldBatchNorm().run(model.clone(), Context())
    models.check(result.model, "the folded model")
    assert models.signature(result.model) == models.signature(model)
    return result.model, result.applied, result.skipped


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "group": group,
        "inputs": group * draw(st.integers(1, 3)),
        "outputs": group * draw(st.integers(1, 3)),
        "kernel": [draw(st.integers(1, 3)) for _ in range(rank)],
        "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
        "pads": [draw(st.integers(0, 2)) for _ in range(2 * rank)],
        "sizes": [draw(st.integers(6, 9)) for _ in range(rank)],
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def convolution(c: dict, op: str, before: bool) -> tuple[ir.Model, int]:
    rng = np.random.default_rng(c["seed"])
    if op == "Conv":
        weight = (c["outputs"], c["inputs"] // c["group"], *c["kernel"])
    else:
        weight = (c["inputs"], c["outputs"] // c["group"], *c["kernel"])
    initializers = {"w": rng.standard_normal(weight).astype(np.float32)}
    initializers |= statistics(rng, c["inputs" if before else "outputs"])
    if c["bias"]:
        initializers["c"] = rng.standard_normal(c["outputs"]).astype(np.float32)
    pads = c["pads"]
    if op == "ConvTranspose":  # cropping more than the result has is refused by ONNX Runtime
        pads = [min(p, 1) for p in pads]
    keywords = {"group": c["group"], "strides": c["strides"], "dilations": c["dilations"], "pads": pads}
    operands = ["z" if before else "x", "w"] + (["c"] if c["bias"] else [])
    linear = helper.make_node(op, operands, ["y" if before else "z"], name="linear", **keywords)
    norm = helper.make_node(
        "BatchNormalization", ["x" if before else "z", "s", "b", "m", "v"], ["z" if before else "y"], name="norm"
    )
    nodes = [norm, linear] if before else [linear, norm]
    model = build(nodes, {"x": (2, c["inputs"], *c["sizes"])}, ["y"], initializers)
    return model, int(np.prod(weight[1:]) if op == "Conv" else weight[0] * np.prod(c["kernel"]))


@EXAMPLES
@given(convolutions(), st.sampled_from(["Conv", "ConvTranspose"]))
def test_after_a_convolution(c, op):
    model, reduction = convolution(c, op, before=False)
    folded, applied, skipped = fold(model)
    assert applied == 1 and not skipped
    assert [n.op_type for n in folded.graph] == [op]
    assert_same(model, folded, reduction)


@EXAMPLES
@given(convolutions(), st.sampled_from(["Conv", "ConvTranspose"]), st.booleans())
def test_before_a_convolution(c, op, without_padding):
    if without_padding:
        c["pads"] = [0] * len(c["pads"])
    model, reduction = convolution(c, op, before=True)
    folded, applied, skipped = fold(model)
    if op == "Conv":
        uniform = not any(c["pads"])
    else:
        pads = [min(p, 1) for p in c["pads"]]
        uniform = not any(pads) and all(k == 1 for k in c["kernel"]) and all(s == 1 for s in c["strides"])
    assert applied == int(uniform)
    assert len(skipped) == int(not uniform)
    assert_same(model, folded, reduction)


@EXAMPLES
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([None, (), (1,), "n", "1n", "m1", "mn"]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_beside_gemm(k, n, trans_b, c_shape, alpha, beta, before, seed):
    rng = np.random.default_rng(seed)
    rows = 3
    shapes = {"n": (n,), "1n": (1, n), "m1": (rows, 1), "mn": (rows, n)}
    shape = shapes.get(c_shape, c_shape) if isinstance(c_shape, str) else c_shape
    initializers = {"w": rng.standard_normal((n, k) if trans_b else (k, n)).astype(np.float32)}
    initializers |= statistics(rng, k if before else n)
    if shape is not None:
        initializers["c"] = rng.standard_normal(shape).astype(np.float32)
    operands = ["z" if before else "x", "w"] + (["c"] if shape is not None else [])
    gemm = helper.make_node(
        "Gemm", operands, ["y" if before else "z"], transB=int(trans_b), alpha=alpha, beta=beta, name="gemm"
    )
    norm = helper.make_node(
        "BatchNormalization", ["x" if before else "z", "s", "b", "m", "v"], ["z" if before else "y"]
    )
    model = build([norm, gemm] if before else [gemm, norm], {"x": (rows, k)}, ["y"], initializers)
    folded, applied, _ = fold(model)
    assert applied == 1
    assert [node.op_type for node in folded.graph] == ["Gemm"]
    assert_same(model, folded, k)


@EXAMPLES
@given(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from([None, (), (1,), "n", "1n"]), st.booleans(), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_beside_matmul(k, n, c_shape, swapped, before, seed):
    rng = np.random.default_rng(seed)
    shape = {"n": (n,), "1n": (1, n)}.get(c_shape, c_shape) if isinstance(c_shape, str) else c_shape
    initializers = {"w": rng.standard_normal((k, n)).astype(np.float32)} | statistics(rng, k if before else n)
    if shape is not None:
        initializers["c"] = rng.standard_normal(shape).astype(np.float32)
    last = "y" if before else "q"
    product = helper.make_node("MatMul", ["z" if before else "x", "w"], [last if shape is None else "p"])
    nodes = [product]
    if shape is not None:
        nodes.append(helper.make_node("Add", ["c", "p"] if swapped else ["p", "c"], [last]))
    norm = helper.make_node(
        "BatchNormalization", ["x" if before else "q", "s", "b", "m", "v"], ["z" if before else "y"]
    )
    model = build([norm, *nodes] if before else [*nodes, norm], {"x": (3, k)}, ["y"], initializers)
    folded, applied, _ = fold(model)
    assert applied == 1
    assert "BatchNormalization" not in [node.op_type for node in folded.graph]
    assert_same(model, folded, k)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_float_types_keep_their_type(dtype):
    rng = np.random.default_rng(1)
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    initializers = {"w": rng.standard_normal((4, 3)).astype(dtype)} | statistics(rng, 4, dtype)
    gemm = helper.make_node("Gemm", ["x", "w"], ["z"], transB=1)
    norm = helper.make_node("BatchNormalization", ["z", "s", "b", "m", "v"], ["y"])
    model = build([gemm, norm], {"x": (2, 3)}, ["y"], initializers, elem=elem)
    folded, applied, _ = fold(model)
    assert applied == 1
    assert {v.const_value.numpy().dtype for v in folded.graph.initializers.values() if v.const_value} == {
        np.dtype(dtype)
    }
    assert_same(model, folded, 3, dtype)


def test_float16_overflow_is_refused():
    initializers = {
        "w": np.full((1, 1), 60000, np.float16),
        "s": np.full(1, 60000, np.float16),
        "b": np.zeros(1, np.float16),
        "m": np.zeros(1, np.float16),
        "v": np.ones(1, np.float16),
    }
    gemm = helper.make_node("Gemm", ["x", "w"], ["z"])
    norm = helper.make_node("BatchNormalization", ["z", "s", "b", "m", "v"], ["y"])
    model = build([gemm, norm], {"x": (1, 1)}, ["y"], initializers, elem=TensorProto.FLOAT16)
    _, applied, skipped = fold(model)
    assert applied == 0
    assert "not finite in FLOAT16" in skipped[0].reason


def test_two_in_a_row_and_one_on_each_side():
    rng = np.random.default_rng(2)
    initializers = {"w": rng.standard_normal((3, 2, 3, 3)).astype(np.float32)}
    for prefix, channels in (("p", 2), ("q", 3), ("r", 3)):
        initializers |= {prefix + k: a for k, a in statistics(rng, channels).items()}

    def norm(source, prefix, target):
        return helper.make_node("BatchNormalization", [source, *(prefix + k for k in "sbmv")], [target])

    nodes = [norm("x", "p", "t"), helper.make_node("Conv", ["t", "w"], ["u"]), norm("u", "q", "v"), norm("v", "r", "y")]
    model = build(nodes, {"x": (1, 2, 5, 5)}, ["y"], initializers)
    folded, applied, skipped = fold(model)
    assert applied == 3 and not skipped
    assert_same(model, folded, 9 * 18)


def test_weights_open_to_a_caller_are_left_until_simplify_has_run():
    rng = np.random.default_rng(3)
    initializers = {"w": rng.standard_normal((2, 2)).astype(np.float32)} | statistics(rng, 2)
    gemm, norm = (
        helper.make_node("Gemm", ["x", "w"], ["z"]),
        helper.make_node("BatchNormalization", ["z", "s", "b", "m", "v"], ["y"]),
    )
    model = build([gemm, norm], {"x": (1, 2), "w": (2, 2), **dict.fromkeys("sbmv", (2,))}, ["y"], initializers)
    _, applied, skipped = fold(model)
    assert applied == 0
    assert "run simplify first" in skipped[0].reason
    simplified = Simplify(use_onnxsim=False).run(model.clone(), Context()).model
    assert FoldBatchNorm().run(simplified, Context()).applied == 1


def test_quantized_weights_are_left():
    rng = np.random.default_rng(4)
    initializers = {"w": np.ones((2, 2), np.int8), "one": np.float32(1)} | statistics(rng, 2)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "one"], ["wf"]),
        helper.make_node("Gemm", ["x", "wf"], ["z"]),
        helper.make_node("BatchNormalization", ["z", "s", "b", "m", "v"], ["y"]),
    ]
    _, applied, skipped = fold(build(nodes, {"x": (1, 2)}, ["y"], initializers))
    assert applied == 0
    assert "weights" in skipped[0].reason and "not constant" in skipped[0].reason


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "norms", "nodes"),
    [
        ("mobilenetv1_075", 27, 58),
        ("tiny_darknet", 15, 38),
        ("resnet20_cifar10", 19, 54),
        ("resnet56_cifar10", 55, 144),
        ("ultraface_rfb320", 35, 123),
        ("gtcrn", 11, 361),
    ],
)
def test_every_batch_norm_of_the_shared_models_folds(shared_model, name, norms, nodes):
    original = models.load(shared_model(name))
    simplified = Simplify(use_onnxsim=False).run(original.clone(), Context()).model
    result = FoldBatchNorm().run(simplified, Context())
    assert result.applied == norms and not result.skipped
    assert len(result.model.graph) <= nodes
    models.check(result.model, name)
    assert models.signature(result.model) == models.signature(original)
    feeds = random_feeds(original, SHAPES[name])
    for a, b in zip(run(original, feeds), run(result.model, feeds), strict=True):
        # Through L layers of sums the relative error grows like L * eps * sqrt(reduction): 60 * 1.2e-7 * 30 = 2e-4.
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-4 * max(1.0, float(np.abs(a).max())))
