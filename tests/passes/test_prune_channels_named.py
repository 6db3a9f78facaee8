"""`prune-channels`: channels cut by name, and what it offers to a search."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graph as g
from graphopt import model as models
from graphopt.calibration.dataset import Dataset, random_dataset
from graphopt.capabilities import x86_for_mcpu
from graphopt.errors import PassError, SpecError
from graphopt.passes.base import Context
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.named import writers
from graphopt.passes.prune_channels import PruneChannels
from graphopt.pipeline import Pipeline
from tests.models import small_cnn
from tests.passes.channel_models import networks
from tests.passes.test_channels import assert_cut_equals_mask

AVX2 = Context(x86_for_mcpu("haswell"))


def model() -> ir.Model:
    return ir.from_proto(small_cnn(channels=16))


def outputs_of(result: ir.Model, name: str) -> int:
    found = writers(ChannelGraph(result)).get(name)
    return 1 if found is None else found.count


def skips(result) -> dict[str, str]:
    return {each.node: each.reason for each in result.skipped}


@pytest.mark.parametrize("item", ["conv1", "conv1:", ":8", "conv1:0", "conv1:-8", "conv1:8.5", "conv1:8x8"])
def test_impossible_items(item):
    with pytest.raises(SpecError, match="NODE:COUNT"):
        Pipeline.parse(f'prune-channels{{channels=["{item}"]}}')


def test_prints_and_parses():
    text = 'prune-channels{channels=[conv1:8,"a b:c:16"]}'
    assert str(Pipeline.parse(str(Pipeline.parse(text)))) == text


def test_a_node_that_is_not_there_is_an_error():
    with pytest.raises(PassError, match="channels names 'conv3'") as caught:
        PruneChannels(channels=("conv3:8",)).run(model(), Context())
    assert "conv" in str(caught.value.hint)


def test_one_layer_alone_is_cut():
    """Whatever ratio, scope and block say; the number is exact."""
    prune = PruneChannels(ratio=0.01, scope="layer", round_to="8", channels=("conv1:11",))
    result = prune.run(model(), Context())
    assert outputs_of(result.model, "conv1") == 11 and outputs_of(result.model, "conv2") == 32
    assert result.applied == 5 and not result.skipped


def test_the_cheapest_go_first():
    source = model()
    conv1, conv2 = (next(n for n in source.graph if n.name == name) for name in ("conv1", "conv2"))
    writes, reads = (np.asarray(g.constant_of(n.inputs[1]), np.float64) for n in (conv1, conv2))
    shares = [np.square(writes).sum(axis=(1, 2, 3)), np.square(reads).sum(axis=(0, 2, 3))]
    cost = sum(each / each.sum() for each in shares)
    stays = np.sort(np.argsort(cost)[6:])
    result = PruneChannels(channels=("conv1:10",)).run(source, Context())
    left = g.constant_of(next(n for n in result.model.graph if n.name == "conv1").inputs[1])
    np.testing.assert_array_equal(left, writes[stays].astype(np.float32))


def test_the_smallest_count_wins():
    result = PruneChannels(channels=("conv1:12", "conv1:9", "conv1:14")).run(model(), Context())
    assert outputs_of(result.model, "conv1") == 9


def test_what_cannot_be_cut_is_said():
    relu = next(n for n in model().graph if n.op_type == "Relu")
    last = next(n for n in reversed(list(model().graph)) if n.op_type in ("Gemm", "MatMul"))
    items = ("conv1:16", "conv2:3", f"{g.label(last)}:2", f"{g.label(relu)}:8")
    before = models.to_bytes(model())
    result = PruneChannels(channels=items).run(model(), Context())
    assert result.applied == 0 and models.to_bytes(result.model) == before
    found = skips(result)
    assert "16 output channels" in found["conv1"] and "min_channels" in found["conv2"]
    assert "output of the model" in found[g.label(last)] and "constant weights" in found[g.label(relu)]
    excluded = PruneChannels(channels=("conv1:8",), exclude=("conv1",)).run(model(), Context())
    assert excluded.applied == 0 and "excluded" in skips(excluded)["conv1"]


def two_families(seed: int = 3) -> ir.Model:
    """first: 16 outputs; the first half is added to beside's 8, the second half goes on alone; both end in last."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (16, 3, 1, 1), "w2": (8, 3, 1, 1), "w3": (8, 8, 3, 3), "w4": (8, 8, 3, 3), "w5": (4, 16)}
    constants = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first"),
        helper.make_node("Split", ["a"], ["b", "c"], "split", axis=1),
        helper.make_node("Conv", ["x", "w2"], ["d"], "beside"),
        helper.make_node("Add", ["b", "d"], ["e"], "add"),
        helper.make_node("Conv", ["e", "w3"], ["f"], "left", pads=[1] * 4),
        helper.make_node("Conv", ["c", "w4"], ["h"], "right", pads=[1] * 4),
        helper.make_node("Concat", ["f", "h"], ["i"], "concat", axis=1),
        helper.make_node("GlobalAveragePool", ["i"], ["j"], "pool"),
        helper.make_node("Flatten", ["j"], ["k"], "flatten"),
        helper.make_node("Gemm", ["k", "w5"], ["y"], "last", transB=1),
    ]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 6, 6])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])]
    made = helper.make_model(
        helper.make_graph(nodes, "two", infos, outputs, constants),
        opset_imports=[helper.make_opsetid("", 13)], ir_version=8,
    )  # fmt: skip
    return ir.from_proto(made)


def test_a_layer_of_two_families():
    """Its outputs are counted together; the layer beside it loses those that meet its own, and more if it is named."""
    for seed in range(5):
        result = PruneChannels(channels=("first:10",)).run(two_families(seed), Context())
        assert outputs_of(result.model, "first") == 10
        gone = 8 - outputs_of(result.model, "beside")
        right = next(n for n in result.model.graph if n.name == "right")
        weights = g.constant_of(right.inputs[1])
        assert weights is not None and gone + (8 - weights.shape[1]) == 6
    both = PruneChannels(channels=("first:14", "beside:5")).run(two_families(), Context())
    assert outputs_of(both.model, "beside") == 5 and outputs_of(both.model, "first") <= 13
    sites = {offer.site for offer in PruneChannels(round_to="1").offers(two_families(), Context())}
    assert sites == {"first", "left", "right"}  # all of beside's outputs are among first's


def test_counts_offered():
    offers = PruneChannels(min_channels=2).offers(model(), AVX2)
    assert [each.value for each in offers] == ["conv1:8", "conv2:24", "conv2:16", "conv2:8"]
    wide = PruneChannels().offers(ir.from_proto(small_cnn(channels=128)), AVX2)
    counts = [int(each.value.rpartition(":")[2]) for each in wide if each.site == "conv1"]
    assert counts[0] == 120 and counts[-1] == 32 and len(counts) == 6
    assert counts == sorted(counts, reverse=True) and all(count % 8 == 0 for count in counts)
    assert offers[0].nodes == ("conv1", "conv2") and offers[-1].nodes[0] == "conv2"
    assert all(each.site != "conv1" for each in PruneChannels(exclude=("conv1",)).offers(model(), AVX2))


def test_offers_need_what_the_pass_needs():
    with pytest.raises(PassError, match="calibration data"):
        PruneChannels(reconstruct="true").offers(model(), Context())
    with pytest.raises(PassError, match="no node"):
        PruneChannels(exclude=("conv3",)).offers(model(), Context())


class Counting(Dataset):
    """A data set that counts the runs over it."""

    runs = 0

    def batches(self, size: int):
        Counting.runs += 1
        return super().batches(size)


def test_data_is_run_over_once_for_all_offers():
    source = model()
    data = random_dataset(models.signature(source), 16, 1)
    data.__class__ = Counting
    Counting.runs = 0
    offers = PruneChannels(round_to="1").offers(source, Context(data=data))
    assert Counting.runs == 1 and len(offers) > 5
    PruneChannels().offers(duplicate_of(source), Context(data=data))  # another model is the latest known by now
    Counting.runs = 0
    started = time.perf_counter()
    assert len({models.digest(each.build()) for each in offers}) == len(offers)
    assert Counting.runs == 0 and time.perf_counter() - started < 60


def duplicate_of(source: ir.Model) -> ir.Model:
    made = source.clone()
    made.graph.name = "another"
    return made


@settings(max_examples=40, deadline=None)
@given(networks(), st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_what_is_offered_is_what_is_done(proto, block, least, seed, data):
    """With data and without: the same bytes; the count is right, and the first of a site is the mildest."""
    source = ir.from_proto(proto)
    before = models.to_bytes(source)
    known = random_dataset(models.signature(source), 8, seed) if data.draw(st.booleans()) else None
    importance = data.draw(st.sampled_from(["auto", "norm"] if known is None else ["auto", "activation"]))
    context = Context(data=known, seed=seed)
    options = {"importance": importance, "min_channels": least, "round_to": str(block)}
    offers = PruneChannels(**options).offers(source, context)
    assert len({each.value for each in offers}) == len(offers)
    assert max(Counter(each.site for each in offers).values(), default=0) <= 6
    counts: dict[str, list[int]] = {}
    for each in offers:
        counts.setdefault(each.site, []).append(int(each.value.rpartition(":")[2]))
    full = {name: outputs.count for name, outputs in writers(ChannelGraph(source)).items()}
    for site, given_counts in counts.items():
        assert given_counts == sorted(set(given_counts), reverse=True) and given_counts[0] < full[site]
        assert all(count % block == 0 for count in given_counts)
    if not offers:
        return
    for each in data.draw(st.lists(st.sampled_from(offers), min_size=1, max_size=3, unique_by=id)):
        built = each.build()
        prune = PruneChannels(**options, channels=(each.value,), portions=1)
        result = prune.run(source.clone(), context)
        assert not [skip for skip in result.skipped if skip.node == each.site and "channels" in skip.reason]
        assert models.to_bytes(result.model) == models.to_bytes(built)
        models.check(built, "what was built")
        assert outputs_of(built, each.site) == int(each.value.rpartition(":")[2])
        changed = {g.label(n) for n in built.graph if shapes(built, n) != shapes(source, named(source, n))}
        layers = {g.label(n) for n in source.graph if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")}
        assert changed & layers <= set(each.nodes) <= layers and each.site in changed
    assert models.to_bytes(source) == before


def named(source: ir.Model, node: ir.Node) -> ir.Node:
    return next(each for each in source.graph if g.label(each) == g.label(node))


def shapes(source: ir.Model, node: ir.Node) -> list[tuple[int, ...] | None]:
    return [None if (array := g.constant_of(value)) is None else array.shape for value in node.inputs[1:2]]


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(0, 2**31), st.data())
def test_several_items(proto, seed, data):
    """Any items: equal to the model with these channels zeroed; so many are left as asked for, or a reason is given."""
    source = ir.from_proto(proto)
    known = writers(ChannelGraph(source))
    names = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4, unique=True))
    counts = {name: data.draw(st.integers(1, known[name].count)) for name in names}
    prune = PruneChannels(channels=tuple(f"{n}:{c}" for n, c in counts.items()), min_channels=1, reconstruct="false")
    plan, _ = prune.plan(source.clone(), Context())
    result = prune.run(source.clone(), Context())
    expected = assert_cut_equals_mask(plan) if plan.cut else source
    assert models.to_bytes(expected) == models.to_bytes(result.model)
    reasons = skips(result)
    for name in names:
        left = outputs_of(result.model, name)
        if name not in reasons:
            assert left < counts[name] + max(known[name].sizes.values())
        if name not in reasons and len(names) == 1:
            assert left >= counts[name]
    assert reasons.keys() <= counts.keys() and (result.applied or reasons.keys() == counts.keys())
