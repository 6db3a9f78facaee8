"""low-rank-split on a trained network with real pictures."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from graphopt import model as models
from graphopt.calibration import load_dataset
from graphopt.capabilities import x86_for_mcpu
from graphopt.inspection import inspect
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from tests.passes.low_rank import outputs


@pytest.fixture
def pictures(shared_images, tmp_path):
    """A folder of 200 pictures of CIFAR-10."""
    archive = shared_images / "cifar10_test2000.zip"
    if not archive.is_file():
        pytest.skip("the shared CIFAR-10 pictures are not on this machine (set GRAPHOPT_SHARED)")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path, [name for name in opened.namelist() if name.endswith(".jpg")][::10])
    return tmp_path


@pytest.mark.long
def test_fitting_outputs_leaves_less_noise_on_other_pictures_than_fitting_weights(shared_model, pictures):
    source = models.load(shared_model("resnet20_cifar10"))
    data = load_dataset(pictures, models.signature(source), "cifar10")
    calibration, rest = data.draw(100, 0)
    context = Context(x86_for_mcpu("cascadelake"), data=calibration)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)
    wanted = outputs(exact, rest)
    fixed = {"input": (1, 3, 32, 32)}
    whole = inspect(models.fix_inputs(exact, fixed)).macs
    snr_db = {}
    for options in ("fit=outputs,portions=20", "fit=outputs,portions=1", "fit=weights"):
        after, (record,) = Pipeline.parse(f"low-rank-split{{method=spatial,ratio=0.7,{options}}}").run(exact, context)
        macs = inspect(models.fix_inputs(after, fixed)).macs
        assert record.applied == 18 and whole is not None and macs is not None and macs < 0.7 * whole
        snr_db[options] = 10 * np.log10(np.square(wanted).sum() / np.square(outputs(after, rest) - wanted).sum())
    alone, none = snr_db["fit=outputs,portions=1"], snr_db["fit=weights"]
    assert alone > none + 3 and snr_db["fit=outputs,portions=20"] > alone, snr_db
