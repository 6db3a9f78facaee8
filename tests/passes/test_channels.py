"""Cutting coupled channels out of random networks equals setting them to zero."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.inspection import inspect
from graphopt.passes.base import Context, Fidelity
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.channels.families import Room, families
from graphopt.passes.channels.masking import masked_model
from graphopt.passes.channels.plan import Plan
from graphopt.passes.prune_channels import PruneChannels
from graphopt.verify import Reference
from tests.passes.channel_models import networks
from tests.passes.oracle import random_feeds

EXAMPLES = settings(max_examples=40, deadline=None)


def assert_cut_equals_mask(plan: Plan) -> ir.Model:
    """Apply the plan; the result is valid and equals the masked model to rounding (see `graphopt.verify`)."""
    model = plan.channels.model
    signature = models.signature(model)
    masked = masked_model(plan)
    models.check(masked, "the masked model")
    plan.apply()
    models.check(model, "the pruned model")
    assert models.signature(model) == signature
    with tempfile.TemporaryDirectory() as folder:
        samples = [random_feeds(model, {}, seed) for seed in range(2)]
        Reference(masked, samples, Path(folder)).judge_model(model, Fidelity.ROUNDING, "cutting")
    return model


@EXAMPLES
@given(networks(), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_classes_can_be_cut(proto, share, seed):
    """Whichever classes are cut, as long as every value keeps a channel."""
    channels = ChannelGraph(ir.from_proto(proto))
    room, rng = Room(channels, 1), np.random.default_rng(seed)
    roots = sorted({root for family in families(channels, room) for root in family.roots})
    cut = {root for root in rng.permutation(roots).tolist() if rng.random() < share and room.take([root])}
    assert_cut_equals_mask(Plan(channels, frozenset(cut)))


@EXAMPLES
@given(
    networks(),
    st.floats(0.05, 0.95),
    st.sampled_from(["global", "layer"]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
)
def test_plans_of_the_pass(proto, ratio, scope, block, least):
    """As planned: the multiply-accumulates counted afterwards, the block and the least number of channels kept."""
    model = ir.from_proto(proto)
    prune = PruneChannels(ratio=ratio, scope=scope, importance="norm", round_to=str(block), min_channels=least)
    plan, work = prune.plan(model, Context())
    whole = {value: len(each.labels) for value, each in plan.channels.carried.items()}
    for family in families(plan.channels, Room(plan.channels, 1)):
        left = [root for root in family.roots if root not in plan.cut]
        assert len(left) == len(family.roots) or len(left) * family.width % block == 0
    pruned = assert_cut_equals_mask(plan)
    for value, size in whole.items():
        left = int(plan.kept(plan.channels.carried[value].labels).sum())
        assert left >= min(least, size)
    counted = inspect(pruned).macs
    assert counted is not None
    np.testing.assert_allclose(counted, work.left, rtol=1e-9)
    assert work.left <= work.total


@EXAMPLES
@given(networks())
def test_widths_are_what_a_class_takes_from_a_layer(proto):
    channels = ChannelGraph(ir.from_proto(proto))
    written = [Counter(channels.classes.roots(site.labels).tolist()) for site in channels.writes]
    for family in families(channels, Room(channels, 1)):
        for root in family.roots:
            assert family.width == min(counts[root] for counts in written if root in counts)
