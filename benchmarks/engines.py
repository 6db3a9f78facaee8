#!/usr/bin/env python3
"""graphopt against ONNX Runtime and OpenVINO, model by model, at several thread counts: the table of docs/results.md.

    python benchmarks/engines.py OUT_DIR MODEL.onnx... --versus versus.py [--threads 1 2] [--rounds 10]
        [--precisions fp32 bf16] [--tune-seconds 60] [--build-only | --race-only | --table-only]

Two phases, so that the race can wait for a quiet machine. `--build-only` runs `graphopt optimize` as a user does, once
a model and precision; the artifacts are used at every thread count. `--race-only` runs the script given by `--versus`
(or GRAPHOPT_VERSUS), called as `versus.py MODEL ARTIFACT... --threads N --rounds R --json FILE`: contenders in
processes of their own take turns, and ratios are taken round by round. Without `--int8` its INT8 contenders, which no
column shows, are left out: onnxruntime.quantization is hidden from it. Both phases skip what exists, so a stopped run
goes on where it was; a race older than an artifact is run again. bf16 is left out where the processor lacks it.

Below OUT_DIR, for each model: fp32/ and bf16/ (artifacts), build-PRECISION.json (report, seconds), race-N.json. The
table goes to stdout and OUT_DIR/table.md: milliseconds, and how often graphopt runs while the faster of the two fp32
engines (or OpenVINO bf16) runs once, with that ratio's 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from shared_data import OTHERS

from graphopt import model as models
from graphopt.capabilities import host_features

FLOAT_ENGINES = ("ort-fp32", "openvino-f32")
BUILD_LIMIT_S = 1800
RACE_LIMIT_S = 900
WITHOUT_INT8 = """
import runpy, sys
sys.modules["onnxruntime.quantization"] = None  # importing it fails, and the INT8 contenders are left out
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Entry:
    """One model of the race, and where its files are."""

    model: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.model.stem

    def artifact(self, precision: str) -> Path:
        return self.folder / precision

    def is_built(self, precision: str) -> bool:
        return (self.artifact(precision) / "manifest.json").is_file()

    def race_file(self, threads: int) -> Path:
        return self.folder / f"race-{threads}.json"

    def race_is_fresh(self, threads: int, precisions: list[str]) -> bool:
        """Whether the race was run with all artifacts there are, as they are now."""
        file = self.race_file(threads)
        built = [p for p in precisions if self.is_built(p)]
        if not file.is_file() or not built:
            return False
        if any((self.artifact(p) / "manifest.json").stat().st_mtime > file.stat().st_mtime for p in built):
            return False
        return {f"artifact:{p}" for p in built} <= set(json.loads(file.read_text())["median_ms"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--versus", default=os.environ.get("GRAPHOPT_VERSUS"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--tune-seconds", type=float, default=60)
    parser.add_argument("--measure-seconds", type=float, default=5)
    parser.add_argument("--engine", default="auto", help="as in `graphopt optimize`")
    parser.add_argument("--int8", action="store_true", help="race the INT8 contenders too")
    phase = parser.add_mutually_exclusive_group()
    phase.add_argument("--build-only", action="store_true")
    phase.add_argument("--race-only", action="store_true")
    phase.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not {"amx_bf16", "avx512_bf16"} & host_features():
        args.precisions = [p for p in args.precisions if p != "bf16"]
    entries = [Entry(static(path, args.out / path.stem), args.out / path.stem) for path in args.models]
    if not args.race_only and not args.table_only:
        for entry in entries:
            for precision in args.precisions:
                build(entry, precision, args)
    if not args.build_only and not args.table_only:
        if not args.versus:
            parser.error("the race script is not known: give --versus or set GRAPHOPT_VERSUS")
        for entry in entries:
            for threads in args.threads:
                race(entry, threads, args)
    text = table(entries, args.threads)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def static(path: Path, folder: Path) -> Path:
    """The model with every dimension fixed (to 1 where nothing is known): a copy, if one was dynamic."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    if copy.is_file() and copy.stat().st_mtime > path.stat().st_mtime:
        return copy
    model = models.load(path)
    shapes = {str(v.name): v.shape for v in model.graph.inputs if not v.is_initializer() and v.shape is not None}
    if all(isinstance(d, int) for shape in shapes.values() for d in shape):
        return path
    fixed = {name: tuple(d if isinstance(d, int) else 1 for d in shape) for name, shape in shapes.items()}
    for text in OTHERS.get(path.stem, ()):
        name, _, dims = text.rpartition(":")
        fixed[name] = tuple(int(d) for d in dims.split(","))
    models.save(models.fix_inputs(model, fixed), copy)
    return copy


def build(entry: Entry, precision: str, args: argparse.Namespace) -> None:
    if entry.is_built(precision):
        return
    command = [sys.executable, "-m", "graphopt.cli", "optimize", str(entry.model), "-o", str(entry.artifact(precision))]
    command += ["--preset", "exact", "--engine", args.engine, "--tune-seconds", str(args.tune_seconds)]
    command += ["--measure-seconds", str(args.measure_seconds), "-q", "--format", "json", "--overwrite"]
    if precision == "bf16":
        command += ["--precision", "bf16"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        say(f"{entry.name} {precision}: not built within {BUILD_LIMIT_S} s")
        return
    seconds = time.perf_counter() - begin
    if done.returncode or not done.stdout.strip():
        said = [line for line in done.stderr.splitlines() if line.startswith("graphopt")] or done.stderr.split("\n")
        say(f"{entry.name} {precision}: exit {done.returncode}: {said[-1]}")
        return
    content = {"seconds": seconds, "report": json.loads(done.stdout)}
    (entry.folder / f"build-{precision}.json").write_text(json.dumps(content), encoding="utf-8")
    say(f"{entry.name} {precision}: built in {seconds:.0f} s: {content['report']['choice']['candidate']}")


def race(entry: Entry, threads: int, args: argparse.Namespace) -> None:
    artifacts = [str(entry.artifact(p)) for p in args.precisions if entry.is_built(p)]
    if not artifacts:
        say(f"{entry.name}: nothing is built, so there is no race")
        return
    if entry.race_is_fresh(threads, args.precisions):
        return
    fresh = entry.race_file(threads).with_suffix(".new")
    script = [str(Path(args.versus).resolve())]
    command = [sys.executable, *script] if args.int8 else [sys.executable, "-c", WITHOUT_INT8, *script]
    command += [str(entry.model), *artifacts, "--threads", str(threads), "--rounds", str(args.rounds)]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, "--json", str(fresh)], capture_output=True, text=True, check=False, timeout=RACE_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        say(f"{entry.name}: no race within {RACE_LIMIT_S} s")
        return
    if done.returncode or not fresh.is_file():
        said = done.stderr.strip().splitlines()
        say(f"{entry.name}: the race failed: {said[-1] if said else f'exit {done.returncode}'}")
        return
    os.replace(fresh, entry.race_file(threads))
    say(f"{entry.name} threads={threads}: raced in {time.perf_counter() - begin:.0f} s")


HEADER = (
    "| model | threads | ONNX Runtime | OpenVINO f32 | graphopt | against the faster | OpenVINO bf16 "
    "| graphopt bf16 | against OpenVINO bf16 |"
)


def table(entries: list[Entry], thread_counts: list[int]) -> str:
    """Markdown: a row a race, then geometric means and least ratios for each thread count."""
    lines = [HEADER, "|---" * 9 + "|"]
    summary = ["", "| threads | ratio | models | geometric mean | least |", "|---" * 5 + "|"]
    for threads in thread_counts:
        gained: dict[str, list[tuple[float, str]]] = {"fp32": [], "bf16": []}
        for entry in entries:
            file = entry.race_file(threads)
            if not file.is_file():
                continue
            result = json.loads(file.read_text(encoding="utf-8"))
            cells, ratios = row(result)
            lines.append(f"| {entry.name} | {threads} | {' | '.join(cells)} |")
            for precision, ratio in ratios.items():
                gained[precision].append((ratio, entry.name))
        for precision, other in (("fp32", "the faster of the fp32 engines"), ("bf16", "OpenVINO bf16")):
            if gained[precision]:
                mean = float(np.exp(np.mean([np.log(ratio) for ratio, _ in gained[precision]])))
                least, worst = min(gained[precision])
                summary.append(
                    f"| {threads} | graphopt {precision} against {other} | {len(gained[precision])} | {mean:.3f} | "
                    f"{least:.2f} ({worst}) |"
                )
    return "\n".join(lines + summary) + "\n"


def row(result: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """The cells after model and threads, and the ratios found."""
    medians, ratios = result["median_ms"], result["ratios"]

    def milliseconds(name: str) -> str:
        return f"{medians[name]:.3f}" if name in medians else "-"

    def ratio(other: str | None, mine: str) -> tuple[str, float | None]:
        found = ratios.get(f"{other} / {mine}")
        return ("-", None) if found is None else ("{:.2f} [{:.2f}, {:.2f}]".format(*found), float(found[0]))

    raced = [name for name in FLOAT_ENGINES if name in medians]
    faster = min(raced, key=lambda name: medians[name]) if raced else None
    fp32, fp32_ratio = ratio(faster, "artifact:fp32")
    bf16, bf16_ratio = ratio("openvino-bf16", "artifact:bf16")
    cells = [*(milliseconds(n) for n in (*FLOAT_ENGINES, "artifact:fp32")), fp32]
    cells += [milliseconds("openvino-bf16"), milliseconds("artifact:bf16"), bf16]
    found = {"fp32": fp32_ratio, "bf16": bf16_ratio}
    return cells, {precision: ratio for precision, ratio in found.items() if ratio is not None}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
