"""Segmentation on pictures that show one thing: is the commonest class that is not background the right one?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays
from tasks.pictures import others, padded, voc_pictures

SIDE = 513
CALIBRATE, JUDGE = 24, 8


@dataclass(frozen=True)
class Segmentation(Task):
    """DeepLabV3 of 21 VOC classes: RGB, long side to 513, padded with grey, x / 127.5 - 1."""

    def arguments(self, work: Path) -> list[str]:
        files = others(voc_pictures(), CALIBRATE + JUDGE)
        make = lambda: {"input": np.stack([_feeds(file)[0]["input"] for file in files])}  # noqa: E731
        return from_arrays(arrays_file(work, self.name, make), CALIBRATE)

    def outcome(self, run: Run, work: Path) -> Outcome:
        files, counts, maps = voc_pictures(), [], []
        for file, _ in files:
            feeds, (height, width) = _feeds(file)
            classes = run(feeds)["logits"][0].argmax(axis=0).astype(np.uint8)
            counts.append(np.bincount(classes[:height, :width].ravel(), minlength=21))
            classes[height:], classes[:, width:] = 255, 255
            maps.append(classes[::4, ::4])
        return {"counts": np.stack(counts), "maps": np.stack(maps), "labels": np.array([label for _, label in files])}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        right = _dominant(outcome) == outcome["labels"]
        return {f"% dominant class right of {len(right)}": 100 * float(right.mean())}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        inside = reference["maps"] < 255
        return {"% same pixels": 100 * float((outcome["maps"] == reference["maps"])[inside].mean())}


def _dominant(outcome: Outcome) -> np.ndarray:
    """The class after background, 0 where all is background."""
    counts = outcome["counts"][:, 1:]
    return np.where(counts.max(axis=1) > 0, counts.argmax(axis=1) + 1, 0)


def _feeds(file: Path) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
    picture, (height, width) = padded(file, SIDE)
    canvas = np.zeros((SIDE, SIDE, 3), np.float32)
    canvas[:height, :width] = picture / np.float32(127.5) - 1
    return {"input": np.ascontiguousarray(canvas.transpose(2, 0, 1))[None]}, (height, width)
