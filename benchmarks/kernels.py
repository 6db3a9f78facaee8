"""Latency of a model compiled for the CPU target against ONNX Runtime, and where its time goes, kernel by kernel.

    python benchmarks/kernels.py MODEL.onnx [--input x:1,3,224,224] [--tune-seconds 60] [--threads 1] [--top 15]

Both engines run in one process, in turns, on the same random input; the figure is the median of the rounds. The
largest difference between outputs is against ONNX Runtime without its graph optimisations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt import model as models
from graphopt.errors import GraphoptError
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.cpu import Cpu

ROUNDS = 12
ROUND_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--input", action="append", default=[])
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--database", type=Path)
    arguments = parser.parse_args()
    shapes = {}
    for text in arguments.input:
        name, _, dims = text.rpartition(":")
        shapes[name] = tuple(int(d) for d in dims.split(","))
    try:
        return compare(arguments, models.fix_inputs(models.load(arguments.model), shapes))
    except GraphoptError as error:
        print(f"{Path(arguments.model).stem:22s} {type(error).__name__}: {error}")
        return 1


def compare(arguments: argparse.Namespace, model: ir.Model) -> int:
    target = Cpu(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        lowered = target.lower(model)
        lowering = time.perf_counter() - begin
        database = arguments.database or Path(folder) / "schedules.jsonl"
        report = target.tune(lowered, seconds=arguments.tune_seconds, database=database)
        begin = time.perf_counter()
        target.build(lowered, Path(folder))
        building = time.perf_counter() - begin
        engine = TvmEngine(folder, arguments.threads)
        feeds = random_feeds(engine)
        proto = ir.to_proto(model).SerializeToString()
        plain, tuned = session(proto, arguments.threads, False), session(proto, arguments.threads, True)
        wanted = plain.run(None, feeds)
        found = engine.run(feeds)
        error = max(relative(found[o.name], np.asarray(w)) for o, w in zip(plain.get_outputs(), wanted, strict=True))
        ours, theirs = race(lambda: engine.run(feeds), lambda: tuned.run(None, feeds))
        print(
            f"{Path(arguments.model).stem:22s} tvm {1e3 * ours:8.3f} ms  onnxruntime {1e3 * theirs:8.3f} ms  "
            f"{theirs / ours:5.2f}x  error {error:.1e}  lower {lowering:.1f} s  tune {report.seconds:.0f} s "
            f"({report.trials} trials, {report.tasks} tasks)  build {building:.1f} s",
            flush=True,
        )
    for row in sorted(report.rows, key=lambda r: -(r["time_us"] or 0) * r["calls"])[: arguments.top]:
        spent = f"{row['time_us'] or 0:9.1f} us x{row['calls']:<3d} {row['gflops'] or 0:6.1f} GFLOP/s"
        print(f"  {spent}  {row['workload'][:48]:48s} {row['decision']}")
    return 0


def random_feeds(engine: TvmEngine) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for name, shape in engine.input_shapes.items():
        dtype = engine.input_dtypes[name]
        array = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 200, shape)
        feeds[name] = array.astype(dtype)
    return feeds


def session(proto: bytes, threads: int, optimized: bool) -> onnxruntime.InferenceSession:
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(found.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def race(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds a call of each, in alternating rounds."""
    medians: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, found in zip((first, second), medians, strict=True):
            call()
            samples = []
            begin = time.perf_counter()
            while time.perf_counter() - begin < ROUND_S or len(samples) < 3:
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            found.append(float(np.median(samples)))
    return float(np.median(medians[0])), float(np.median(medians[1]))


if __name__ == "__main__":
    sys.exit(main())
