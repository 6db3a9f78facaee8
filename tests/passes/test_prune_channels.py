"""`prune-channels`: its options, its costs and its least squares against plain numpy, and all of it on networks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import graph as g
from graphopt import model as models
from graphopt.calibration.dataset import random_dataset
from graphopt.capabilities import x86_for_mcpu
from graphopt.errors import PassError, SpecError
from graphopt.passes.base import Context
from graphopt.passes.channels.reconstruction import solve
from graphopt.passes.channels.removal import Removal
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.quantization.moments import Moments
from graphopt.passes.second_order import DAMPING
from graphopt.pipeline import Pipeline
from tests.models import small_cnn
from tests.passes.channel_models import networks
from tests.passes.oracle import random_feeds, run

AVX2 = x86_for_mcpu("haswell")


def model() -> ir.Model:
    return ir.from_proto(small_cnn(channels=16))


def shape_of(result: ir.Model, name: str) -> tuple[int, ...]:
    array = g.constant_of(next(n for n in result.graph if n.name == name).inputs[1])
    assert array is not None
    return array.shape


@pytest.mark.parametrize(
    "option",
    [
        "ratio=0",
        "ratio=1",
        "min_channels=0",
        "portions=0",
        "round_to=0",
        "round_to=some",
        "importance=size",
        "scope=all",
    ],
)
def test_impossible_options(option):
    with pytest.raises(SpecError):
        Pipeline.parse(f"prune-channels{{{option}}}")


def test_prints_and_parses():
    text = 'prune-channels{ratio=0.2,importance=norm,scope=layer,round_to=8,exclude=[conv1,"a b"]}'
    assert str(Pipeline.parse(str(Pipeline.parse(text)))) == text


@pytest.mark.parametrize("option", ["importance=activation", "importance=reconstruction", "reconstruct=true"])
def test_data_is_asked_for(option):
    with pytest.raises(PassError, match="calibration data"):
        Pipeline.parse(f"prune-channels{{{option}}}").run(model(), Context())


def test_a_wrong_name_is_not_excluded():
    with pytest.raises(PassError, match="no node") as caught:
        PruneChannels(exclude=("conv3",)).run(model(), Context())
    assert "conv" in str(caught.value.hint)


def test_excluded_nodes_keep_their_channels():
    options = {"ratio": 0.5, "round_to": "1", "importance": "norm", "scope": "layer"}
    plain = PruneChannels(**options).run(model(), Context()).model
    assert shape_of(plain, "conv2")[0] < 32 and shape_of(plain, "conv2")[1] < 16
    kept = PruneChannels(**options, exclude=("conv2",)).run(model(), Context())
    assert shape_of(kept.model, "conv2") == (32, 16, 3, 3) and kept.applied == 0
    assert "excluded" in {s.node: s.reason for s in kept.skipped}["conv2"]


@pytest.mark.parametrize(("round_to", "block"), [("auto", 8), ("4", 4), ("1", 1)])
def test_channels_are_rounded(round_to, block):
    prune = PruneChannels(ratio=0.4, round_to=round_to, importance="norm")
    result = prune.run(model(), Context(AVX2))
    assert shape_of(result.model, "conv1")[0] % block == 0 and shape_of(result.model, "conv2")[0] % block == 0
    assert result.applied > 0


def test_few_channels_are_left_alone():
    result = PruneChannels(ratio=0.9, round_to="1", importance="norm", min_channels=16).run(model(), Context())
    assert shape_of(result.model, "conv1")[0] == 16 and shape_of(result.model, "conv2")[0] >= 16


def duplicated() -> ir.Model:
    """The small network with half of the second convolution's outputs copies of the other half."""
    made = model()
    conv = next(n for n in made.graph if n.name == "conv2")
    weights = np.array(g.constant_of(conv.inputs[1]))
    weights[16:] = weights[:16] * 0.5
    value = conv.inputs[1]
    assert value is not None
    value.const_value = ir.Tensor(weights, name=value.name)
    return made


def snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / max(np.square(wanted - got).sum(), 1e-30)))


def test_what_others_can_make_up_for_is_cut_without_loss():
    """By reconstruction, 16 channels that are copies cost nothing; by norm the same number does."""
    original = duplicated()
    data = random_dataset(models.signature(original), 64, 3)
    feeds = random_feeds(original, {"x": (8, 3, 8, 8)}, 7)
    (wanted,) = run(original, feeds)
    options = "ratio=0.4,round_to=1,exclude=[conv1]"
    quality = {}
    for importance, again in (("reconstruction", "true"), ("norm", "true"), ("norm", "false")):
        text = f"prune-channels{{{options},importance={importance},reconstruct={again}}}"
        pruned, (record,) = Pipeline.parse(text).run(original, Context(data=data))
        assert record.applied
        quality[importance, again] = snr_db(wanted, run(pruned, feeds)[0])
    assert quality["norm", "true"] > quality["norm", "false"] + 3
    assert quality["reconstruction", "true"] >= quality["norm", "true"] - 0.5


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 8), st.integers(0, 2**32 - 1), st.booleans())
def test_least_squares(groups, outputs, taps, seed, has_bias):
    """`solve` against numpy's least squares on the samples themselves, the damping written as more samples."""
    rng = np.random.default_rng(seed)
    rows = 3 * taps
    x = rng.standard_normal((groups, rows, taps)) @ rng.standard_normal((taps, taps)) + rng.standard_normal(taps)
    weights = rng.standard_normal((groups, outputs, taps))
    keep = rng.random(taps) < 0.6
    keep[rng.integers(taps)] = True
    mean = x.mean(axis=1)
    covariance = np.stack([np.cov(each.T, bias=True).reshape(taps, taps) for each in x])
    new = solve(weights, mean, covariance, keep, has_bias=has_bias)
    assert not new[:, :, ~keep].any()
    for group in range(groups):
        centred = x[group] - mean[group] if has_bias else x[group]
        second = centred.T @ centred / rows
        damping = np.sqrt(DAMPING * np.trace(second) / taps * rows) * np.eye(taps)[:, keep]
        left = np.concatenate([centred[:, keep], damping])
        right = np.concatenate([centred @ weights[group].T, damping @ weights[group][:, keep].T])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(new[group][:, keep], wanted, rtol=1e-6, atol=1e-8 * np.abs(weights).max() * taps)


@given(st.integers(1, 2), st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_cost_of_a_removal(groups, channels, size, seed):
    """The cost of taking several channels one after another is the least squares error of doing without them."""
    rng = np.random.default_rng(seed)
    taps, outputs = channels * size, 4
    factor = rng.standard_normal((groups, taps, taps + 2))
    covariance = factor @ factor.transpose(0, 2, 1) / taps
    weights = rng.standard_normal((groups, outputs, taps))
    removal = Removal(weights, Moments(np.zeros((groups, taps)), covariance), np.arange(channels), range(channels))
    damped = covariance + DAMPING * (np.trace(covariance, axis1=1, axis2=2) / taps)[:, None, None] * np.eye(taps)
    energy = np.einsum("got,gts,gos->", weights, covariance, weights)
    paid = 0.0
    keep = np.ones(taps, bool)
    for channel in rng.permutation(channels)[: channels - 1]:
        paid += removal.costs()[channel]
        removal.take(int(channel))
        keep[channel * size : (channel + 1) * size] = False
        error = 0.0
        for group in range(groups):
            h = damped[group]
            solved = weights[group] @ h[:, keep] @ np.linalg.inv(h[np.ix_(keep, keep)])
            apart = weights[group].copy()
            apart[:, keep] -= solved
            error += float(np.einsum("ot,ts,os->", apart, h, apart))
        np.testing.assert_allclose(paid, error / energy, rtol=1e-6, atol=1e-9)
        assert removal.costs()[channel] == 0


@settings(max_examples=15, deadline=None)
@given(networks(), st.floats(0.1, 0.8), st.sampled_from(["activation", "reconstruction"]), st.integers(0, 2**31))
def test_networks_are_pruned_and_solved_again(proto, ratio, importance, seed):
    """With data, whatever the network: valid, runnable, finite, and the same twice."""
    source = ir.from_proto(proto)
    signature = models.signature(source)
    context = Context(data=random_dataset(signature, 16, seed), seed=seed)
    prune = PruneChannels(ratio=ratio, importance=importance, round_to="1", min_channels=1)
    first, second = (prune.run(source.clone(), context).model for _ in range(2))
    assert models.to_bytes(first) == models.to_bytes(second)
    models.check(first, "the pruned model")
    assert models.signature(first) == signature
    assert all(np.isfinite(y).all() for y in run(first, random_feeds(source, {}, seed)))
