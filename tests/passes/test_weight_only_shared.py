"""quantize-int4 and prune-weights on trained networks with real pictures."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from tests.passes import oracle

PREPARE = "simplify,fold-batch-norm"


def cifar(images: Path, folder: Path) -> Path:
    """The CIFAR-10 pictures unpacked, with labels."""
    with zipfile.ZipFile(images / "cifar10_test2000.zip") as archive:
        archive.extractall(folder)
    with (folder / "labels.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file", "class_index"])
        for file in sorted(folder.glob("*/*.jpg")):
            writer.writerow([file.relative_to(folder), file.parent.name.partition("_")[0]])
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet20_cifar10", "resnet56_cifar10"])
def test_a_residual_network_is_six_times_smaller_within_a_point(name, shared_model, shared_images, tmp_path):
    source = models.load(shared_model(name))
    signature = models.signature(source)
    data = load_dataset(cifar(shared_images, tmp_path), signature, "cifar10")
    calibration, evaluation = data.draw(200, 0)
    exact, _ = Pipeline.parse(PREPARE).run(source, Context())
    before = evaluate(shared_model(name), evaluation, signature=signature).value
    made, (record,) = Pipeline.parse("quantize-int4").run(exact, Context(data=calibration))
    assert models.parameter_bytes(exact) >= 6 * models.parameter_bytes(made) and not record.skipped
    assert before - evaluate(models.to_bytes(made), evaluation, signature=signature).value <= 1.0


@pytest.mark.parametrize("name", ["mobilenetv1_075", "stories260k", "super_resolution", "magika", "gtcrn"])
@pytest.mark.parametrize("text", ["quantize-int4{method=nearest}", "prune-weights{method=magnitude,sparsity=0.2}"])
def test_other_networks_stay_valid_and_run(name, text, shared_model):
    source = models.load(shared_model(name))
    exact, _ = Pipeline.parse("simplify").run(source, Context())
    made, (record,) = Pipeline.parse(text).run(exact, Context())
    assert record.applied and models.signature(made) == models.signature(exact)
    feeds = oracle.random_feeds(made, oracle.SHAPES[name])
    for wanted, found in zip(oracle.run(exact, feeds), oracle.run(made, feeds), strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype and np.isfinite(found).all()
