"""What each offer does to the outputs, taken alone: how far they move, and whether the largest stays the same.

Of a classifier, how far is the mean Kullback-Leibler divergence of the class probabilities, in nats: what all logits
share, or what happens among classes that are out of the question, says nothing about which class wins. Of other models
it is the energy of the error over that of the outputs. Both are quadratic where changes are small and independent, so
those of several changes add up.
"""

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
"""Enough to tell choices apart."""
BATCH = 8
LEAST_PROBABILITY = 1e-9
"""What a softmax in float32 leaves of less is rounding."""


@dataclass(frozen=True)
class Effect:
    """`noise`: nats of divergence, or the worst error energy over output energy. `agreement` in percent; None without
    classes."""

    noise: float
    agreement: float | None


class Sensitivity:
    """The outputs of `reference` on `dataset`, a few samples, and what other models make of these."""

    def __init__(self, reference: ir.Model, dataset: Dataset, signature: Signature):
        self._data = dataset
        self.classes = is_classifier(signature)
        self._wanted = self._outputs(reference)

    def of(self, model: ir.Model) -> Effect:
        """The effect of `model` in place of the reference. Raises ModelError: it cannot run."""
        got = self._outputs(model)
        if self.classes:
            same = np.argmax(self._wanted[0], 1) == np.argmax(got[0], 1)
            return Effect(_divergence(self._wanted[0], got[0]), 100.0 * float(same.mean()))
        noise = [_noise(wanted, found) for wanted, found in zip(self._wanted, got, strict=True)]
        return Effect(max(noise, default=0.0), None)

    def _outputs(self, model: ir.Model) -> list[np.ndarray]:
        session = open_session(to_bytes(model))
        batches = [[np.asarray(each) for each in session.run(None, dict(feeds))] for feeds in self._feeds()]
        columns = [np.concatenate([np.atleast_1d(batch[i]) for batch in batches]) for i in range(len(batches[0]))]
        return [column.astype(np.float64) for column in columns if column.dtype.kind == "f"]

    def _feeds(self) -> Sequence[Mapping[str, np.ndarray]]:
        return tuple(self._data.batches(BATCH if self._data.fixed_batch is None else 1))


def _divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """Mean over samples of KL(p || q), nats."""
    p, q = _log_probabilities(wanted), _log_probabilities(got)
    return max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean()))


def _log_probabilities(outputs: np.ndarray) -> np.ndarray:
    """Of outputs that are logits, or probabilities already."""
    if outputs.min() >= 0.0 and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3):
        return np.log(np.maximum(outputs, LEAST_PROBABILITY))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _noise(wanted: np.ndarray, got: np.ndarray) -> float:
    signal = float(np.square(wanted).sum())
    error = float(np.square(wanted - got).sum())
    return error / signal if signal > 0 else float(error > 0)
