"""Pictures into pictures: peak signal-to-noise ratio to what the float model makes."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays, psnr_db
from tasks.pictures import all_pictures, cropped, spread

CALIBRATE, JUDGE, COMPARE = 32, 8, 16


@dataclass(frozen=True)
class _PictureToPicture(Task):
    peak: ClassVar[float]
    """The largest value of a picture that comes out."""

    @abc.abstractmethod
    def feeds(self, file: Path) -> np.ndarray:
        """The picture as the input `input` takes it, with a batch of one."""

    def arguments(self, work: Path) -> list[str]:
        files = spread(all_pictures()[1::2], CALIBRATE + JUDGE)
        make = lambda: {"input": np.concatenate([self.feeds(file) for file in files])}  # noqa: E731
        return from_arrays(arrays_file(work, self.name, make), CALIBRATE)

    def outcome(self, run: Run, work: Path) -> Outcome:
        files = spread(all_pictures()[::2], COMPARE)
        return {"pictures": np.concatenate([run({"input": self.feeds(file)})["output"] for file in files])}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        return {}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        pairs = zip(outcome["pictures"], reference["pictures"], strict=True)
        each = [psnr_db(np.clip(a, 0, self.peak), np.clip(b, 0, self.peak), self.peak) for a, b in pairs]
        return {f"dB PSNR to float, mean of {len(each)}": float(np.mean(each)), "lowest": min(each)}


@dataclass(frozen=True)
class SuperResolution(_PictureToPicture):
    """Luma, 0..1, three times as wide and high."""

    peak = 1.0

    def feeds(self, file: Path) -> np.ndarray:
        luma = cropped(file, 224).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return luma[None, None] / 255


@dataclass(frozen=True)
class StyleTransfer(_PictureToPicture):
    """RGB 0..255, in and out."""

    peak = 255.0

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("input:1,3,256,256",)

    def feeds(self, file: Path) -> np.ndarray:
        return np.ascontiguousarray(cropped(file, 256).transpose(2, 0, 1))[None].astype(np.float32)
