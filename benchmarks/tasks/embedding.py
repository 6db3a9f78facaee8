"""Embeddings of pictures without labels: cosine to the float model's, and whether the nearest neighbour is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays
from tasks.pictures import all_pictures, spread, stretched

CALIBRATE, JUDGE, COMPARE = 64, 64, 200


@dataclass(frozen=True)
class Embedding(Task):
    """FaceNet: RGB stretched to 160x160, (x - 127.5) / 127.5; 512 numbers, compared by their cosine."""

    def arguments(self, work: Path) -> list[str]:
        files = spread(all_pictures()[1::2], CALIBRATE + JUDGE)
        make = lambda: {"input": np.concatenate([_feeds(file)["input"] for file in files])}  # noqa: E731
        return [*from_arrays(arrays_file(work, self.name, make), CALIBRATE), "--metric", "snr"]

    def outcome(self, run: Run, work: Path) -> Outcome:
        files = spread(all_pictures()[::2], COMPARE)
        found = np.concatenate([run(_feeds(file))["embedding"] for file in files])
        return {"embedding": found / np.linalg.norm(found, axis=1, keepdims=True)}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        return {}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        cosine = (outcome["embedding"] * reference["embedding"]).sum(axis=1)
        same = _nearest(outcome["embedding"]) == _nearest(reference["embedding"])
        return {
            "mean cosine to float": float(cosine.mean()),
            "lowest cosine": float(cosine.min()),
            f"% same nearest of {len(same)}": 100 * float(same.mean()),
        }


def _nearest(rows: np.ndarray) -> np.ndarray:
    likeness = rows @ rows.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(axis=1)


def _feeds(file: Path) -> dict[str, np.ndarray]:
    picture = (stretched(file, 160, 160).astype(np.float32) - 127.5) / 127.5
    return {"input": np.ascontiguousarray(picture.transpose(2, 0, 1))[None]}
