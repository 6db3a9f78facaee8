"""low-rank-split as a list of offers: each is the very model that the pass makes of it, and makes no use of data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.errors import PassError
from graphopt.inspection import inspect
from graphopt.passes.base import Context, Offer
from graphopt.passes.low_rank.menu import LEVELS
from graphopt.passes.low_rank_split import LowRankSplit
from tests.passes.low_rank import AVX512, array_of, build, nodes, random_data, split

NETWORK = """(float[N,C,9,8] x) => (float[N,10] y) {
    a = Conv<pads=[1,1,1,1], group=G>(x, w1, b1)  r = Relu(a)  c = Conv<pads=[1,0,1,2], strides=[2,1]>(r, w2)
    k = Relu(c)  p = Conv(k, w3, b3)  g = GlobalAveragePool(p)  f = Flatten(g)  h = Gemm<transB=1, alpha=0.5>(f, w4, b4)
    m = MatMul(h, w5)  n = Add(m, b5)  y = MatMul(n, w6)
}"""


@st.composite
def networks(draw):
    group = draw(st.sampled_from([1, 1, 2]))
    inner, wide, deep = (draw(st.integers(2, 7)) * 4 for _ in range(3))
    kernel = (draw(st.sampled_from([1, 3])), draw(st.sampled_from([2, 3])))
    text = NETWORK.replace("C", str(2 * inner), 1).replace("G", str(group), 1)
    return build(
        text, seed=draw(st.integers(0, 2**30)), w1=(inner, 2 * inner // group, 3, 3), b1=(inner,),
        w2=(wide, inner, *kernel), w3=(deep, wide, 1, 1), b3=(deep,), w4=(inner, deep), b4=(inner,), w5=(inner, wide),
        b5=(wide,), w6=(wide, 10),
    )  # fmt: skip


def offers_of(model: ir.Model, data: Dataset | None, seed: int = 0, **options) -> list[Offer]:
    return list(LowRankSplit(**options).offers(model, Context(AVX512, data=data, seed=seed)))


@given(networks(), st.booleans(), st.sampled_from([1, 4]), st.integers(0, 2**30), st.randoms())
@settings(max_examples=12)
def test_an_offer_is_what_the_pass_makes_of_it(model, with_data, block, seed, pick):
    data = random_data(model, 12, seed) if with_data else None
    before = models.digest(model)
    offers = offers_of(model, data, seed, block=block)
    assert models.digest(model) == before
    for offer in pick.sample(offers, 3):
        built = offer.build()
        models.check(built, "offer")
        assert models.signature(built) == models.signature(model)
        again = split(model, data, seed, ranks=(offer.value,), portions=1, block=block)
        assert again.applied == 1
        assert models.to_bytes(built) == models.to_bytes(again.model)
    assert models.digest(model) == before


@given(networks(), st.integers(0, 2**30))
@settings(max_examples=4)
def test_offers_go_from_mild_to_strong_for_one_layer_after_another(model, seed):
    offers = offers_of(model, None, seed, block=2)
    fixed = models.fix_inputs(model, {"x": (1, *(d for d in models.signature(model).inputs[0].shape[1:]))})  # pyright: ignore[reportArgumentType]
    labels = list(nodes(model, "Conv", "Gemm", "MatMul"))
    sites = list(dict.fromkeys(offer.site for offer in offers))
    assert sites == [label for label in labels if label in sites] and sites
    assert len({offer.value for offer in offers}) == len(offers)
    counted = inspect(fixed).layers
    own = {layer.name: layer.macs or 0 for layer in counted if layer.macs}
    for site in sites:
        mine = [offer for offer in offers if offer.site == site]
        assert len(mine) <= LEVELS and all(offer.nodes == (site,) for offer in mine)
        shares = []
        for offer in mine:
            built = offer.build()
            made = inspect(models.fix_inputs(built, {"x": models.signature(fixed).inputs[0].shape})).layers  # pyright: ignore[reportArgumentType]
            new = [layer for layer in made if layer.macs and layer.name not in own]
            assert new and all(layer.name.startswith(f"{site}_") for layer in new)
            shares.append(sum(layer.macs or 0 for layer in new) / own[site])
        assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)
        assert shares[0] <= 0.8 + 1e-9


@given(st.integers(1, 2), st.integers(0, 2**30))
@settings(max_examples=8)
def test_no_single_decomposition_is_nearer_at_an_offers_arithmetic(group, seed):
    model = build(
        f"(float[1,16,8,8] x) => (float[1,24,H,W] y) {{ y = Conv<group={group}, pads=[1,1,1,1]>(x, w) }}",
        seed=seed, w=(24, 16 // group, 3, 3),
    )  # fmt: skip
    whole = inspect(model).macs
    assert whole
    target = product(model)
    for offer in offers_of(model, None, block=2):
        built = offer.build()
        share = (inspect(built).macs or 0) / whole
        assert 0 < share <= 0.8 + 1e-9
        error = np.linalg.norm(product(built) - target)
        for method in ("svd", "spatial"):
            other = split(model, method=method, ratio=share * (1 + 1e-9), block=2)
            if other.applied:
                assert error <= np.linalg.norm(product(other.model) - target) * (1 + 1e-6)


def product(model: ir.Model) -> np.ndarray:
    """What a model of convolutions behind one another makes of unit impulses: its weights, whatever their form."""
    from tests.passes import oracle

    (spec,) = models.signature(model).inputs
    channels, height, width = (d for d in spec.shape[1:] if isinstance(d, int))
    impulses = np.zeros((channels, channels, height, width), np.float32)
    impulses[np.arange(channels), np.arange(channels), height // 2, width // 2] = 1
    free = model.clone()
    for value in (*free.graph.inputs, *free.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(["N", *value.shape[1:]])
    return oracle.run(free, {spec.name: impulses})[0].astype(np.float64)


def test_building_runs_no_data(monkeypatch):
    model = build("(float[N,32] x) => (float[N,32] y) { a = MatMul(x, w) y = MatMul(a, v) }", w=(32, 32), v=(32, 32))
    data = random_data(model, 16)
    read: list[int] = []
    batches = Dataset.batches

    def counted(self, size):
        read.append(size)
        return batches(self, size)

    monkeypatch.setattr(Dataset, "batches", counted)
    offers = offers_of(model, data, block=1)
    assert {offer.site for offer in offers} == {"matmul_0", "matmul_1"}
    assert len(read) == 1
    for offer in offers:
        offer.build()
    assert len(read) == 1


def test_layers_without_offers():
    model = build(
        """(float[N,32] x) => (float[N,32] y) {
            a = MatMul(x, w) b = MatMul(a, v) c = MatMul(b, u) r = Relu(c) y = MatMul(r, z) }""",
        w=(32, 32), v=(32, 32), u=(32, 32), z=(32, 32),
    )  # fmt: skip
    model.graph.initializers["u"].const_value = ir.Tensor(np.zeros((32, 32), np.float32), name="u")
    data = random_data(model, 24)
    for given_data in (None, data):
        offers = offers_of(model, given_data, block=1, exclude=("matmul_0",))
        assert {offer.site for offer in offers} == {"matmul_1", "matmul_4"}  # there is nothing to keep of zeros
        assert len(array_of(nodes(offers[0].build())["matmul_1_split1"].inputs[1])) == 32
    zero = split(model, data, ranks=("matmul_2:4",))
    assert [s.reason for s in zero.skipped] == ["its weights are zero, or its inputs never vary"]
    with pytest.raises(PassError, match="did you mean 'matmul_0'"):
        offers_of(model, None, exclude=("matmul0",))
    with pytest.raises(PassError, match="needs calibration data"):
        offers_of(model, None, fit="outputs")


def test_a_rank_says_its_decomposition():
    model = build("(float[N,16,8,8] x) => (float[N,16,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", w=(16, 16, 3, 3))
    for method, rank, layers in (("svd", "4", 2), ("spatial", "8", 2), ("tucker2", "4x8", 3), ("cp", "20", 4)):
        for own in ("auto", "svd", "cp"):  # said, it goes before the option
            named = split(model, method=own, ranks=(f"conv_0:{method}:{rank}",), block=1)
            plain = split(model, method=method, ranks=(f"conv_0:{rank}",), block=1)
            assert len(nodes(named.model, "Conv")) == layers
            assert models.to_bytes(named.model) == models.to_bytes(plain.model)
    odd = model.clone()
    odd.graph[0].name = "conv:svd:0"
    assert split(odd, ranks=("conv:svd:0:4",)).applied == split(odd, ranks=("conv:svd:0:svd:4",)).applied == 1
    reasons = {
        "conv_0:tucker2:4": "tucker2 has 2 ranks, 1 given",
        "conv_0:svd:4x4": "svd has 1 rank, 2 given",
        "conv_0:spatial:24": "rank 24 makes it 1.00 times less arithmetic, 1.25 is asked for",
    }
    for text, reason in reasons.items():
        result = split(model, ranks=(text,))
        assert result.applied == 0 and [s.reason for s in result.skipped] == [reason]
    for wrong in ("conv_0:svd", "svd:4:x", ":4", "conv_0:4:svd", "a:1x"):
        with pytest.raises(ValueError, match="NODE:METHOD:RANK"):
            LowRankSplit(ranks=(wrong,))
    with pytest.raises(ValueError, match="named twice"):
        LowRankSplit(ranks=("a:4", "a:svd:8"))
