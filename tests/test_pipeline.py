from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import Pass, PassResult, Pipeline, Skip
from graphopt.errors import DataError, PassError, SpecError, VerificationError
from graphopt.passes.base import Context, Fidelity
from graphopt.pipeline import PRESETS
from graphopt.verify import Reference
from tests.models import small_cnn


class DropIdentity(Pass):
    """A whole pass, as the README shows it."""

    fidelity = Fidelity.EXACT
    keep: tuple[str, ...] = ()

    def run(self, model: Any, context):
        skipped = []
        found = [n for n in model.graph if n.op_type == "Identity"]
        for node in found:
            if node.name in self.keep:
                skipped.append(Skip(node.name, "asked to keep it"))
                continue
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
        return PassResult(model, len(found) - len(skipped), tuple(skipped))


class ScaleWeights(Pass):
    """Wrong on purpose: claims to be exact and is not."""

    fidelity = Fidelity.EXACT
    factor: float = 1.001

    def run(self, model: Any, context):
        value = model.graph.initializers["w1"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.factor), name="w1")
        return PassResult(model, 1)


class DropOutput(Pass):
    """Wrong on purpose: changes the signature."""

    def run(self, model, context):
        model.graph.outputs[0].name = "other"
        return PassResult(model, 1)


class DropNode(Pass):
    """Wrong on purpose: leaves a dangling input."""

    def run(self, model, context):
        model.graph[2].replace_input_with(0, ir.Value(name="nowhere"))
        return PassResult(model, 1)


class NeedsData(Pass):
    def observes(self, model):
        return ("r1",)

    def run(self, model, context):
        raise AssertionError("not reached without data")


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(small_cnn())


@pytest.fixture
def reference(model, tmp_path) -> Reference:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    return Reference(model, [{"x": x}], tmp_path)


def test_a_pass_is_a_value_named_after_its_class():
    assert DropIdentity.name == "drop-identity"
    assert DropIdentity(keep=("a",)) == DropIdentity(keep=("a",))
    assert str(DropIdentity(keep=("a", "b c"))) == 'drop-identity{keep=[a,"b c"]}'
    with pytest.raises(dataclasses.FrozenInstanceError):
        DropIdentity().keep = ("x",)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("text", PRESETS.values())
def test_a_pipeline_prints_as_text_that_parses_back(text):
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_an_unknown_pass_or_option_names_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'simplify'"):
        Pipeline.parse("simplfy")
    with pytest.raises(SpecError, match="did you mean 'calibration'"):
        Pipeline.parse("quantize-int8{calibratoin=mse}")


def test_each_pass_leaves_a_record_and_the_input_is_untouched(model, reference):
    before = len(model.graph)
    result, records = Pipeline((DropIdentity(),)).run(model, Context(), reference)
    assert len(model.graph) == before
    (record,) = records
    assert (record.applied, record.nodes_before - record.nodes_after) == (1, 1)
    assert record.operators_before["Identity"] == 1
    assert "Identity" not in record.operators_after
    assert record.errors[0].max_abs_error == 0
    assert len(result.graph) == before - 1


def test_an_exact_pass_that_changes_numbers_is_refused(model, reference):
    with pytest.raises(VerificationError, match="scale-weights changed output 'y'"):
        Pipeline((ScaleWeights(),)).run(model, Context(), reference)


def test_rounding_sized_changes_pass_and_ten_times_as_much_does_not(model, reference):
    tolerance = reference.judge_model(model, Fidelity.EXACT, "nothing")[0].tolerance
    scale = max(abs(o["y"]).max() for o in reference.outputs)
    assert tolerance < 1e-4 * scale
    Pipeline((ScaleWeights(factor=1 + 2e-7),)).run(model, Context(), reference)


@pytest.mark.parametrize("wrong", [DropOutput(), DropNode()])
def test_a_pass_that_breaks_structure_is_named(model, reference, wrong):
    with pytest.raises(PassError, match=wrong.name):
        Pipeline((wrong,)).run(model, Context(), reference)


def test_a_pass_that_needs_data_says_how_to_give_some(model):
    with pytest.raises(DataError, match="--calib"):
        Pipeline((NeedsData(),)).run(model, Context())


def test_split_at_the_first_lossy_pass():
    pipeline = Pipeline((DropIdentity(), NeedsData(), DropIdentity()))
    assert pipeline.split() == (Pipeline((DropIdentity(),)), Pipeline((NeedsData(), DropIdentity())))


def test_excluding_reaches_every_pass_that_quantizes_and_no_other():
    pipeline = Pipeline.parse("simplify,quantize-int8{exclude=[a]}")
    assert str(pipeline.excluding(("b", "a"))) == "simplify,quantize-int8{exclude=[a,b]}"
    pruned = Pipeline.parse("prune-channels,low-rank-split,quantize-int8")
    assert str(pruned.excluding(("a",))) == "prune-channels,low-rank-split,quantize-int8{exclude=[a]}"
