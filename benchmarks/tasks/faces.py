"""A face detector on pictures without labels: in how many it finds a face, and whether the boxes are the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays
from tasks.pictures import all_pictures, spread, stretched

SURE = 0.7
"""A score above which a place counts as a face."""
OVERLAP = 0.5
"""Boxes of one face: intersection over union above this."""
MOST = 16
"""Boxes kept of a picture."""
CALIBRATE, JUDGE = 64, 32


@dataclass(frozen=True)
class FaceDetector(Task):
    """Ultra-Light RFB-320: RGB stretched to 320x240, (x - 127) / 128."""

    def arguments(self, work: Path) -> list[str]:
        files = spread(all_pictures(), CALIBRATE + JUDGE)
        make = lambda: {"input": np.stack([_feeds(file)["input"] for file in files])}  # noqa: E731
        return from_arrays(arrays_file(work, self.name, make), CALIBRATE)

    def outcome(self, run: Run, work: Path) -> Outcome:
        files = all_pictures()
        boxes, best = np.full((len(files), MOST, 4), np.nan, np.float32), np.zeros(len(files), np.float32)
        for index, file in enumerate(files):
            outputs = run(_feeds(file))
            scores = outputs["scores"][0, :, 1]
            best[index] = scores.max()
            kept = _suppressed(outputs["boxes"][0], scores)
            boxes[index, : len(kept)] = kept
        return {"boxes": boxes, "best": best}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        return {f"pictures of {len(outcome['best'])} with a face": float((outcome["best"] > SURE).sum())}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        found = wanted = matched = 0
        for got, boxes in zip(outcome["boxes"], reference["boxes"], strict=True):
            got, boxes = got[~np.isnan(got[:, 0])], boxes[~np.isnan(boxes[:, 0])]
            found, wanted = found + len(got), wanted + len(boxes)
            if len(got) and len(boxes):
                matched += int((_overlaps(boxes, got).max(axis=1) > OVERLAP).sum())
        return {"% same boxes": 200 * matched / max(1, found + wanted)}


def _feeds(file: Path) -> dict[str, np.ndarray]:
    picture = (stretched(file, 320, 240).astype(np.float32) - 127) / 128
    return {"input": np.ascontiguousarray(picture.transpose(2, 0, 1))[None]}


def _suppressed(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The best boxes, none of which overlaps a better one."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > SURE]
    kept: list[int] = []
    while len(order) and len(kept) < MOST:
        kept.append(int(order[0]))
        order = order[_overlaps(boxes[order[:1]], boxes[order])[0] <= OVERLAP]
    return boxes[kept]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (x0, y0, x1, y1): (len(a), len(b))."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    area = lambda boxes: np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)  # noqa: E731
    return both / np.maximum(area(a)[:, None] + area(b)[None] - both, 1e-12)
