"""Time a kernel on a device, as `measure.Bench` does on this machine: one call at a time, constants out of the caches.

Arguments are filled there, so that they need not travel. Before each call everything but the first argument is flushed
from the caches (the function is TVM's own): constants come from far memory, and what was written last is warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.targets.tuning.measure import FEWEST_CALLS, LONGEST_S, QUANTILE, WINDOW_S, Parameter

if TYPE_CHECKING:
    from graphopt.remote.session import Session

LIMIT_S = 30.0
"""Of one trial: connecting, sending, running. Kernels take milliseconds; what takes longer hangs."""
DUELS = 3
_FLUSH = "cache_flush_cpu_non_first_arg"
_FILL = "tvm.contrib.random.random_fill_for_measure"
_FILLED = ("float16", "float32", "int8", "uint8", "int32", "int64")


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel's library on this machine, its parameters, and on how many threads it runs there."""

    library: Path
    parameters: tuple[Parameter, ...]
    threads: int


def timed(
    session: Session, kernel: DeviceKernel, rival: DeviceKernel | None, close: float, rival_us: float | None
) -> tuple[float, float | None]:
    """Microseconds of a call of `kernel`; and of `rival`, the best so far, where the two are within `close` of each
    other: then both are timed in turns, on this one device. Raises TargetError and DeviceError."""
    session.use_threads(kernel.threads)
    clock = _Clock(session, kernel, "candidate.so")
    time_us = clock.time_us()
    if rival is None or rival_us is None or time_us >= close * rival_us:
        return time_us, None
    other = _Clock(session, rival, "rival.so")
    pairs = [(other.time_us(), clock.time_us()) for _ in range(DUELS)]
    rival_times, times = zip(*pairs, strict=True)
    return float(np.median(times)), float(np.median(rival_times))


class _Clock:
    """One kernel, loaded in a session, with arguments."""

    def __init__(self, session: Session, kernel: DeviceKernel, name: str):
        self._session = session
        self._module = session.load(kernel.library, name)
        with session.told("allocate a kernel's arguments"):
            self._arguments = _arguments(session, kernel.parameters)

    def time_us(self) -> float:
        """A low quantile of single calls: interference only ever adds time."""
        first = float(np.median(self._calls(2)))
        window = min(max(WINDOW_S, FEWEST_CALLS * first), LONGEST_S)
        calls = self._calls(int(max(window / max(first, 1e-9), 2)))
        return float(sorted(calls)[int(QUANTILE * (len(calls) - 1))]) * 1e6

    def _calls(self, count: int) -> Sequence[float]:
        """Seconds of each; one before them does not count."""
        with self._session.told("run a kernel"):
            timer = self._module.time_evaluator(
                "main", self._session.processor, number=1, repeat=min(count, 1000), f_preproc=_FLUSH
            )
            return timer(*self._arguments).results


def _arguments(session: Session, parameters: Sequence[Parameter]) -> list[Any]:
    import tvm

    fill = session.rpc.get_function(_FILL)
    found = []
    for each in parameters:
        tensor = tvm.runtime.empty(each.shape, each.dtype, session.processor)
        if each.dtype in _FILLED:
            fill(tensor)
        found.append(tensor)
    return found
