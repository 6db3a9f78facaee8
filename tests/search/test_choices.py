"""What can be chosen together, and the pipeline that makes it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.model import fix_inputs
from graphopt.passes.base import Context
from graphopt.passes.low_rank_split import LowRankSplit
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.quantize_int4 import QuantizeInt4
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.passes.refit_layers import RefitLayers
from graphopt.pipeline import Pipeline
from graphopt.search.choices import Choice, pipeline_of, with_choice
from graphopt.search.latency_table import LatencyTable
from graphopt.search.layers import Amounts, amounts, differing, labels, origin
from graphopt.search.paths import path

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits" / "digits.onnx"


def choice(name: str, site: str, value: str, noise: float, nodes=None, **after: float) -> Choice:
    changed = {layer: Amounts(macs, 4 * macs) for layer, macs in after.items()}
    return Choice(name, site, value, nodes or (site,), changed, noise, None)


def test_layers_are_known_by_the_node_they_stand_in_for():
    originals = {"conv", "conv_1", "add"}
    assert origin("conv", originals) == "conv"
    assert origin("conv_1", originals) == "conv_1"
    assert origin("conv_1_split2", originals) == "conv_1"
    assert origin("conv_split1", originals) == "conv"
    assert origin("convolution", originals) is None
    assert origin("other_1", originals) is None


def test_layers_that_went_away_differ_by_having_nothing():
    before = {"a": Amounts(10, 4), "b": Amounts(5, 2)}
    after = {"a": Amounts(10, 4), "add": Amounts(1, 1)}
    assert differing(before, after) == {"b": Amounts(0, 0), "add": Amounts(1, 1)}


def test_a_merged_block_takes_choices_inside_it_along():
    inside = choice("low-rank-split", "b.conv", "b.conv:8", 0.1, **{"b.conv": 50})
    block = choice("merge-blocks", "b.add", "b.add:1", 0.2, ("b.conv",), **{"b.conv": 0, "b.add": 10})
    taken = with_choice({inside.place: inside}, block)
    assert taken == {block.place: block}
    assert with_choice({block.place: block}, inside) is None
    outside = choice("low-rank-split", "conv", "conv:8", 0.1, conv=50)
    assert with_choice({block.place: block}, outside) == {block.place: block, outside.place: outside}


def test_what_quantizes_finds_no_layer_that_was_renamed():
    split = replace(choice("low-rank-split", "conv", "conv:svd:8", 0.1, conv=50), renames=True)
    pruned = choice("prune-channels", "conv", "conv:16", 0.1, conv=50)
    stored = replace(choice("quantize-int4", "conv", "conv", 0.1, conv=100), quantizes=True)
    assert with_choice({split.place: split}, stored) is None
    assert with_choice({stored.place: stored}, split) == {split.place: split}
    assert with_choice({pruned.place: pruned}, stored) == {pruned.place: pruned, stored.place: stored}
    assert with_choice({pruned.place: pruned}, split) == {pruned.place: pruned, split.place: split}


def test_of_one_site_the_last_choice_counts():
    mild, deep = (choice("prune-channels", "a", f"a:{n}", 0.1, a=n) for n in (48, 32))
    assert with_choice({mild.place: mild}, deep) == {deep.place: deep}


def test_the_pipeline_takes_what_was_chosen_in_the_order_of_the_passes():
    offering = [PruneChannels(), LowRankSplit()]
    base = Pipeline.parse("quantize-int8{exclude=[a,b]}")
    split = replace(choice("low-rank-split", "a", "a:svd:8", 0.1, a=5), renames=True)
    chosen = [split, choice("prune-channels", "c", "c:16", 0.1, c=5)]
    made = pipeline_of({each.place: each for each in chosen}, offering, base)
    assert made.passes == (
        PruneChannels(channels=("c:16",)),
        LowRankSplit(ranks=("a:svd:8",)),
        RefitLayers(),
        QuantizeInt8(exclude=("b",)),  # `a` is not there under its name
    )
    assert Pipeline.parse(str(made)) == made
    assert pipeline_of({}, offering, base) == base


def test_what_quantizes_comes_behind_the_fit_and_before_what_quantizes_the_rest():
    offering = [PruneChannels(), QuantizeInt4()]
    base = Pipeline.parse("equalize-layers,quantize-int8")
    stored = replace(choice("quantize-int4", "a", "a", 0.1, a=100), quantizes=True)
    pruned = choice("prune-channels", "c", "c:16", 0.1, c=5)
    made = pipeline_of({each.place: each for each in (stored, pruned)}, offering, base)
    assert [each.name for each in made.passes] == [
        "prune-channels", "refit-layers", "equalize-layers", "quantize-int4", "quantize-int8",
    ]  # fmt: skip
    assert QuantizeInt4(layers=("a",)) in made.passes
    alone = pipeline_of({stored.place: stored}, offering, Pipeline.parse("equalize-layers"))
    assert [each.name for each in alone.passes] == ["equalize-layers", "quantize-int4"]


def test_stored_weights_count_with_the_layer_that_reads_them():
    model = fix_inputs(models.load(DIGITS), {"image": (1, 1, 16, 16)})
    stored = QuantizeInt4(method="nearest", correct_bias=False).run(model.clone(), Context()).model
    before, after = (amounts(each, labels(model)) for each in (model, stored))
    assert before.keys() == after.keys()
    changed = differing(before, after)
    assert changed and all(after[layer].macs == before[layer].macs for layer in changed)
    assert sum(each.bytes for each in after.values()) == models.parameter_bytes(stored)


def table() -> LatencyTable:
    known = LatencyTable({"a": 100.0, "b": 100.0}, {"a": 10.0, "b": 20.0}, 5.0)
    known.add("p", {"a": Amounts(50, 0), "b": Amounts(50, 0)}, {"a": 6.0, "b": 20.0})
    known.add("p", {"a": Amounts(25, 0)}, {"a": 5.0})
    known.add("m", {"new": Amounts(40, 0), "b": Amounts(0, 0)}, {"new": 3.0})
    return known


@pytest.mark.parametrize(("macs", "seconds"), [(100, 10), (75, 8), (50, 6), (37.5, 5.5), (25, 5), (12.5, 4.5)])
def test_time_is_interpolated_between_what_was_measured(macs, seconds):
    chosen = choice("p", "a", "a:x", 0.1, a=macs)
    assert table().predict({chosen.place: chosen}) == pytest.approx(seconds + 25)


def test_several_choices_on_a_layer_multiply_and_those_of_one_pass_share_arithmetic():
    one, two = choice("p", "x", "x:1", 0.1, a=50), choice("p", "y", "y:1", 0.1, a=50)
    assert table().predict({one.place: one, two.place: two}) == pytest.approx(25 + 5.0)
    other = choice("q", "a", "a:1", 0.1, a=50)  # never timed: promises nothing
    assert table().predict({one.place: one, other.place: other}) == pytest.approx(25 + 6.0)


def test_a_layer_stored_otherwise_takes_what_was_timed():
    known = table()
    known.add("s", {"a": Amounts(100, 12), "b": Amounts(100, 12)}, {"a": 8.0, "b": 21.0})
    assert known.useless("s", ["b"]) and not known.useless("s", ["a"])
    assert not known.useless("s", ["a", "b"]) and not known.useless("s", ["c"]) and not known.useless("p", ["a"])
    stored = choice("s", "a", "a", 0.1, a=100)
    assert known.predict({stored.place: stored}) == pytest.approx(25 + 8)
    known.store("s", {"a": 9.0})
    assert known.predict({stored.place: stored}) == pytest.approx(25 + 9)
    known.store("s", {"a": 8.0})
    pruned = choice("p", "a", "a:x", 0.1, a=50)
    assert known.predict({each.place: each for each in (stored, pruned)}) == pytest.approx(25 + 10 * 0.8 * 0.6)
    known.forget("s")
    assert known.useless("s", ["a"]) and known.predict({stored.place: stored}) == pytest.approx(35)


def test_a_layer_that_goes_away_takes_no_time_and_a_new_one_its_own():
    merged = choice("m", "new", "new:1", 0.1, ("b",), b=0, new=40)
    assert table().predict({merged.place: merged}) == pytest.approx(10 + 3 + 5)


LEVELS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.001, 0.2)), max_size=3)


@given(sites=st.lists(LEVELS, min_size=1, max_size=4))
def test_each_step_of_a_path_is_as_cheap_as_any_selection_on_the_hull(sites):
    """By brute force: no selection has less noise for at most the cost of a step on the lower convex hull."""
    macs = {f"s{i}": 10.0 for i in range(len(sites))}

    def cost(selection) -> float:
        left = dict(macs)
        for each in selection.values():
            left.update({layer: amount.macs for layer, amount in each.after.items()})
        return sum(left.values())

    choices = [
        choice("p", f"s{i}", f"s{i}:{j}", noise, **{f"s{i}": left})
        for i, levels in enumerate(sites)
        for j, (left, noise) in enumerate(levels)
    ]
    steps = path(choices, cost, finest=0.0)
    assert all(a.cost > b.cost for a, b in pairwise(steps))
    options = [[(10.0, 0.0), *levels] for levels in sites]
    everything = [(sum(c for c, _ in picks), sum(n for _, n in picks)) for picks in product(*options)]
    # The greedy walk takes single steps: it reaches the hull's first edge exactly, and never leaves a saving behind.
    slopes = [(cost({}) - c) / n for c, n in everything if n > 0 and c < cost({})]
    if slopes:
        assert len(steps) > 1
        first = (steps[0].cost - steps[1].cost) / steps[1].noise
        assert first == pytest.approx(max(slopes))
    for step in steps:
        assert step.noise == pytest.approx(sum(each.noise for each in step.selection.values()))
    if steps[-1].noise < 0.8:
        assert steps[-1].cost == pytest.approx(min(c for c, _ in everything))


def test_steps_too_close_together_are_left_out():
    choices = [choice("p", f"s{i}", f"s{i}:1", 0.001 * (i + 1), **{f"s{i}": 9.9}) for i in range(30)]

    def cost(selection) -> float:
        return 300.0 - 0.1 * len(selection)

    steps = path(choices, cost, finest=0.005)
    gaps = [1 - b.cost / a.cost for a, b in pairwise(steps)]
    assert np.all(np.array(gaps[:-1]) >= 0.0049)
    assert steps[-1].cost == pytest.approx(297.0)
