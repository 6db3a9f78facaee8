"""The process that runs one contender: `python -m graphopt.measure.worker PARENT_PID`.

It answers each request on its original stdout. Whatever libraries print is sent to stderr instead, so that it
cannot corrupt the answers. It ends when its parent does.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.measure import wire

# By name, not by import: the worker is below the runtime that it opens, and needs one engine, not all.
_ENGINES: dict[str, tuple[str, str]] = {
    "onnxruntime": ("graphopt.runtime.onnxruntime_engine", "OnnxRuntimeEngine"),
    "tvm": ("graphopt.runtime.compiled", "open_compiled"),
    "hybrid": ("graphopt.runtime.hybrid_engine", "HybridEngine"),
    "artifact": ("graphopt", "load"),
}
_PR_SET_PDEATHSIG = 1
_STEADY = 0.97
_WINDOW_S = 0.02
_QUIET_SLICE_S = 0.005
_QUIET_LIMIT_S = 0.25

Run = Callable[[], Any]


def main(parent: int) -> int:
    answers = _claim_stdout()
    _die_with(parent)
    requests = sys.stdin.buffer
    run: Run | None = None
    threads = 1
    while (request := wire.read(requests)) is not None:
        task = request["do"]
        try:
            if task == "open":
                threads = int(request["threads"])
                run = open_contender(
                    request["engine"], request["path"], threads, Path(request["feeds"]), request.get("trust", False)
                )
                answer: dict[str, Any] = {"ready": True}
            elif run is None:
                answer = {"error": "asked to run before anything was opened"}
            elif task == "warm up":
                answer = {"runs": warm_up(run, request["seconds"])}
            else:
                samples = burst(run, request["seconds"], request["at_least"], request["keep"])
                answer = {"samples_s": samples}
                if threads > 1:
                    _await_quiet()
        except GraphoptError as error:
            answer = {"error": str(error)}
        answers.write(wire.encode(answer))
        answers.flush()
    return 0


def open_contender(engine: str, path: str, threads: int, feeds_file: Path, trust: bool = False) -> Run:
    """A function that runs the contender once on the saved feeds. Raises what opening it raises."""
    module, name = _ENGINES[engine]
    known = {"trust": True} if trust and engine == "artifact" else {}
    opened = getattr(importlib.import_module(module), name)(Path(path), threads=threads, **known)
    feeds = wire.load_feeds(feeds_file)
    run = opened.run
    return lambda: run(feeds)


def warm_up(run: Run, limit_s: float) -> int:
    """Run until it no longer gets faster; returns the number of runs.

    Steady: two windows in a row, each of 20 ms and two runs at least, whose median is not below 0.97 of the best
    seen before. Stops at `limit_s` in any case.
    """
    start, best, calm, runs = time.perf_counter(), float("inf"), 0, 0
    while calm < 2:
        window = _timed(run, _WINDOW_S, 2)
        runs += len(window)
        median = statistics.median(window)
        calm = calm + 1 if median >= _STEADY * best else 0
        best = min(best, median)
        if time.perf_counter() - start > limit_s:
            break
    return runs


def burst(run: Run, seconds: float, at_least: int, keep: int) -> list[float]:
    """Latencies in seconds of runs back to back, after one that is not counted.

    Of more than `keep` samples evenly spaced ones are kept: their distribution in time stays the same.
    """
    run()  # the caches belong to the contender that ran before
    gc.disable()
    try:
        samples = _timed(run, seconds, at_least)
    finally:
        gc.enable()
    if len(samples) > keep:
        samples = [samples[i] for i in np.linspace(0, len(samples) - 1, keep).round().astype(int)]
    return samples


def _timed(run: Run, seconds: float, at_least: int) -> list[float]:
    clock = time.perf_counter_ns
    samples: list[int] = []
    start = now = clock()
    limit = start + int(seconds * 1e9)
    while now < limit or len(samples) < at_least:
        begin = clock()
        run()
        now = clock()
        samples.append(max(now - begin, 1))
    return [sample / 1e9 for sample in samples]


def _await_quiet() -> None:
    """Wait until this process's threads sleep: pools spin for a while after work, on cores the next one needs."""
    limit = time.perf_counter() + _QUIET_LIMIT_S
    while time.perf_counter() < limit:
        before = time.process_time()
        time.sleep(_QUIET_SLICE_S)
        if time.process_time() - before < _QUIET_SLICE_S / 10:
            return


def _claim_stdout() -> BinaryIO:
    """The pipe to the parent; from here on descriptor 1 is stderr, for C libraries as for Python."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _die_with(parent: int) -> None:
    """Ask the kernel (Linux) to end this process with its parent; elsewhere the closed pipe ends it, a burst later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request was in force
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
