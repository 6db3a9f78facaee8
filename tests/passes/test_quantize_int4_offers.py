"""quantize-int4 for some layers: offers, the option that takes them, and quantize-int8 for the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.errors import PassError
from graphopt.graph import label
from graphopt.passes.base import Context
from graphopt.passes.quantize_int4 import QuantizeInt4
from graphopt.pipeline import Pipeline
from tests.passes import oracle
from tests.passes.test_quantize_int4 import quantize, samples
from tests.passes.test_quantize_int8 import build, engine_operators, quantizers, snr_db

NETWORK = """(float[N,3,8,8] x) => (float[N,12] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(a)  f = Flatten(r)  g = Gemm<transB=1, alpha=0.5>(f, w2, b2)
    h = Relu(g)  m = MatMul(h, w3)  n = Add(m, b3)  o = Gemm(n, w4)  p = Relu(o)  q = MatMul(p, w5)
    s = MatMul(q, w5)  y = Gemm(s, w6, b6)
}"""
SHAPES = {
    "w1": (4, 3, 3, 3), "b1": (4,), "w2": (40, 256), "b2": (40,), "w3": (40, 48), "b3": (48,), "w4": (48, 32),
    "w5": (32, 32), "w6": (32, 12), "b6": (12,),
}  # fmt: skip
PRODUCTS = ("gemm_3", "matmul_5", "gemm_7", "matmul_9", "gemm_11")
"""matmul_10 shares the weights of matmul_9."""


@given(
    st.booleans(), st.sampled_from(["auto", "qdq", "matmulnbits"]), st.sampled_from(["nearest", "hqq", "gptq"]),
    st.sampled_from([16, 64]), st.booleans(), st.integers(0, 2**30), st.randoms(),
)  # fmt: skip
@settings(max_examples=20)
def test_an_offer_is_what_the_pass_makes_of_it(with_data, form, method, block, symmetric, seed, pick):
    model = build(NETWORK, seed, **SHAPES)
    data = samples(model, 8, seed) if with_data else None
    options = {"form": form, "method": method, "block": block, "symmetric": symmetric}
    before = models.digest(model)
    offers = list(QuantizeInt4(**options).offers(model, Context(data=data)))
    assert [(offer.site, offer.value) for offer in offers] == [(name, name) for name in (*PRODUCTS, "conv_0")]
    assert [offer.nodes for offer in offers if len(offer.nodes) > 1] == [("matmul_9", "matmul_10")]
    for offer in pick.sample(offers, 2):
        built = offer.build()
        models.check(built, "offer")
        assert models.signature(built) == models.signature(model)
        again = quantize(model, data, layers=(offer.value,), **options)
        assert again.applied == 1 and not again.skipped
        assert models.to_bytes(built) == models.to_bytes(again.model)
    assert models.digest(model) == before


def test_several_layers_are_stored_as_each_by_itself(monkeypatch):
    model = build(NETWORK, 3, **SHAPES)
    data = samples(model, 16)
    offers = {offer.site: offer for offer in QuantizeInt4().offers(model, Context(data=data))}

    def fail(self, size):
        raise AssertionError("only the first that is built needs data")

    offers["gemm_3"].build()
    del offers["conv_0"]
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "batches", fail)
        alone = {site: offer.build().graph for site, offer in offers.items()}
    both = quantize(model, data, layers=("gemm_3", "gemm_7")).model.graph
    for site, own in (("gemm_3", "w2"), ("gemm_7", "w4")):
        for suffix in ("q", "scale", "zero"):
            tensors = [graph.initializers[f"{own}_{suffix}"].const_value for graph in (both, alone[site])]
            first, second = (tensor.tobytes() for tensor in tensors if tensor is not None)
            assert first == second
    assert {n for n in both.initializers if n.startswith("w")} >= {"w1", "w3", "w5", "w6"}


def test_what_is_named_and_what_is_not():
    model = build(NETWORK, 4, **SHAPES)
    conv = quantize(model, layers=("conv_0",), block=16)
    assert conv.applied == 1
    sharer = quantize(model, layers=("matmul_10",))
    assert sharer.applied == 1 and "w5" not in sharer.model.graph.initializers
    left = quantize(model, layers=("gemm_3", "gemm_7"), exclude=("gemm_3",))
    assert left.applied == 1 and [(s.node, s.reason) for s in left.skipped] == [("gemm_3", "excluded by name")]
    assert not any(o.site == "gemm_3" for o in QuantizeInt4(exclude=("gemm_3",)).offers(model, Context()))
    for fails in (lambda p: p.run(model.clone(), Context()), lambda p: list(p.offers(model, Context()))):
        with pytest.raises(PassError, match="did you mean 'gemm_3'"):
            fails(QuantizeInt4(exclude=("gemm3",)))
    with pytest.raises(PassError, match=r"layers names 'gemm3'.*"):
        quantize(model, layers=("gemm3",))
    pipeline = Pipeline.parse("quantize-int4{layers=[a,b]}")
    assert pipeline.passes[0] == QuantizeInt4(layers=("a", "b")) and Pipeline.parse(str(pipeline)) == pipeline
    assert QuantizeInt4.takes == "layers"


@pytest.mark.parametrize("form", ["qdq", "matmulnbits"])
@pytest.mark.parametrize("four", [("matmul_5", "gemm_7"), ("gemm_7", "matmul_9"), ("gemm_3", "gemm_11"), PRODUCTS])
def test_quantize_int8_takes_the_rest(form, four, tmp_path):
    model = build(NETWORK, 5, **SHAPES)
    fixed = models.fix_inputs(model, {"x": (1, 3, 8, 8)})
    data = samples(fixed, 64)
    first = f"quantize-int4{{form={form},layers=[{','.join(four)}]}}"
    alone, _ = Pipeline.parse(first).run(fixed, Context(data=data))
    result, records = Pipeline.parse(f"{first},quantize-int8").run(fixed, Context(data=data))
    shared = "matmul_9" in four
    assert [r.applied for r in records] == [len(four), 7 - len(four) - shared]
    nodes = {label(node): node for node in result.graph}
    for name in four:
        own = nodes[name]
        if form == "matmulnbits":
            assert own.op_type == "MatMulNBits"
        else:
            assert {s.node: s.reason for s in records[1].skipped}[name] == "its weights are quantized already"
        weights = own.inputs[1]
        while weights is not None and weights.producer() is not None:
            weights = weights.producer().inputs[0]  # pyright: ignore[reportOptionalMemberAccess]
        kept = alone.graph.initializers[str(weights.name)].const_value  # pyright: ignore[reportOptionalMemberAccess]
        assert kept is not None and weights is not None and weights.const_value is not None
        assert kept.tobytes() == weights.const_value.tobytes()
    operators = engine_operators(result, tmp_path)
    integer = sum(operators[name] for name in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"))
    assert integer == records[1].applied
    # Which of them the engine computes with in 4 bits is as it was before (with a bias none that are written as qdq).
    assert operators["MatMulNBits"] == engine_operators(alone, tmp_path)["MatMulNBits"]
    assert form == "qdq" or operators["MatMulNBits"] == len(four) + shared
    # Noises of independent roundings add.
    eight, _ = Pipeline.parse("quantize-int8").run(fixed, Context(data=data))
    noise = sum(10 ** (-snr_db(fixed, each) / 10) for each in (alone, eight))
    assert 10 ** (-snr_db(fixed, result) / 10) < 2 * noise


def test_an_input_that_float_arithmetic_makes_stays_float_for_a_layer_in_4_bits():
    model = build(NETWORK, 6, **SHAPES)
    data = samples(model, 16)
    pipeline = "quantize-int4{layers=[gemm_7,matmul_9]},quantize-int8"
    result, _ = Pipeline.parse(pipeline).run(model, Context(data=data))
    assert not {"n", "o", "p", "q"} & set(quantizers(result))
    assert "s" in quantizers(result)  # the last layer's


@pytest.mark.parametrize("activation", ["Relu", "Clip", "Sigmoid"])
@pytest.mark.parametrize("product", ["i = Gemm(x, w, b)", "m = MatMul(x, w) i = Add(m, b)", "i = MatMul(x, w)"])
def test_a_product_with_an_activation_before_float_arithmetic_is_done_in_integers(product, activation, tmp_path):
    bounds = "z = Constant<value_float=0.0>() six = Constant<value_float=2.0>()" if activation == "Clip" else ""
    after = "Clip(i, z, six)" if bounds else f"{activation}(i)"
    text = f"(float[1,32] x) => (float[1,24] y) {{ {bounds} {product} j = {after} y = Sin(j) }}"
    model = build(text, 7, w=(32, 24), b=(24,))
    result, _ = Pipeline.parse("quantize-int8").run(model, Context(data=samples(model, 64)))
    operators = engine_operators(result, tmp_path)
    assert sum(operators[name] for name in ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) == 1, operators
    assert not operators["MatMul"] + operators["Gemm"] + operators["FusedGemm"]
    feeds = oracle.random_feeds(model, {}, 8)
    assert np.isfinite(oracle.run(result, feeds)[0]).all() and snr_db(model, result) > 25


@pytest.mark.parametrize("product", ["h = Gemm(x, w, b)", "m = MatMul(x, w) h = Add(m, b)", "h = MatMul(x, w)"])
@pytest.mark.parametrize("activation", ["Relu", "Identity"])
def test_a_product_in_4_bits_behind_one_in_8_is_one_for_the_engine_too(product, activation, tmp_path):
    model = build(
        f"(float[1,64] x) => (float[1,48] y) {{ {product} j = {activation}(h) k = MatMul(j, v) y = Sin(k) }}",
        9, w=(64, 64), b=(64,), v=(64, 48),
    )  # fmt: skip
    (four,) = [label(node) for node in model.graph if node.outputs[0].name == "k"]
    pipeline = Pipeline.parse(f"quantize-int4{{layers=[{four}],correct_bias=false}},quantize-int8")
    result, records = pipeline.run(model, Context(data=samples(model, 32)))
    assert [r.applied for r in records] == [1, 1]
    operators = engine_operators(result, tmp_path)
    assert operators["MatMulNBits"] == 1
    assert sum(operators[name] for name in ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) == 1, operators
