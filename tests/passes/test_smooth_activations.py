"""smooth-activations: the function stays, ranges move by alpha, and what cannot take the scales is refused in words."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import model as models
from graphopt.calibration import Dataset, collect_statistics, load_dataset, random_dataset
from graphopt.errors import PassError, SpecError
from graphopt.graph import constant_of
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.smooth_activations import SmoothActivations, find_sites, smoothing_scales
from graphopt.pipeline import Pipeline
from graphopt.spec import bind, parse
from tests.passes import oracle
from tests.passes.test_quantize_int8 import array_of, build, snr_db

UNIT = float(np.finfo(np.float32).eps) / 2
EPSILON = 1e-5
SOURCES = ("norm", "norm written out", "rms", "rms written out", "product", "relu", "gated")


def smooth(model: ir.Model, data: Dataset, **options) -> PassResult:
    each = SmoothActivations(**options)
    statistics = collect_statistics(model, each.observes(model), data)
    result = each.run(model.clone(), Context(statistics=statistics))
    models.check(result.model, "smoothed")
    assert models.signature(result.model) == models.signature(model)
    return result


def source_nodes(kind: str, flat: bool) -> list[onnx.NodeProto]:
    """Nodes from `x` to `v`."""
    make = helper.make_node
    if kind == "norm":
        return [make("LayerNormalization", ["x", "gamma", "beta"], ["v"], "norm", epsilon=EPSILON)]
    if kind == "rms":
        return [make("RMSNormalization", ["x", "gamma"], ["v"], "norm", epsilon=EPSILON)]
    if kind in ("norm written out", "rms written out"):
        centred = kind == "norm written out"
        nodes = [make("ReduceMean", ["x"], ["m"], axes=[-1]), make("Sub", ["x", "m"], ["c"])] if centred else []
        c = "c" if centred else "x"
        nodes += [
            make("Mul", [c, c], ["q"]), make("ReduceMean", ["q"], ["n"], axes=[-1]), make("Add", ["n", "eps"], ["e"]),
            make("Sqrt", ["e"], ["s"]), make("Div", [c, "s"], ["d"]),
        ]  # fmt: skip
        if not centred:
            return [*nodes, make("Mul", ["gamma", "d"], ["v"])]
        return [*nodes, make("Mul", ["d", "gamma"], ["g"]), make("Add", ["beta", "g"], ["v"])]
    if flat:
        up = [make("Gemm", ["x", "w0", "beta"], ["p"], "up", alpha=0.5, beta=2.0)]
    else:
        up = [make("MatMul", ["x", "w0"], ["u"], "up"), make("Add", ["u", "beta"], ["p"])]
    if kind == "product":
        return [*up, make("Identity", ["p"], ["v"])]
    if kind == "relu":
        return [*up, make("LeakyRelu", ["p"], ["v"], alpha=0.2)]
    gate = [make("MatMul", ["x", "wg"], ["a"], "gate"), make("Sigmoid", ["a"], ["t"]), make("Mul", ["a", "t"], ["i"])]
    return [*gate, *up, make("Mul", ["i", "p"], ["v"])]


@st.composite
def graphs(draw):
    """A source, one to three products that read it, and the arrays of both."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind, flat = draw(st.sampled_from(SOURCES)), draw(st.booleans())
    inner, features = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    if kind.startswith(("norm", "rms")):
        inner = features
    spread = 10.0 ** rng.uniform(-2, 2, features)
    arrays = {
        "gamma": spread * rng.choice([-1, 1], features), "beta": spread * rng.standard_normal(features),
        "w0": rng.standard_normal((inner, features)) * spread, "wg": rng.standard_normal((inner, features)),
        "eps": np.array(EPSILON),
    }  # fmt: skip
    nodes, outputs = source_nodes(kind, flat), []
    for index in range(draw(st.integers(1, 3))):
        columns, transposed = draw(st.integers(1, 5)), draw(st.booleans())
        weight = rng.standard_normal((features, columns)) * 10.0 ** rng.uniform(-2, 2, (features, 1))
        arrays[f"b{index}"] = rng.standard_normal(columns)
        outputs.append(f"y{index}")
        if flat:
            arrays[f"w{index + 1}"] = weight.T if transposed else weight
            inputs = ["v", f"w{index + 1}", f"b{index}"]
            nodes.append(helper.make_node("Gemm", inputs, [outputs[-1]], f"read{index}", transB=int(transposed)))
        else:
            arrays[f"w{index + 1}"] = weight
            nodes.append(helper.make_node("MatMul", ["v", f"w{index + 1}"], [f"r{index}"], f"read{index}"))
            nodes.append(helper.make_node("Add", [f"r{index}", f"b{index}"], [outputs[-1]]))
    used = {name for node in nodes for name in node.input}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items() if name in used}
    shape = (5, inner) if flat else (2, 3, inner)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = 23 if kind == "rms" else 17
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return kind, flat, ir.from_proto(onnx.shape_inference.infer_shapes(proto)), arrays


def size_of_source(kind: str, flat: bool, x: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Sum of the magnitudes of all that is added up to `v` after the scales come in, in float64."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = x.astype(np.float64)
    if kind.startswith(("norm", "rms")):
        centred = x - x.mean(-1, keepdims=True) if kind.startswith("norm") else x
        normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)
        return np.abs(normal * a["gamma"]) + (np.abs(a["beta"]) if "beta" in a else 0.0)
    size = np.abs(x) @ np.abs(a["w0"]) * (0.5 if flat else 1.0) + np.abs(a["beta"]) * (2.0 if flat else 1.0)
    if kind != "gated":
        return size
    gate = x @ a["wg"]
    return size * np.abs(gate / (1 + np.exp(-gate)))


@settings(max_examples=150, deadline=None)
@given(graphs(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_function_stays(graph, alpha):
    """What comes before the scales is computed alike; behind them every sum errs by its length times u, twice."""
    kind, flat, model, arrays = graph
    data = random_dataset(models.signature(model), 4, 0)
    result = smooth(model, data, alpha=alpha)
    readers = [node for node in model.graph if (node.name or "").startswith("read")]
    assert result.applied == len(readers)
    assert [n.op_type for n in result.model.graph] == [n.op_type for n in model.graph]
    feeds = oracle.random_feeds(model, {}, 5)
    size = size_of_source(kind, flat, feeds["x"], arrays)
    roundings = feeds["x"].shape[-1] + size.shape[-1] + 6 * len(model.graph)
    for index, (wanted, got) in enumerate(zip(oracle.run(model, feeds), oracle.run(result.model, feeds), strict=True)):
        weight = np.abs(arrays[f"w{index + 1}"].astype(np.float64))
        weight = weight.T if weight.shape[0] != size.shape[-1] or _is_transposed(readers[index]) else weight
        bound = 2 * roundings * UNIT * (size @ weight + np.abs(arrays[f"b{index}"]))
        assert (np.abs(wanted.astype(np.float64) - got) <= bound).all()


def _is_transposed(node: ir.Node) -> bool:
    found = node.attributes.get("transB")
    return found is not None and found.as_int() == 1


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_at_one_half_activations_and_weights_end_with_one_range(graph):
    kind, flat, model, arrays = graph
    data = random_dataset(models.signature(model), 8, 1)
    result = smooth(model, data, alpha=0.5)
    ((site,), refused) = find_sites(result.model, ())
    assert set(refused) <= {"up", "gate", "u"}  # what makes the input of a product may be one that reads x
    seen = collect_statistics(result.model, (str(site.value.name),), data)[str(site.value.name)].feature_peak
    assert seen is not None
    weights = site.weight_peaks(result.model)
    size = np.max([size_of_source(kind, flat, f["x"], arrays).reshape(-1, len(seen)) for f in data.batches(1)], (0, 1))
    alive = (seen > 0) & (weights > 0)
    old = collect_statistics(model, (str(site.value.name),), data)[str(site.value.name)].feature_peak
    assert old is not None
    scale = old / np.where(seen > 0, seen, 1)
    slack = 4 * (len(seen) + 40) * UNIT * (size / np.where(alive, scale, 1) + weights)
    assert (np.abs(seen - weights)[alive] <= slack[alive]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_scales_are_those_of_the_paper(seed, alpha):
    rng = np.random.default_rng(seed)
    x, w = 10.0 ** rng.uniform(-2, 2, (2, 6))
    x[0] = w[1] = 0.0
    scales = smoothing_scales(x, w, alpha)
    assert scales[0] == scales[1] == 1.0
    np.testing.assert_allclose(scales[2:], x[2:] ** alpha / w[2:] ** (1 - alpha), rtol=1e-12)


NORM = "v = LayerNormalization(x, gamma, beta)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{NORM}  y = MatMul(v, w)  z = Add(v, x)", "read by Add"),
        (f"{NORM}  y = MatMul(v, w)  z = MatMul(v, x)", "read by MatMul"),
        ("z = LayerNormalization(x, gamma, beta)  y = MatMul(z, w)", "output of the model"),
        ("y = MatMul(x, w)  z = Identity(w)", "input of the model"),
        ("s = Softmax(x)  y = MatMul(s, w)  z = Identity(x)", "Softmax 'softmax_0' before it cannot take the scales"),
        ("c = Identity(gamma)  v = LayerNormalization(x, c)  y = MatMul(v, w)  z = Identity(x)", "not a constant"),
        ("p = MatMul(x, w)  r = Relu(p)  y = MatMul(r, w)  z = Identity(p)", "has other readers"),
        ("p = Mul(x, x)  y = MatMul(p, w)  z = Identity(x)", "has other readers"),
        ("p = Sub(gamma, x)  y = MatMul(p, w)  z = Identity(x)", "cannot take the scales"),
        ("p = Add(x, gamma)  y = MatMul(p, w)  z = Identity(x)", "has other readers"),
        ("a, b = Split<axis=0>(x)  y = MatMul(b, w)  z = Identity(a)", "splits it off"),
    ],
)
def test_what_takes_no_scales_is_left_and_said(text, reason):
    model = build(f"(float[4,4] x) => (float[A,B] y, float[C,D] z) {{ {text} }}", w=(4, 4), gamma=(4,), beta=(4,))
    name = next(str(n.name) for n in model.graph if n.op_type == "MatMul" and n.outputs[0].name == "y")
    each = SmoothActivations()
    statistics = collect_statistics(model, each.observes(model), random_dataset(models.signature(model), 4, 0))
    result = each.run(model.clone(), Context(statistics=statistics))
    assert reason in {s.node: s.reason for s in result.skipped}[name]
    assert reason.startswith("has other") or result.applied == 0


def test_excluded_products_unknown_names_and_missing_statistics():
    model = build(
        f"(float[4,4] x) => (float[A,B] y, float[C,D] z) {{ {NORM}  y = MatMul(v, w)  z = MatMul(v, w) }}",
        w=(4, 4), gamma=(4,), beta=(4,),
    )  # fmt: skip
    data = random_dataset(models.signature(model), 4, 0)
    assert smooth(model, data).applied == 2
    left = smooth(model, data, exclude=("matmul_1",))
    assert left.applied == 0 and [s.node for s in left.skipped] == ["matmul_1", "matmul_2"]
    with pytest.raises(PassError, match="did you mean 'matmul_1'"):
        smooth(model, data, exclude=("matmul1",))
    with pytest.raises(PassError, match="no calibration statistics for value 'v'"):
        SmoothActivations().run(model, Context())


def test_it_helps_where_a_few_features_are_large(tmp_path):
    """Two features a hundred times the others leave those few of the 256 levels; smoothed, all share them."""
    model = build(
        "(float[N,16] x) => (float[N,8] y) { v = LayerNormalization(x, gamma, beta)  y = MatMul(v, w) }",
        w=(16, 8), gamma=(16,), beta=(16,),
    )  # fmt: skip
    gamma = np.ones(16, np.float32)
    gamma[[3, 11]] = 100
    weight = array_of(model.graph.initializers["w"]).copy()
    weight[[3, 11]] /= 100  # as in trained transformers, where large features do not decide alone
    model.graph.initializers["gamma"].const_value = ir.Tensor(gamma, name="gamma")
    model.graph.initializers["w"].const_value = ir.Tensor(weight, name="w")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32))
    context = Context(data=load_dataset(tmp_path / "x.npz", models.signature(model)))
    plain, _ = Pipeline.parse("quantize-int8{outliers=keep}").run(model, context)
    smoothed, _ = Pipeline.parse("smooth-activations,quantize-int8{outliers=keep}").run(model, context)
    assert snr_db(model, smoothed) > snr_db(model, plain) + 10


def test_options_come_from_the_grammar():
    each = bind(parse("smooth-activations{alpha=0.75,exclude=[a]}"), SmoothActivations, "pass")
    assert each == SmoothActivations(alpha=0.75, exclude=("a",)) and each.fidelity is Fidelity.ROUNDING
    with pytest.raises(SpecError, match="alpha must be from 0 to 1"):
        bind(parse("smooth-activations{alpha=2}"), SmoothActivations, "pass")


@pytest.mark.shared
def test_a_trained_decoder_takes_the_scales_of_its_norms_and_gates(shared_model):
    """Five layers: three products behind the first norm, two behind the second, one behind the gate; and the last."""
    model, _ = Pipeline.parse("simplify").run(models.load(shared_model("stories260k")), Context())
    sites, refused = find_sites(model, ())
    assert sum(len(site.products) for site in sites) == 5 * (3 + 2 + 1) + 1
    assert len(refused) == 5 and all("Reshape" in reason for reason in refused.values())
    assert constant_of(sites[0].products[0].inputs[1]) is not None
