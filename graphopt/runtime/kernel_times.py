"""How long each kernel of a compiled model takes, in runs of the whole model: warm or cold as it is there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.runtime.tvm_engine import TvmEngine

LEAST_RUNS, MOST_RUNS = 7, 100
WARM_UP_RUNS = 2


@dataclass(frozen=True)
class KernelTime:
    """One call of a kernel in a run of the model."""

    kernel: str
    layer: str
    """Label of the ONNX node whose weights it reads; '' where it reads none."""
    seconds: float
    """Median over the runs; a microsecond or two of it is the clock's."""


class WatchedEngine:
    """An engine of its own for a folder, slower for being watched. Raises ArtifactError as `TvmEngine` does."""

    def __init__(self, folder: Path, threads: int):
        self._engine = TvmEngine(folder, threads)
        self._calls: list[tuple[str, float]] = []
        self._started = 0.0
        self._engine.watch(self._instrument)

    def _instrument(self, _function: Any, symbol: str, before: bool, _result: Any, *_arguments: Any) -> int:
        if before:
            self._started = time.perf_counter()
        else:
            seconds = time.perf_counter() - self._started
            if not symbol.startswith("vm."):
                self._calls.append((symbol, seconds))
        return 0

    def calls(self, feeds: Mapping[str, np.ndarray]) -> list[tuple[str, float]]:
        """Run, and give each kernel called and its seconds; what happens between kernels is not among them."""
        self._calls.clear()
        self._engine.run(feeds)
        return list(self._calls)

    @property
    def layer_calls(self) -> tuple[tuple[str, str], ...]:
        """As in `TvmEngine`."""
        return self._engine.layer_calls


def kernel_times(
    folders: Mapping[str, Path], feeds: Mapping[str, np.ndarray], threads: int, seconds: float
) -> dict[str, tuple[KernelTime, ...]]:
    """The calls of kernels that the compiled model in each folder makes in a run, in order.

    They take turns, for about `seconds`: each runs LEAST_RUNS times at least and MOST_RUNS at most.

    Raises ArtifactError and DataError as `TvmEngine` does.
    """
    engines = {name: WatchedEngine(folder, threads) for name, folder in folders.items()}
    taken: dict[str, list[list[tuple[str, float]]]] = {name: [] for name in engines}
    deadline = time.perf_counter() + seconds
    for number in range(WARM_UP_RUNS + MOST_RUNS):
        if number >= WARM_UP_RUNS + LEAST_RUNS and time.perf_counter() > deadline:
            break
        for name, engine in engines.items():
            calls = engine.calls(feeds)
            if number >= WARM_UP_RUNS:
                taken[name].append(calls)
    return {name: _joined(taken[name], engine.layer_calls) for name, engine in engines.items()}


def _joined(taken: Sequence[Sequence[tuple[str, float]]], layers: Iterable[tuple[str, str]]) -> tuple[KernelTime, ...]:
    """Each call with its median time and its layer: the n-th call of a kernel is the n-th that the module lists."""
    waiting: dict[str, list[str]] = {}
    for kernel, layer in layers:
        waiting.setdefault(kernel, []).append(layer)
    medians = np.median([[seconds for _, seconds in calls] for calls in taken], axis=0)
    found = []
    for (kernel, _), seconds in zip(taken[0], medians, strict=True):
        labels = waiting.get(kernel)
        found.append(KernelTime(kernel, labels.pop(0) if labels else "", float(seconds)))
    return tuple(found)
