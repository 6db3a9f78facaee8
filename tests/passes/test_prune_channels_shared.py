"""prune-channels on trained networks."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import graph as g
from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.passes.base import Context, Fidelity
from graphopt.passes.channels.choosing import Scope
from graphopt.passes.channels.masking import masked_model
from graphopt.passes.prune_channels import PruneChannels
from graphopt.pipeline import Pipeline
from graphopt.verify import Reference
from tests.passes.oracle import SHAPES, random_feeds, run

pytestmark = pytest.mark.shared
PREPARE = "simplify,fold-batch-norm"
QUICK = ("squeezenet1_1", "mnist_cnn", "resnet20_cifar10")
ALL = (*QUICK, "ultraface_rfb320", "mobilenetv2", "mobilenetv1_075", "tiny_darknet", "facenet", "deeplabv3_mnv2",
       "resnet56_cifar10", "yolox_nano", "nanodet_m", "super_resolution", "style_transfer")  # fmt: skip


def check(path, name: str, ratio: float, folder) -> None:
    source, _ = Pipeline.parse(PREPARE).run(models.load(path), Context())
    feeds = random_feeds(source, SHAPES[name])
    ways: tuple[tuple[Scope, str], ...] = (("global", "1"), ("layer", "8"))
    for scope, block in ways:
        model = source.clone()
        prune = PruneChannels(ratio=ratio, scope=scope, round_to=block, importance="norm", min_channels=1)
        plan, work = prune.plan(model, Context())
        if block == "1":
            assert work.left == pytest.approx((1 - ratio) * work.total, rel=0.05)
        masked = masked_model(plan) if g.opset_of(model) >= 9 and block == "1" else None
        plan.apply()
        models.check(model, f"{name} pruned")
        assert models.signature(model) == models.signature(source)
        if masked is not None:
            Reference(masked, [feeds], folder).judge_model(model, Fidelity.ROUNDING, "prune-channels")
        else:
            assert all(np.isfinite(y).all() for y in run(model, feeds))


@pytest.mark.parametrize("name", QUICK)
def test_valid_and_equal_to_the_masked_model(shared_model, name, tmp_path):
    check(shared_model(name), name, 0.3, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_valid_and_equal_to_the_masked_model_at_every_ratio(shared_model, name, ratio, tmp_path):
    check(shared_model(name), name, ratio, tmp_path)


@pytest.mark.long
def test_solving_again_keeps_accuracy(shared_model, tmp_path):
    """A fifth of ResNet-20's work saved, on labelled pictures that calibration has not seen."""
    from benchmarks.shared_data import CLASSIFIERS, SHARED

    which = next(each for each in CLASSIFIERS if each.name == "resnet20_cifar10")
    if not (SHARED / "images" / "cifar10_test2000.zip").is_file():
        pytest.skip("the shared CIFAR-10 pictures are not on this machine (set GRAPHOPT_SHARED)")
    source = models.load(shared_model(which.name))
    signature = models.signature(source)
    data = load_dataset(which.data_path(tmp_path), signature, which.preprocess)
    calibration, evaluation = data.draw(200, 0)
    context = Context(data=calibration)
    exact, _ = Pipeline.parse(PREPARE).run(source, context)
    top1 = {}
    for again in ("true", "false"):
        pruned, _ = Pipeline.parse(f"prune-channels{{ratio=0.2,round_to=1,reconstruct={again}}}").run(exact, context)
        top1[again] = evaluate(models.to_bytes(pruned), evaluation, signature=signature).value
    before = evaluate(models.to_bytes(exact), evaluation, signature=signature).value
    assert before - top1["true"] < 8
    assert top1["true"] > top1["false"] + 10
