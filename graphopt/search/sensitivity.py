"""What each offer does to the outputs, taken alone: signal-to-noise, and whether the largest output stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.accuracy import is_classifier
from graphopt.calibration import Dataset
from graphopt.calibration.observe import open_session
from graphopt.model import Signature, to_bytes

SAMPLES = 32
BATCH = 8


@dataclass(frozen=True)
class Effect:
    """`noise`: error energy over output energy, the worst output's. `agreement` in percent; None without classes."""

    noise: float
    agreement: float | None


class Sensitivity:
    """The outputs of `reference` on a few samples of `dataset`, and what other models make of these."""

    def __init__(self, reference: ir.Model, dataset: Dataset, signature: Signature, seed: int):
        self._data, _ = dataset.draw(min(SAMPLES, len(dataset)), seed)
        self._classes = is_classifier(signature)
        self._wanted = self._outputs(reference)

    def of(self, model: ir.Model) -> Effect:
        """The effect of `model` in place of the reference. Raises ModelError: it cannot run."""
        got = self._outputs(model)
        noise = [_noise(wanted, found) for wanted, found in zip(self._wanted, got, strict=True)]
        agreement = None
        if self._classes:
            same = np.argmax(self._wanted[0], 1) == np.argmax(got[0], 1)
            agreement = 100.0 * float(same.mean())
        return Effect(max(noise, default=0.0), agreement)

    def _outputs(self, model: ir.Model) -> list[np.ndarray]:
        session = open_session(to_bytes(model))
        batches = [[np.asarray(each) for each in session.run(None, dict(feeds))] for feeds in self._feeds()]
        columns = [np.concatenate([np.atleast_1d(batch[i]) for batch in batches]) for i in range(len(batches[0]))]
        return [column.astype(np.float64) for column in columns if column.dtype.kind == "f"]

    def _feeds(self) -> Sequence[Mapping[str, np.ndarray]]:
        return tuple(self._data.batches(BATCH if self._data.fixed_batch is None else 1))


def _noise(wanted: np.ndarray, got: np.ndarray) -> float:
    signal = float(np.square(wanted).sum())
    error = float(np.square(wanted - got).sum())
    return error / signal if signal > 0 else float(error > 0)
