#!/usr/bin/env python3
"""What each idea adds on each model: latency with everything, and with one idea switched off.

    python benchmarks/ablation.py MODEL.onnx... [--threads 1] [--tune-seconds 20] [--ideas winograd prefetch ...]
                                  [--precision float32] [--database schedules.jsonl]

Ideas: `winograd`; `prefetch` (of weights); `fusion` (of bias, activation, residual into the kernel before); `concat`
(its parts written in place); `tuning` (first guesses instead of measured decisions); `templates` (TVM's loops as they
come, with the generic schedule only: what all templates together bring). Each variant is tuned by itself. All
variants of a model then take turns in one process; a cell is the median of the rounds in milliseconds and, in
brackets, its ratio to everything on, taken round by round: above 1 the idea helps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from kernels import random_feeds

from graphopt import model as models
from graphopt.errors import GraphoptError
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu

IDEAS = ("winograd", "prefetch", "fusion", "concat", "tuning", "templates")
ROUNDS = 9
ROUND_S = 0.05


def without(target: Cpu, idea: str) -> Cpu:
    """The target with an idea switched off; `tuning` is no property of a target."""
    if idea in ("", "tuning"):
        return target
    names = [t.NAME for t in schedules.TEMPLATES] if idea == "templates" else [idea]
    return replace(target, without="+".join(names))


def engines(
    model: ir.Model, target: Cpu, args: argparse.Namespace, stack: ExitStack
) -> Iterator[tuple[str, TvmEngine]]:
    """By idea that is off (first none): the model, tuned and built."""
    for idea in ("", *args.ideas):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variant = without(target, idea)
        try:
            lowered = variant.lower(model)
            seconds = 0.0 if idea == "tuning" else args.tune_seconds
            database = folder / "none.jsonl" if idea == "tuning" else args.database or folder / "schedules.jsonl"
            variant.tune(lowered, seconds=seconds, database=database)
            variant.build(lowered, folder)
        except GraphoptError as error:
            print(f"{idea or 'everything on'}: {error}", file=sys.stderr)
            continue
        yield idea, TvmEngine(folder, args.threads)


def race(found: dict[str, TvmEngine]) -> dict[str, np.ndarray]:
    """Seconds a call of each engine, round by round."""
    feeds = random_feeds(next(iter(found.values())))
    medians: dict[str, list[float]] = {idea: [] for idea in found}
    for _ in range(ROUNDS):
        for idea, engine in found.items():
            engine.run(feeds)
            samples: list[float] = []
            begin = time.perf_counter()
            while time.perf_counter() - begin < ROUND_S or not samples:
                start = time.perf_counter()
                engine.run(feeds)
                samples.append(time.perf_counter() - start)
            medians[idea].append(float(np.median(samples)))
    return {idea: np.asarray(values) for idea, values in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune-seconds", type=float, default=20)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=list(IDEAS))
    parser.add_argument("--database", type=Path, help="where decisions are kept between runs")
    args = parser.parse_args()
    target = Cpu(threads=args.threads, precision=args.precision)
    print(f"| model | everything on | {' | '.join(f'no {idea}' for idea in args.ideas)} |")
    print("|---" * (2 + len(args.ideas)) + "|")
    for path in args.models:
        with ExitStack() as stack:
            found = dict(engines(static(models.load(path)), target, args, stack))
            if "" not in found:
                continue
            seconds = race(found)
        cells = [f"{1e3 * np.median(seconds['']):.2f}"]
        for idea in args.ideas:
            if idea not in seconds:
                cells.append("-")
                continue
            ratio = float(np.median(seconds[idea] / seconds[""]))
            cells.append(f"{1e3 * np.median(seconds[idea]):.2f} ({ratio:.2f})")
        print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)


def static(model: ir.Model) -> ir.Model:
    """The model with dynamic dimensions fixed to 1."""
    shapes = {str(v.name): v.shape for v in model.graph.inputs if not v.is_initializer() and v.shape is not None}
    dynamic = {n: tuple(d if isinstance(d, int) else 1 for d in s) for n, s in shapes.items()}
    return models.fix_inputs(model, {n: s for n, s in dynamic.items() if tuple(shapes[n]) != s})


if __name__ == "__main__":
    main()
