"""Accuracy through the engine that delivers a candidate.

On this machine it is measured on the whole evaluation set. Where running takes long, on some of its samples only, and
these say little of a bound of one point: there the variant's drop, known of all samples in ONNX Runtime, has what
the engine adds on these few added to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.accuracy import Accuracy
from graphopt.candidates import Candidate
from graphopt.variants import Judge
from graphopt.verify import Runner


@dataclass(frozen=True)
class Judged:
    """`accuracy`: through the engine, None where there is no evaluation data. `within`: whether the bound is kept."""

    accuracy: Accuracy | None
    within: bool


def judge_engine(candidate: Candidate, run: Runner, judge: Judge, samples: int | None) -> Judged:
    """Measure a candidate on the evaluation set, or on `samples` of it."""
    few = judge.limited(samples)
    accuracy = few.accuracy(run)
    if accuracy is None:
        return Judged(None, True)
    drop = few.drop(accuracy)
    variant = candidate.variant
    if few is not judge and accuracy.metric != "snr" and variant is not None and variant.record.drop is not None:
        in_onnxruntime = few.accuracy(variant.file)
        assert in_onnxruntime is not None
        drop = variant.record.drop + drop - few.drop(in_onnxruntime)
    return Judged(accuracy, judge.bound.met(drop, accuracy.metric))
