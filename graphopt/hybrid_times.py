"""A part of a model in both engines, timed in turns. It only proposes where to cut: whole models are compared later, in
processes of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.runtime.tvm_engine import TvmEngine

SECONDS = 0.3
LEAST_TURNS, MOST_TURNS = 5, 200
WARM_UP = 2


def time_part(compiled: Path, file: Path, feeds: Mapping[str, np.ndarray], threads: int) -> dict[str, float]:
    """Seconds of a run on `feeds`, by engine: `tvm` of the folder `compiled`, `onnxruntime` of the ONNX file.

    The lowest tenth of the samples lies below: what others do on the machine only adds to a time.
    """
    runs: dict[str, Callable[[Mapping[str, np.ndarray]], object]] = {
        "tvm": TvmEngine(compiled, threads).run,
        "onnxruntime": OnnxRuntimeEngine(file, threads).run,
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + SECONDS
    for turn in range(WARM_UP + MOST_TURNS):
        if turn >= WARM_UP + LEAST_TURNS and time.perf_counter() > deadline:
            break
        for name, run in runs.items():
            run(feeds)  # the caches belong to the other engine
            begin = time.perf_counter()
            run(feeds)
            if turn >= WARM_UP:
                taken[name].append(time.perf_counter() - begin)
    return {name: lowest_tenth(samples) for name, samples in taken.items()}


def lowest_tenth(samples: Sequence[float]) -> float:
    """A tenth of the samples, of which there are two at least, is lower."""
    return statistics.quantiles(samples, n=10, method="inclusive")[0]
