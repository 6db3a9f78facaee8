"""Pictures into classes: top-1 on the labelled pictures that did not calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.calibration import load_dataset
from tasks.base import Outcome, Run, Task, from_arrays

CALIBRATE, SEED = 200, 0
"""Drawn to calibrate, by the default of `--seed`; the others are what `graphopt optimize` judges on too."""


@dataclass(frozen=True)
class Classification(Task):
    """One of the classifiers of `shared_data`."""

    @property
    def _about(self) -> Classifier:
        return next(each for each in CLASSIFIERS if each.name == self.name)

    def arguments(self, work: Path) -> list[str]:
        preprocess = ["--preprocess", self._about.preprocess] if self._about.preprocess else []
        return [*from_arrays(self._about.data_path(work), CALIBRATE), *preprocess]

    def outcome(self, run: Run, work: Path) -> Outcome:
        signature = models.signature(models.load(self.path))
        data = load_dataset(self._about.data_path(work), signature, self._about.preprocess)
        _, held_out = data.draw(CALIBRATE, SEED)
        output = signature.outputs[0].name
        classes = [int(np.argmax(run(feeds)[output])) for feeds in held_out.batches(1)]
        assert held_out.labels is not None
        return {"classes": np.array(classes), "labels": held_out.labels}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        right = outcome["classes"] == outcome["labels"]
        return {f"% top-1 of {len(right)}": 100 * float(right.mean())}
