#!/usr/bin/env python3
"""Where a run's time goes on a GPU, kernel by kernel: needs torch for CUDA, whose profiler it reads.

    python benchmarks/gpu/kernel_times.py FOLDER [--runs 50] [--rows 40]

FOLDER is what `common.build` (of the other scripts here) wrote, or an artifact for CUDA: model.so and engine.json.
Prints a kernel a row: calls a run, microseconds a call and a run, and the decision that it was made with.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from graphopt.runtime.cuda_engine import CudaEngine


def kernel_times(engine: CudaEngine, runs: int) -> dict[str, list[float]]:
    """Microseconds of each call by kernel, over `runs` runs."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            engine.compute()
            engine.wait()
    found = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=40)
    arguments = parser.parse_args()
    engine = CudaEngine(arguments.folder)
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal(shape).astype(engine.input_dtypes[name])
        for name, shape in engine.input_shapes.items()
    }
    for _ in range(3):
        engine.run(feeds)
    times = kernel_times(engine, arguments.runs)
    choices = arguments.folder / "choices.json"
    made = {row["workload"]: row for row in json.loads(choices.read_text())} if choices.is_file() else {}
    print(f"{sum(map(sum, times.values())) / arguments.runs:.1f} us in {len(times)} kernels a run")
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[: arguments.rows]:
        row = made.get(name.removesuffix("_kernel"), {})
        decision = " ".join(f"{k}={v}" for k, v in row.get("decision", {}).items())
        total = sum(each) / arguments.runs
        print(f"{total:8.1f} us  {len(each) / arguments.runs:5.1f} x {np.median(each):7.1f}  {name} "
              f"{row.get('template', '')} {decision}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
