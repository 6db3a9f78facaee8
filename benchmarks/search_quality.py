#!/usr/bin/env python3
"""How close a short search comes to the best there is: from an empty database, against trying every candidate.

    python benchmarks/search_quality.py MODEL.onnx [--threads 1] [--seconds 180] [--long-seconds 1800]

Tunes twice, each time from an empty database: as `graphopt tune` does within `--seconds`; and with its patience taken
away, so that it stops only when every decision of every template was timed, or after `--long-seconds`. Both builds then
take turns in one process. Prints seconds and trials of each search, and the long one's time over the short one's, round
by round, with its 95 % interval: 0.97 would mean that the short search leaves 3 % behind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from ablation import race, static

from graphopt import model as models
from graphopt.measure.stats import bootstrap_ratio
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.cpu import Cpu
from graphopt.targets.tuning import task


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--long-seconds", type=float, default=1800)
    args = parser.parse_args()
    target = Cpu(threads=args.threads)
    with ExitStack() as stack:
        found = {}
        for name, seconds in (("short", args.seconds), ("long", args.long_seconds)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if name == "long":
                task.PATIENCE = task.PATIENCE_AT_BOUND = 1_000_000
            lowered = target.lower(static(models.load(args.model)))
            begin = time.perf_counter()
            report = target.tune(lowered, seconds=seconds, database=folder / "empty.jsonl", fresh=True)
            took = time.perf_counter() - begin
            begin = time.perf_counter()
            target.build(lowered, folder)
            ended = "stopped by the clock" if report.stopped_early else "ended by itself"
            print(
                f"{name}: {took:.0f} s, {report.trials} trials, {ended}; kernels {report.kernels_us / 1e3:.2f} ms; "
                f"build {time.perf_counter() - begin:.1f} s",
                flush=True,
            )
            found[name] = TvmEngine(folder, args.threads)
        seconds_a_call = race(found)
    print(f"long / short: {bootstrap_ratio(seconds_a_call['long'] / seconds_a_call['short'])}")


if __name__ == "__main__":
    main()
