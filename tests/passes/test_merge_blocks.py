"""merge-blocks: exact where it can be, the least-squares optimum elsewhere, refusals, offers, names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt import graph as g
from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.calibration.dataset import random_dataset
from graphopt.calibration.observe import watch
from graphopt.errors import PassError, SpecError
from graphopt.inspection import inspect
from graphopt.model import fix_inputs
from graphopt.passes.base import Context, Fidelity
from graphopt.passes.blocks.find import find_blocks
from graphopt.passes.blocks.fit import fit, identity
from graphopt.passes.blocks.observe import kernels, observe_blocks
from graphopt.passes.merge_blocks import MergeBlocks
from graphopt.passes.paired_inputs import FLUSH_ROWS, PairedSums
from graphopt.passes.ridge import LEAST_RIDGE
from graphopt.pipeline import Pipeline
from graphopt.spec import bind, parse
from graphopt.verify import LAMBDA, total_reduction_length
from tests.passes import oracle
from tests.passes.residual_models import SIZE, Residual, networks

UNIT = 2.0**-24
"""Unit roundoff of float32."""


def data_of(model: ir.Model, count: int = 64, seed: int = 0) -> Dataset:
    return random_dataset(models.signature(model), count, seed)


def merge(model: ir.Model, data: Dataset | None, **options):
    return MergeBlocks(**options).run(model.clone(), Context(data=data))


def chain(count: int = 4, channels: int = 4, seed: int = 0, **options) -> ir.Model:
    made = Residual(seed, channels)
    for index in range(count):
        made.basic(f"add{index}", **options)
        made.relu()
    return made.model()


def value_of(model: ir.Model, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """A value inside, computed without graph optimisations."""
    seen = model.clone()
    seen.graph.outputs.append(next(v for node in seen.graph for v in node.outputs if v.name == name))
    return oracle.run(seen, feeds, [name])[0]


def magnitude(model: ir.Model, feeds: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What a value's terms add up to without their signs: rounding errors are shares of it, where the terms cancel too.
    For chains of linear layers."""
    unsigned = model.clone()
    for value in unsigned.graph.initializers.values():
        array = g.constant_of(value)
        if array is not None and array.dtype == np.float32:
            value.const_value = ir.tensor(np.abs(array), name=value.name)
    return value_of(unsigned, name, {key: np.abs(array) for key, array in feeds.items()})


def energy_lost(first: ir.Model, second: ir.Model, name: str, data: Dataset) -> float:
    """Of value `name`, about its mean, over all places of all samples."""
    wanted, got = (np.concatenate([v[name] for v in watch(m, [name], data, label="run")]) for m in (first, second))
    about = wanted - wanted.mean(axis=(0, 2, 3), keepdims=True)
    return float(np.square(wanted - got).sum() / np.square(about).sum())


@given(st.integers(1, 5), st.integers(0, 2**30), st.sampled_from([1, 3]))
@settings(max_examples=20)
def test_a_linear_block_is_merged_without_loss(channels, seed, kernel):
    """f of two 1x1 convolutions: the data determines K, up to the rounding of its moments and the least ridge."""
    model = chain(1, channels, seed, kernel=1, activation=None, wide=10)
    result = merge(model, data_of(model, 96, seed), blocks=(f"add0:{kernel}",))
    assert result.applied == 1
    feeds = oracle.random_feeds(model, {"x": (3, channels, SIZE, SIZE)}, seed + 1)
    name = find_blocks(model)[0][0].output
    wanted, got = value_of(model, name, feeds), value_of(result.model, name, feeds)
    lengths = total_reduction_length(model) ** 0.5 + (FLUSH_ROWS * channels * kernel**2) ** 0.5
    bound = (LEAST_RIDGE + LAMBDA * UNIT * lengths) * magnitude(model, feeds, name).max()
    assert np.abs(wanted - got).max() <= bound


@given(networks(), st.integers(0, 2**30), st.sampled_from([1, 2, 8]))
@settings(max_examples=25)
def test_merged_networks_are_valid_and_keep_their_names(model, seed, portions):
    blocks, _, _ = find_blocks(model)
    asked = [(block, kernel) for block in blocks for kernel in kernels(block)[:1]]
    assume(asked)
    data = data_of(model, 16, seed)
    result = merge(model, data, blocks=tuple(f"{b.name}:{k}" for b, k in asked), portions=portions)
    models.check(result.model, "merged")
    assert models.signature(result.model) == models.signature(model)
    assert result.applied == len(asked)
    left = {g.label(node): node for node in result.model.graph}
    values = {value.name for node in result.model.graph for value in node.outputs}
    for block, kernel in asked:
        conv = left[f"{block.name}_merged"]
        assert conv.outputs[0].name == block.output in values
        assert conv.inputs[0].name == block.entry  # pyright: ignore[reportOptionalMemberAccess]
        weights = g.constant_of(conv.inputs[1])
        assert weights is not None and weights.shape == (block.channels, block.channels, kernel, kernel)
        assert not {block.name, *block.layers} & left.keys() and not set(block.inner) & values
    sizes = {"x": (2, *(d for d in models.signature(model).inputs[0].shape[1:] if isinstance(d, int)))}
    before, after = (inspect(fix_inputs(m, sizes)).macs or 0 for m in (model, result.model))
    assert before - after == 2 * sum(block.macs - block.merged_macs(kernel) for block, kernel in asked)
    feeds = oracle.random_feeds(model, sizes, seed)
    assert np.isfinite(oracle.run(result.model, feeds)[0]).all()


@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(40, 400), st.integers(0, 2**30), st.booleans())
@settings(max_examples=40)
def test_the_fit_is_the_ridge_regression_that_numpy_solves(channels, kernel, rows, seed, constant_tap):
    """On the same rows, with the ridge that was inferred written as further rows."""
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((rows, channels * 9)) @ rng.standard_normal((channels * 9, channels * 9))
    patches = patches.astype(np.float32)
    if constant_tap:
        patches[:, rng.integers(channels * 9)] = 0
    lack = np.tanh(patches[:, 4::9]) + 0.1 * rng.standard_normal((rows, channels))
    sums = PairedSums(1, channels, channels * 9)
    for part in np.array_split(np.arange(rows), 3):
        sums.add(lack[None, part], patches[None, part])
    found = fit(sums.moments(), channels, kernel)
    taps = patches.reshape(rows, channels, 3, 3).astype(np.float64)
    taps = taps if kernel == 3 else taps[:, :, 1:2, 1:2]
    taps = taps.reshape(rows, -1)
    about, wanted = taps - taps.mean(axis=0), lack - lack.mean(axis=0)
    deviations = np.where(about.std(axis=0) > 0, about.std(axis=0), 1.0)
    ridge = np.sqrt(rows * found.ridge) * np.diag(deviations)
    solved = np.linalg.lstsq(np.vstack([about, ridge]), np.vstack([wanted, np.zeros((len(ridge), channels))]))[0].T
    got = (found.weights - identity(channels, kernel)).reshape(channels, -1)
    # Moments are sums of float32 products: each element is off by about sqrt(rows) roundings, of which the ridge lets
    # through its inverse.
    off = LAMBDA * np.finfo(np.float32).eps * np.sqrt(rows) * (1 + 1 / found.ridge) / np.sqrt(rows)
    scale = np.abs(solved * deviations).max() / deviations
    assert (np.abs(got - solved) <= np.minimum(off, 1.0) * scale + LAMBDA * np.finfo(np.float32).eps).all()
    prediction = taps @ got.T + found.bias
    assert np.abs((prediction - lack).mean(axis=0)).max() <= 1e-3 * np.abs(lack).max()


def test_with_many_rows_the_ridge_fades_and_little_more_than_least_squares_is_lost():
    rng = np.random.default_rng(5)
    rows, channels = 20000, 3
    patches = rng.standard_normal((rows, channels * 9)).astype(np.float32)
    lack = np.maximum(patches @ rng.standard_normal((channels * 9, channels)), 0)
    sums = PairedSums(1, channels, channels * 9)
    sums.add(lack[None], patches[None])
    found = fit(sums.moments(), channels, 3)
    design = np.column_stack([patches.astype(np.float64), np.ones(rows)])
    least = np.square(lack - design @ np.linalg.lstsq(design, lack)[0]).sum()
    weights = (found.weights - identity(channels, 3)).reshape(channels, -1)
    left = np.square(lack - patches @ weights.T - found.bias).sum()
    taken = 27 / rows
    assert least <= left * (1 + 1e-6) <= least * (1 + taken)
    whole = np.square(lack + patches[:, 4::9] - (lack + patches[:, 4::9]).mean(axis=0)).sum()
    assert found.lost == pytest.approx(least / whole, rel=4 * taken)


def test_with_few_rows_the_block_is_left_near_the_identity():
    """Noise that x does not explain must not be fitted."""
    rng = np.random.default_rng(6)
    sums = PairedSums(1, 4, 36)
    sums.add(rng.standard_normal((1, 20, 4)), rng.standard_normal((1, 20, 36)))
    found = fit(sums.moments(), 4, 3)
    assert np.square(found.weights - identity(4, 3)).sum() < 0.5


def test_a_3x3_loses_no_more_than_a_1x1_and_both_less_than_dropping_the_block():
    model = chain(1, 4, 3)
    data, fresh = data_of(model, 200, 1), data_of(model, 100, 2)
    dropped = merge(model, None, blocks=("add0:1",)).model
    name = find_blocks(model)[0][0].output
    lost = {k: energy_lost(model, merge(model, data, blocks=(f"add0:{k}",)).model, name, fresh) for k in (3, 1)}
    assert lost[3] < lost[1] < energy_lost(model, dropped, name, fresh)
    (block,), _, _ = find_blocks(model)
    ((_, moments),) = observe_blocks(model, None, [block], Context(data=data))
    for kernel in (3, 1):  # what is expected is what new data shows, up to the sampling of places
        assert fit(moments, 4, kernel).lost == pytest.approx(lost[kernel], rel=0.1)


def test_later_blocks_make_up_for_earlier_ones():
    errors = {1: 0.0, 4: 0.0}
    for seed in range(6):
        model = chain(4, 6, seed)
        data = data_of(model, 100, seed)
        last = find_blocks(model)[0][-1].output
        for portions in errors:
            merged = merge(model, data, blocks=tuple(f"add{i}:3" for i in range(4)), portions=portions).model
            errors[portions] += energy_lost(model, merged, last, data)
    assert errors[4] < errors[1]


@given(networks(), st.integers(0, 2**30))
@settings(max_examples=10)
def test_offers_build_what_the_pass_makes_of_that_value_alone(model, seed):
    data = data_of(model, 8, seed)
    before = models.digest(model)
    blocks, _, _ = find_blocks(model)
    offers = list(MergeBlocks().offers(model, Context(data=data)))
    assert [offer.value for offer in offers] == [f"{b.name}:{k}" for b in blocks for k in kernels(b)]
    for offer in offers:
        block = next(b for b in blocks if b.name == offer.site)
        assert offer.nodes == block.layers
        fresh = random_dataset(models.signature(model), 8, seed)  # nothing known of it
        alone = merge(model, fresh, blocks=(offer.value,), portions=1).model
        assert models.to_bytes(offer.build()) == models.to_bytes(alone)
    assert models.digest(model) == before


def test_offers_and_blocks_without_data_have_the_structure_alone():
    model = chain(2)
    result = merge(model, None, blocks=("add0:3", "add1:1"))
    assert result.applied == 2 and any("no calibration data" in note for note in result.notes)
    for name, kernel in (("add0", 3), ("add1", 1)):
        node = next(node for node in result.model.graph if node.name == f"{name}_merged")
        weights, bias = g.constant_of(node.inputs[1]), g.constant_of(node.inputs[2])
        assert weights is not None and np.array_equal(weights, identity(4, kernel)) and bias is not None
        assert not bias.any()
    offers = list(MergeBlocks().offers(model, Context()))
    assert models.to_bytes(offers[1].build()) == models.to_bytes(merge(model, None, blocks=("add0:1",)).model)


def test_choosing_saves_what_is_asked_and_is_the_same_twice():
    model = chain(6, 5, 2)
    total = sum(block.macs for block in find_blocks(model)[0])
    saved = []
    for ratio in (0.05, 0.3, 0.6, 0.9):
        first, second = (merge(model, data_of(model), ratio=ratio).model for _ in range(2))
        assert models.to_bytes(first) == models.to_bytes(second)
        left = sum(layer.macs or 0 for layer in inspect(fix_inputs(first, {"x": (1, 5, SIZE, SIZE)})).layers)
        saved.append(1 - left / (total + 50))
        assert saved[-1] >= ratio
    assert saved == sorted(saved) and saved[0] < 0.2


def test_nested_blocks_are_merged_one_at_a_time():
    made = Residual(0, 4)
    entry = made.value
    made.value = inner = made.conv(entry, 4, 4, 3)
    made.basic("inside")
    branch, made.value = made.value, entry
    made.add(branch, "around")
    model = made.model()
    assert inner == "v0" and [b.name for b in find_blocks(model)[0]] == ["inside", "around"]
    with pytest.raises(PassError, match="inside the other"):
        merge(model, data_of(model), blocks=("inside:3", "around:3"))
    result = merge(model, data_of(model), ratio=0.95)
    assert result.applied == 1 and models.check(result.model, "merged") is None
    assert merge(model, data_of(model), blocks=("inside:1",)).applied == 1


def reasons(model: ir.Model, **options) -> dict[str, str]:
    result = merge(model, data_of(model, 4), **options)
    assert result.applied == 0
    return {skip.node: skip.reason for skip in result.skipped}


def test_refusals():
    made = Residual(0, 4)
    projected = made.conv(made.value, 4, 4, 1, name="shortcut")
    branch = made.conv(made.value, 4, 4, 3)
    made.value = projected
    made.add(branch, "projection")
    assert "made from the other" in reasons(made.model())["projection"]

    made = Residual(0, 4)
    h = made.conv(made.value, 4, 4, 3)
    made.add(made.conv(made.node("Relu", h), 4, 4, 3), "add")
    made.value = made.node("Mul", made.value, h)
    assert "also read by" in reasons(made.model())["add"]

    made = Residual(0, 4)
    h = made.conv(made.value, 4, 4, 3)
    made.add(made.conv(h, 4, 4, 3), "add")
    assert "is an output" in reasons(made.model(extra=(h,)))["add"]

    made = Residual(0, 4)
    made.add(made.conv(made.node("GlobalAveragePool", made.value), 4, 4, 1), "add")
    assert "another shape" in reasons(made.model())["add"]

    made = Residual(0, 4)
    made.add(made.conv(made.value, 4, 4, 1), "add")
    assert "no less arithmetic" in reasons(made.model())["add"]

    made = Residual(0, 4)
    made.add(made.node("Sigmoid", made.value), "add")
    assert "no convolution" in reasons(made.model())["add"]

    model = chain(1)
    assert reasons(model, exclude=("add0",))["add0"] == "excluded by name"
    assert reasons(model, exclude=("n0",))["add0"] == "excluded by name"
    made = Residual(0, 4)
    made.basic("add", kernel=1, wide=3)
    assert "no less arithmetic" in reasons(made.model(), blocks=("add:3",))["add"]


def test_other_inputs_and_sizes_that_only_the_data_tells_are_refused():
    model = chain(2)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["N", 4, "H", "W"])
    blocks, skipped, _ = find_blocks(model)
    assert not blocks and all("depend on the data" in skip.reason for skip in skipped)
    made = Residual(0, 4)
    other = made.conv(made.value, 4, 4, 3)
    made.relu()
    made.add(made.node("Mul", made.conv(made.value, 4, 4, 3), other), "add")
    assert "made from the other" in reasons(made.model())["add"]


def test_mistakes_are_named():
    model = chain(1)
    with pytest.raises(PassError, match="calibration data"):
        merge(model, None)
    with pytest.raises(PassError, match="did you mean 'add0'"):
        merge(model, None, blocks=("ad0:3",))
    with pytest.raises(PassError, match="no node"):
        merge(model, data_of(model), exclude=("nothing",))
    assert merge(model, data_of(model), exclude=("add0_merged",)).applied == 1
    for wrong in ("blocks=[a]", "blocks=[a:2]", "blocks=[a:1,a:3]", "ratio=1", "portions=0"):
        with pytest.raises(SpecError):
            bind(parse(f"merge-blocks{{{wrong}}}"), MergeBlocks, "pass")


def test_it_is_a_lossy_pass_of_the_pipeline():
    text = "merge-blocks{blocks=[add0:3]}"
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text and pipeline.passes[0].fidelity is Fidelity.LOSSY
    model = chain(1)
    result, _ = pipeline.run(model, Context(data=data_of(model)))
    assert any(node.name == "add0_merged" for node in result.graph)
