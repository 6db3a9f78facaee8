"""Halves: the pass, and the layer within it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import calibration
from graphopt import model as models
from graphopt.ci.bisect import Finding, bisect, first_bad
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.recovery import quantized_layers

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@given(st.integers(1, 300), st.data())
def test_the_first_bad_is_found_with_few_questions(count, data):
    wanted = data.draw(st.integers(1, count))
    asked: list[int] = []

    def bad(k: int) -> bool:
        asked.append(k)
        return k >= wanted

    assert first_bad(count, bad) == wanted
    assert 0 not in asked
    assert count not in asked
    assert len(asked) <= (count - 1).bit_length()


@given(st.lists(st.booleans(), min_size=1))
def test_where_it_is_not_monotone_an_edge_is_found(middle):
    answers = [False, *middle, True]
    k = first_bad(len(answers) - 1, lambda k: answers[k])
    assert answers[k]
    assert not answers[k - 1]


@pytest.fixture(scope="module")
def source():
    return models.load(DIGITS / "digits.onnx")


@pytest.fixture(scope="module")
def context(source):
    data = calibration.load_dataset(DIGITS / "calib.npz", models.signature(source))
    return Context(data=data.draw(16, 0)[0])


CLEAN = "simplify{use_onnxsim=false},fold-batch-norm"
INT8 = f"{CLEAN},quantize-int8,remove-dead-channels"


def test_a_layer_that_may_not_be_quantized_is_named(source, context):
    names = quantized_layers(Pipeline.parse(INT8).run(source, context)[0])
    for wanted in (names[0], names[-2]):
        found = bisect(
            source,
            Pipeline.parse(INT8),
            context,
            lambda model, file, wanted=wanted: Finding(wanted in quantized_layers(model), "looked"),
        )
        assert found.guilty is not None
        assert found.guilty.startswith("quantize-int8")
        assert found.position == 3
        assert found.setting == f"layer {wanted}"


def test_a_pass_without_settings_of_layers(source, context):
    def batch_norms(model, file) -> Finding:
        count = sum(node.op_type == "BatchNormalization" for node in model.graph)
        return Finding(count == 0, f"{count} left")

    found = bisect(source, Pipeline.parse(INT8), context, batch_norms)
    assert (found.guilty, found.setting) == ("fold-batch-norm", None)
    assert [trial.what for trial in found.trials][:2] == ["all 4 passes", "no pass"]
    assert "no settings of single layers" in found.notes[0]


def test_what_a_pass_was_told_to_take_is_bisected(source):
    """Splitting the second of three layers is what makes one layer too many."""
    plain = Context()  # without data the factors are not fitted to outputs, which takes long
    before = Pipeline.parse(CLEAN).run(source, plain)[0]
    names = [node.name for node in before.graph if node.op_type == "Conv"][1:]
    ranks = ",".join(f'"{name}:4"' for name in names)

    def layers(model) -> int:
        return sum(node.op_type in ("Conv", "Gemm") for node in model.graph)

    few = Pipeline.parse(f'{CLEAN},low-rank-split{{ranks=["{names[0]}:4"]}}').run(source, plain)[0]
    allowed = layers(few)
    assert allowed > layers(before)
    found = bisect(
        source,
        Pipeline.parse(f"{CLEAN},low-rank-split{{ranks=[{ranks}]}}"),
        plain,
        lambda model, file: Finding(layers(model) > allowed, f"{layers(model)} layers"),
    )
    assert found.position == 3
    assert found.setting == f"ranks: {names[1]}:4"


def test_nothing_broken_and_broken_from_the_start(source, context):
    fine = bisect(
        source, Pipeline.parse("simplify{use_onnxsim=false}"), context, lambda model, file: Finding(False, "")
    )
    assert fine.guilty is None
    assert len(fine.trials) == 1
    hopeless = bisect(
        source, Pipeline.parse("simplify{use_onnxsim=false}"), context, lambda model, file: Finding(True, "")
    )
    assert hopeless.guilty is None
    assert "by itself" in hopeless.notes[0]
