"""Detectors of COCO's classes on pictures that show one thing: is the best class of the whole picture the right one,
and is the right one seen at all?"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays
from tasks.pictures import coco_pictures, others, padded, stretched

SEEN = 0.3
"""A score above which a class counts as seen in the picture."""
CALIBRATE, JUDGE = 48, 24


@dataclass(frozen=True)
class Detector(Task):
    """A detector whose scores of all places and classes are (places, 80) once `scores` has read them."""

    @abc.abstractmethod
    def feeds(self, file: Path) -> dict[str, np.ndarray]:
        """The picture as the model takes it."""

    @abc.abstractmethod
    def scores(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """(places, 80), from 0 to 1."""

    def arguments(self, work: Path) -> list[str]:
        def make() -> dict[str, np.ndarray]:
            feeds = [self.feeds(file) for file in others(coco_pictures(), CALIBRATE + JUDGE)]
            return {name: np.stack([each[name] for each in feeds]) for name in feeds[0]}

        return from_arrays(arrays_file(work, self.name, make), CALIBRATE)

    def outcome(self, run: Run, work: Path) -> Outcome:
        files = coco_pictures()
        best = [self.scores(dict(run(self.feeds(file)))).max(axis=0) for file, _ in files]
        return {"best": np.stack(best), "labels": np.array([label for _, label in files])}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        best, labels = outcome["best"], outcome["labels"]
        right = best.argmax(axis=1) == labels
        seen = best[np.arange(len(labels)), labels] > SEEN
        shares = float(right.mean()), float(seen.mean())
        return {f"% best class right of {len(labels)}": 100 * shares[0], f"% seen above {SEEN}": 100 * shares[1]}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        same = outcome["best"].argmax(axis=1) == reference["best"].argmax(axis=1)
        return {"% same best class": 100 * float(same.mean())}


@dataclass(frozen=True)
class YoloX(Detector):
    """BGR 0..255, letterboxed with 114 at the right and the bottom; [box, objectness, classes] of 3549 places."""

    def feeds(self, file: Path) -> dict[str, np.ndarray]:
        picture, (height, width) = padded(file, 416)
        canvas = np.full((416, 416, 3), 114, np.float32)
        canvas[:height, :width] = picture[..., ::-1]
        return {"images": np.ascontiguousarray(canvas.transpose(2, 0, 1))[None]}

    def scores(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        found = outputs["output"][0]
        return found[:, 4:5] * found[:, 5:]


@dataclass(frozen=True)
class NanoDet(Detector):
    """BGR stretched to 320x320 and standardised; classes at three strides."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("data:1,3,320,320",)

    def feeds(self, file: Path) -> dict[str, np.ndarray]:
        picture = stretched(file, 320, 320)[..., ::-1].astype(np.float32)
        mean = np.array([103.53, 116.28, 123.675], np.float32)
        std = np.array([57.375, 57.12, 58.395], np.float32)
        return {"data": np.ascontiguousarray(((picture - mean) / std).transpose(2, 0, 1))[None]}

    def scores(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([outputs[f"cls_{stride}"][0] for stride in (8, 16, 32)])
