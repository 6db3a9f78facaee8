"""low-rank-split on layers of every kind: exact at full rank, best possible below it, refusals, determinism."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.errors import PassError, SpecError
from graphopt.inspection import inspect
from graphopt.passes.base import Context, Fidelity
from graphopt.passes.low_rank.metric import DAMPING
from graphopt.passes.low_rank_split import LowRankSplit
from graphopt.pipeline import Pipeline
from graphopt.spec import bind, parse
from tests.passes import oracle
from tests.passes.low_rank import array_of, build, nodes, outputs, random_data, split, tolerance

WHOLE = "100000"
ANY = {"min_saving": 1e-9, "block": 1}


@st.composite
def convolutions(draw, axes: int = 2):
    """A model of one Conv of any geometry, and the shape of its input."""
    group = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outs = draw(st.integers(1, 5)) * group, draw(st.integers(1, 5)) * group
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    strides = [draw(st.integers(1, 2)) for _ in range(axes)]
    dilations = [draw(st.integers(1, 2)) for _ in range(axes)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [draw(st.integers(r, r + 4)) for r in reach]
    attributes = f"group={group}, strides={strides}, dilations={dilations}"
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "NOTSET":
        attributes += f", pads={[draw(st.integers(0, 2)) for _ in range(2 * axes)]}"
    else:
        assume(auto == "VALID" or dilations == [1] * axes)  # ONNX Runtime takes no dilation with SAME
        attributes += f', auto_pad="{auto}"'
    bias = draw(st.booleans())
    shapes: dict[str, Any] = {"w": (outs, inputs // group, *kernel)} | ({"b": (outs,)} if bias else {})
    unknown = ",".join("HWD"[:axes])
    text = (
        f"(float[N,{inputs},{','.join(map(str, size))}] x) => (float[N,{outs},{unknown}] y) "
        f"{{ y = Conv<{attributes}>(x, w{', b' if bias else ''}) }}"
    )
    return build(text, seed=draw(st.integers(0, 2**30)), **shapes)


def feeds_of(model: ir.Model, seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    (spec,) = models.signature(model).inputs
    shape = tuple(d if isinstance(d, int) else batch for d in spec.shape)
    return oracle.random_feeds(model, {spec.name: shape}, seed)


def same_numbers(before: ir.Model, after: ir.Model, seed: int) -> None:
    feeds = feeds_of(before, seed)
    wanted, got = oracle.run(before, feeds)[0], oracle.run(after, feeds)[0]
    assert wanted.shape == got.shape
    assert np.abs(wanted.astype(np.float64) - got).max() <= tolerance(before, after, feeds)


@given(convolutions(), st.sampled_from(["svd", "spatial", "tucker2", "cp"]), st.booleans(), st.integers(0, 2**30))
@settings(max_examples=120)
def test_a_convolution_at_full_rank_is_the_same_layer(model, method, with_data, seed):
    rank = f"{WHOLE}x{WHOLE}" if method == "tucker2" else WHOLE
    data = random_data(model, 8, seed) if with_data else None
    result = split(model, data, method=method, ranks=(f"conv_0:{rank}",), **ANY)
    kernel = array_of(nodes(model)["conv_0"].inputs[1]).shape[2:]
    has_form = {"svd": True, "spatial": min(kernel) > 1}.get(method, max(kernel) > 1)
    assert result.applied == has_form, result.skipped
    if has_form:
        assert len(nodes(result.model, "Conv")) == {"svd": 2, "spatial": 2, "tucker2": 3}.get(
            method, 2 + sum(k > 1 for k in kernel)
        )
        same_numbers(model, result.model, seed)


@given(convolutions(axes=1) | convolutions(axes=3), st.sampled_from(["svd", "tucker2", "cp"]), st.integers(0, 2**30))
@settings(max_examples=40)
def test_one_and_three_dimensional_convolutions_have_forms_too(model, method, seed):
    rank = f"{WHOLE}x{WHOLE}" if method == "tucker2" else WHOLE
    result = split(model, random_data(model, 4, seed), method=method, ranks=(f"conv_0:{rank}",), **ANY)
    if result.applied:
        same_numbers(model, result.model, seed)
    else:
        assert "kernel larger than 1x1" in result.skipped[0].reason


PRODUCTS = {
    "gemm": ("y = Gemm<alpha=0.5, beta=2.0>(x, w, b)", (7, 9)),
    "gemm, transposed": ("y = Gemm<transB=1, alpha=-1.5>(x, w, b)", (9, 7)),
    "gemm without bias": ("y = Gemm(x, w)", (7, 9)),
    "matmul": ("y = MatMul(x, w)", (7, 9)),
    "matmul and add": ("m = MatMul(x, w) y = Add(b, m)", (7, 9)),
}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_at_full_rank_are_the_same_layer(kind, opset, with_data):
    body, shape = PRODUCTS[kind]
    if opset < 11 and kind == "gemm without bias":
        pytest.skip("a Gemm has a bias before opset 11")
    model = build(f"(float[N,7] x) => (float[N,9] y) {{ {body} }}", seed=3, opset=opset, w=shape, b=(9,))
    name = next(iter(nodes(model, "Gemm", "MatMul")))
    result = split(model, random_data(model, 20) if with_data else None, ranks=(f"{name}:{WHOLE}",), **ANY)
    assert result.applied == 1 and len(nodes(result.model, "Gemm", "MatMul")) == 2
    same_numbers(model, result.model, 5)


def test_a_matmul_of_three_dimensions_and_a_bias_others_read():
    model = build(
        """(float[N,4,6] x) => (float[N,4,8] y, float[N,4,8] z) {
            m = MatMul(x, w)  y = Add(m, b)  n = MatMul(x, v)  z = Add(n, b) }""",
        w=(6, 8), v=(6, 8), b=(8,),
    )  # fmt: skip
    result = split(model, random_data(model, 40), ranks=("matmul_0:3",), **ANY)
    assert result.applied == 1
    feeds = feeds_of(model, 1)
    (_, wanted), (_, got) = oracle.run(model, feeds), oracle.run(result.model, feeds)
    np.testing.assert_array_equal(wanted, got)  # the layer that shares the bias keeps it


@given(
    st.sampled_from(["svd", "spatial", "tucker2", "cp"]),
    st.integers(1, 2),
    st.sampled_from(["pads=[1,1,1,1]", "strides=[2,1]", 'auto_pad="SAME_UPPER", strides=[2,2]']),
)
@settings(max_examples=20)
def test_macs_saved_are_those_that_inspection_counts(method, group, attributes):
    model = build(
        f"(float[1,16,12,10] x) => (float[1,M,H,W] y) {{ y = Conv<group={group}, {attributes}>(x, w) }}",
        w=(24, 16 // group, 3, 3),
    )
    result = split(model, method=method, ratio=0.5, block=1)
    before, after = inspect(model).macs, inspect(result.model).macs
    assert result.applied == 1 and before is not None and after is not None and after <= 0.5 * before
    blocked = split(model, method=method, ratio=0.5, block=4 * group)
    if blocked.applied:
        inner = [array_of(n.inputs[1]).shape[0] for n in nodes(blocked.model, "Conv").values()][:-1]
        assert all(channels % (4 * group) == 0 for channels in inner), inner


@given(st.integers(1, 8), st.integers(0, 2**30))
@settings(max_examples=30)
def test_what_svd_loses_is_the_energy_of_the_singular_values_left_out(rank, seed):
    model = build("(float[N,11] x) => (float[N,9] y) { y = MatMul(x, w) }", seed=seed, w=(11, 9))
    result = split(model, ranks=(f"matmul_0:{rank}",), fit="weights", **ANY)
    weights = array_of(model.graph.initializers["w"]).astype(np.float64)
    first, second = (array_of(n.inputs[1]).astype(np.float64) for n in nodes(result.model, "MatMul").values())
    lost = np.square(np.linalg.svd(weights, compute_uv=False)[rank:]).sum()
    # Rounded to float32, the factors' product is off by u |first| |second| an element.
    rounding = 2 * np.finfo(np.float32).eps * np.linalg.norm(np.abs(first) @ np.abs(second))
    assert abs(np.linalg.norm(weights - first @ second) - np.sqrt(lost)) <= rounding


def correlated(model: ir.Model, count: int, seed: int):
    """Data whose channels are correlated, with a mean and some next to constant."""
    from graphopt.calibration.dataset import Dataset, _Arrays

    signature = models.signature(model)
    (spec,) = signature.inputs
    rng = np.random.default_rng(seed)
    inner = tuple(d for d in spec.shape[1:] if isinstance(d, int))
    x = rng.standard_normal((count, *inner))
    mixing = rng.standard_normal((inner[0], inner[0])) * np.logspace(0, -3, inner[0])
    x = np.einsum("nc...,cd->nd...", x, mixing) + rng.standard_normal((inner[0], *(1,) * (len(inner) - 1)))
    return Dataset(_Arrays({spec.name: x.astype(np.float32)}), signature, source="correlated")


@given(st.integers(1, 8), st.integers(0, 2**30))
@settings(max_examples=30)
def test_svd_on_data_has_the_least_error_that_a_rank_can_have(rank, seed):
    model = build("(float[N,11] x) => (float[N,9] y) { y = Gemm(x, w, b) }", seed=seed, w=(11, 9), b=(9,))
    data = correlated(model, 300, seed)
    wanted = outputs(model, data)
    x = np.concatenate([feeds["x"] for feeds in data.batches(64)]).astype(np.float64)
    weights = array_of(model.graph.initializers["w"]).astype(np.float64)
    covariance = np.cov(x.T, bias=True)
    # No layer of this rank and no bias leave less: the eigenvalues left out of the outputs' covariance.
    least = np.linalg.eigvalsh(weights.T @ covariance @ weights)[: 9 - rank].clip(0).sum()
    error, moved, plain = {}, 0.0, None
    for fit in ("outputs", "weights"):
        after = split(model, data, ranks=(f"gemm_0:{rank}",), fit=fit, **ANY).model
        difference = outputs(after, data) - wanted
        error[fit] = float(np.square(difference).mean(axis=0).sum())
        if fit == "weights":
            first, second = (array_of(n.inputs[1]).astype(np.float64) for n in nodes(after, "Gemm").values())
            moved = float(np.square(weights - first @ second).sum())
        else:
            plain = after
    assert plain is not None
    noise = 9 * tolerance(model, plain, {"x": x.astype(np.float32)}) ** 2
    slack = noise + 2 * np.sqrt(noise * max(error["outputs"], least))
    assert error["outputs"] >= least - slack
    # What is least is the error with the damping added: the other fit may win by no more than its own damping.
    damping = DAMPING * np.trace(covariance) / 11 * moved
    assert error["outputs"] <= error["weights"] + damping + slack


@given(st.sampled_from(["svd", "spatial", "tucker2"]), st.integers(1, 2), st.integers(0, 2**30))
@settings(max_examples=25)
def test_a_convolution_fitted_to_outputs_has_less_error_than_one_fitted_to_weights(method, group, seed):
    model = build(
        f"(float[N,6,5,5] x) => (float[N,8,H,W] y) {{ y = Conv<group={group}, pads=[1,0,1,1]>(x, w, b) }}",
        seed=seed, w=(8, 6 // group, 3, 3), b=(8,),
    )  # fmt: skip
    data = correlated(model, 64, seed)
    wanted = outputs(model, data)
    rank = "2x2" if method == "tucker2" else "2"
    error = {}
    for fit in ("outputs", "weights"):
        after = split(model, data, method=method, ranks=(f"conv_0:{rank}",), fit=fit, **ANY).model
        difference = outputs(after, data) - wanted
        error[fit] = float(np.square(difference).mean(axis=(0, 2, 3)).sum())
        if fit == "outputs":
            left = np.abs(difference.mean(axis=(0, 2, 3))).max()
            feeds = next(data.batches(64))
            assert left <= tolerance(model, after, feeds), "the bias takes back the mean"
    # The error with damping is what a fit lowers, from a start no worse than the other fit.
    x = next(data.batches(64))["x"].astype(np.float64)
    weights = array_of(model.graph.initializers["w"]).astype(np.float64)
    damping = DAMPING * x.var(axis=(0, 2, 3)).mean() * np.square(weights).sum()
    assert error["outputs"] <= error["weights"] * (1 + 1e-6) + 2 * damping


def test_energy_is_kept_and_more_of_it_costs_more():
    model = build("(float[N,24,6,6] x) => (float[N,32,6,6] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", w=(32, 24, 3, 3))
    data = correlated(model, 64, 1)
    wanted = outputs(model, data)
    costs = []
    for energy in (0.8, 0.9, 0.97):
        result = split(model, data, energy=energy, block=1, min_saving=1.01)
        assert result.applied == 1
        lost = (
            np.square(outputs(result.model, data) - wanted).sum()
            / np.square(wanted - wanted.mean(axis=(0, 2, 3), keepdims=True)).sum()
        )
        assert lost <= 1.05 * (1 - energy) + DAMPING
        costs.append(inspect(models.fix_inputs(result.model, {"x": (1, 24, 6, 6)})).macs)
    assert costs[0] < costs[1] < costs[2]


CHAIN = """(float[N,16,12,12] x) => (float[N,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1], strides=[2,2]>(r, w2, b2)
    k = Relu(c)  p = Conv(k, w3)  g = GlobalAveragePool(p)  f = Flatten(g)  y = Gemm<transB=1>(f, w4, b4)
}"""
CHAIN_SHAPES = {
    "w1": (32, 16, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,), "w3": (64, 32, 1, 1), "w4": (10, 64),
    "b4": (10,),
}  # fmt: skip


def chain() -> ir.Model:
    return build(CHAIN, **CHAIN_SHAPES)


def test_names_activations_and_the_way_to_leave_a_layer_whole():
    data = random_data(chain(), 16)
    all_ = split(chain(), data, ratio=0.5, block=4, portions=1, method="svd")
    assert set(nodes(all_.model, "Conv")) == {f"conv_{i}_split{n}" for i in (0, 2, 4) for n in (1, 2)}
    relu = nodes(all_.model)["relu_1"]
    assert relu.inputs[0] is not None and relu.inputs[0].name == "a"
    some = split(chain(), data, ratio=0.5, block=4, portions=1, method="svd", exclude=("conv_0", "conv_2_split1"))
    assert {s.node: s.reason for s in some.skipped}["conv_0"] == "excluded by name"
    assert "conv_0" in nodes(some.model)
    # Others are split as before, byte for byte, whether they were already known or not.
    fresh = split(chain(), random_data(chain(), 16), ratio=0.5, block=4, portions=1, method="svd", exclude=("conv_0",))
    for other in (some, fresh):
        for name in ("w2_split1", "w2_split2", "w2_split_bias", "w3_split1"):
            kept, again = (array_of(m.graph.initializers[name]) for m in (all_.model, other.model))
            np.testing.assert_array_equal(kept, again)


def test_what_is_refused_is_said():
    model = build(
        """(float[N,32,8,8] x, float[32,32,1,1] v) => (float[N,32,17,17] y, float[N,32,8,8] z, float[N,8,8,8] q) {
            y = ConvTranspose<strides=[2,2]>(x, w1)  a = Conv(x, v)  z = Conv<group=32>(a, w2)  q = Conv(x, w3) }""",
        w1=(32, 32, 3, 3), w2=(32, 1, 1, 1), w3=(8, 32, 1, 1),
    )  # fmt: skip
    reasons = {s.node: s.reason for s in split(model).skipped}
    assert reasons["convtranspose_0"] == "ConvTranspose is not split"
    assert reasons["conv_1"] == "its weights are not constant"
    assert "less arithmetic" in reasons["conv_2"] and "multiple of 16 channels" in reasons["conv_3"]
    assert "row and column" in {s.node: s.reason for s in split(model, method="spatial").skipped}["conv_3"]
    noise = split(chain(), energy=0.999, block=4).skipped
    assert {s.reason for s in noise if s.node == "conv_2"} == {
        "no rank that saves enough arithmetic keeps 0.999 of its energy"
    }
    bad = chain()
    array = array_of(bad.graph.initializers["w1"]).copy()
    array[0, 0, 0, 0] = np.inf
    bad.graph.initializers["w1"].const_value = ir.Tensor(array, name="w1")
    assert {s.node: s.reason for s in split(bad).skipped}["conv_0"] == "its weights hold NaN or infinity"
    wrong: tuple[tuple[dict, str], ...] = (
        ({"exclude": ("conv0",)}, "did you mean 'conv_0'"),
        ({"ranks": ("cnv_2:4",)}, "did you mean 'conv_2'"),
        ({"fit": "outputs"}, "needs calibration data"),
    )
    for options, message in wrong:
        with pytest.raises(PassError, match=message):
            LowRankSplit(**options).run(chain(), Context())
    few = split(chain(), ranks=("conv_0:30", "conv_2:4x4", "conv_4:4x4"))
    assert few.applied == 1 and {s.node for s in few.skipped} == {"conv_0", "conv_4"}


def test_weights_that_a_caller_may_override_are_left_alone():
    model = chain()
    model.graph.inputs.append(model.graph.initializers["w1"])  # its own default
    result = LowRankSplit(ratio=0.5).run(model, Context())
    assert {s.node: s.reason for s in result.skipped}["conv_0"] == "its weights are not constant"


def test_inputs_that_never_vary_and_weights_of_zero():
    model = chain()
    zero = np.zeros((32, 32, 3, 3), np.float32)
    model.graph.initializers["w2"].const_value = ir.Tensor(zero, name="w2")
    result = split(model, random_data(model, 8), ratio=0.5, block=4)
    reasons = {s.node: s.reason for s in result.skipped}
    assert reasons["conv_2"] == "its weights are zero, or its inputs never vary"
    feeds = feeds_of(model, 3)
    assert np.isfinite(oracle.run(result.model, feeds)[0]).all()


@pytest.mark.parametrize("method", ["auto", "svd", "spatial", "tucker2", "cp"])
def test_the_same_input_gives_the_same_bytes(method):
    first, second = (
        models.to_bytes(split(chain(), random_data(chain(), 12), method=method, energy=0.7).model) for _ in range(2)
    )
    assert first == second


def test_quantization_may_follow():
    data = random_data(chain(), 32)
    pipeline = Pipeline.parse("low-rank-split{ratio=0.5,block=4},quantize-int8")
    result, records = pipeline.run(chain(), Context(data=data))
    assert records[0].applied == 4
    assert records[1].applied == len(nodes(result, "Conv", "Gemm")) >= 8
    models.check(result, "both")


def test_options_come_from_the_grammar():
    text = 'low-rank-split{method=tucker2,fit=weights,ratio=0.5,ranks=[a:4,"/b/Conv:8x16"],block=8,exclude=[c]}'
    each = bind(parse(text), LowRankSplit, "pass")
    assert each == LowRankSplit(
        method="tucker2", fit="weights", ratio=0.5, ranks=("a:4", "/b/Conv:8x16"), block=8, exclude=("c",)
    )
    assert each.fidelity is Fidelity.LOSSY and each.name == "low-rank-split"
    assert bind(parse(str(each)), LowRankSplit, "pass") == each
    for wrong in (
        "energy=1.5",
        "ratio=0",
        "block=0",
        "portions=0",
        "min_saving=0",
        "ranks=[a]",
        "ranks=[a:0]",
        "ranks=[a:1x2x3]",
    ):
        with pytest.raises(SpecError):
            bind(parse(f"low-rank-split{{{wrong}}}"), LowRankSplit, "pass")


DEEP = """(float[N,8,10,10] x) => (float[N,8,10,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,1,1,1]>(r, w2, b2)  s = Relu(c)
    d = Conv<pads=[1,1,1,1]>(s, w3, b3)  t = Relu(d)  y = Conv<pads=[1,1,1,1]>(t, w4, b4)
}"""
DEEP_SHAPES: dict[str, Any] = {
    name: shape for n in "1234" for name, shape in ((f"w{n}", (8, 8, 3, 3)), (f"b{n}", (8,)))
}


@pytest.mark.parametrize("method", ["svd", "spatial", "tucker2", "cp"])
def test_layers_split_later_make_up_for_the_error_of_earlier_ones(method):
    model = build(DEEP, seed=1, **DEEP_SHAPES)
    data = correlated(model, 200, 2)
    wanted = outputs(model, data)

    def error(portions: int) -> float:
        after = split(model, data, method=method, ratio=0.7, block=1, portions=portions)
        assert after.applied == 4
        return float(np.square(outputs(after.model, data) - wanted).sum())

    assert error(4) < error(1)


def test_a_layer_behind_none_that_is_split_is_fitted_as_if_it_were_alone():
    model = build(DEEP, seed=3, **DEEP_SHAPES)
    data = random_data(model, 24)
    together, alone = (
        split(model, data, ratio=0.7, block=1, portions=portions, method="svd").model for portions in (1, 4)
    )
    for name in ("w1_split1", "w1_split2"):
        kept, again = (array_of(m.graph.initializers[name]) for m in (together, alone))
        np.testing.assert_array_equal(kept, again)
    assert models.to_bytes(together) != models.to_bytes(alone)


def test_fewer_rows_than_taps_do_not_leave_directions_free():
    """A layer fitted on few samples is not much worse on others than one fitted to weights alone."""
    model = build("(float[N,120] x) => (float[N,40] y) { y = Gemm(x, w, b) }", seed=2, w=(120, 40), b=(40,))
    rest = random_data(model, 2000, 1)
    wanted, error = outputs(model, rest), {}
    for fit in ("outputs", "weights"):
        after = split(model, random_data(model, 30), ranks=("gemm_0:16",), fit=fit, **ANY).model
        error[fit] = np.square(outputs(after, rest) - wanted).sum()
    assert error["outputs"] < 1.15 * error["weights"]


@pytest.mark.parametrize("count", [7, 40])
def test_rows_kept_for_all_portions_are_those_drawn_for_each(count, monkeypatch):
    from graphopt.calibration.dataset import Dataset
    from graphopt.passes.low_rank import first_rows

    model = build(DEEP, seed=5, **DEEP_SHAPES)
    wanted = outputs(model, random_data(model, count))
    runs, found = [], []
    batches = Dataset.batches

    def counted(self, size):
        runs.append(size)
        return batches(self, size)

    monkeypatch.setattr(Dataset, "batches", counted)
    for most in (first_rows.MOST_BYTES, 0):
        monkeypatch.setattr(first_rows, "MOST_BYTES", most)
        runs.clear()
        data = random_data(model, count)
        found.append(split(model, data, ratio=0.7, block=1, portions=4, method="svd").model)
        assert len(runs) == (4 if most else 7)  # the model as it was: once, or for each portion
    kept, drawn = (outputs(each, random_data(model, count)) for each in found)
    # Engines may fuse a model otherwise where more of its values are watched: no more than rounding sets them apart.
    assert np.linalg.norm(kept - drawn) < 1e-3 * np.linalg.norm(kept - wanted)
