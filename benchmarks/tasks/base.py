"""A task: the data a model is calibrated and judged on, and the figure of merit of its kind."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shared_data import SHARED

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""One inference: `OnnxRuntimeEngine.run` or `Artifact.run`."""
Outcome = dict[str, np.ndarray]
"""What the figure needs of the outputs."""


@dataclass(frozen=True)
class Task(abc.ABC):
    """One model and what it is for. All feeds have the shapes that it is compiled for."""

    name: str
    products: bool = False
    """Whether it has matrix products with constant weights: what is stored in 4 bits."""

    @property
    def path(self) -> Path:
        return SHARED / "models" / f"{self.name}.onnx"

    @property
    def inputs(self) -> tuple[str, ...]:
        """What `--input` says, where dimensions other than the batch are dynamic."""
        return ()

    @abc.abstractmethod
    def arguments(self, work: Path) -> list[str]:
        """`--calib` and what belongs to it; files are made below `work`. What `figure` judges is not in it where the
        figure rests on labels."""

    @abc.abstractmethod
    def outcome(self, run: Run, work: Path) -> Outcome:
        """Run the model on all that the figure is of."""

    @abc.abstractmethod
    def figures(self, outcome: Outcome) -> dict[str, float]:
        """The task's own figure, by its unit: `% top-1 of 800`."""

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        """How far `outcome` is from that of the model as it came."""
        return {}


def arrays_file(work: Path, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> Path:
    """`name`.npz below `work`, made if it is not there."""
    file = work / f"{name}.npz"
    if not file.is_file():
        arrays = make()
        partial = file.with_name(f"{name}.partial.npz")
        with partial.open("wb") as handle:
            np.savez(handle, **arrays)  # pyright: ignore[reportArgumentType]
        partial.replace(file)
    return file


def from_arrays(file: Path, calibrate: int) -> list[str]:
    """Options: `calibrate` samples of the file, drawn by the seed, calibrate; the others judge."""
    return ["--calib", str(file), "--calib-samples", str(calibrate)]


def psnr_db(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Peak signal-to-noise ratio, 10 log10(peak^2 / mean (a-b)^2); infinite when equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    """10 log10(sum wanted^2 / sum (wanted - got)^2); infinite when equal."""
    noise = float(np.square(wanted.astype(np.float64) - got).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(wanted.astype(np.float64)).sum() / noise))
