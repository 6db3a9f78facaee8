#!/usr/bin/env python3
"""The tables of docs/results.md: `graphopt optimize` as a user runs it, on real models.

    python benchmarks/results.py OUT_DIR [--only NAME ...] [--presets exact int8] [--tune-seconds 60]

Artifacts are written below OUT_DIR (model-preset); the tables, in Markdown, to stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from shared_data import CLASSIFIERS, OTHERS


def optimize(model: Path, out: Path, *arguments: str) -> tuple[int, dict | None, str]:
    """Exit code, report and stderr of one run."""
    command = [sys.executable, "-m", "graphopt.cli", "optimize", str(model), "-o", str(out), "--overwrite", "-q"]
    done = subprocess.run([*command, "--format", "json", *arguments], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout) if done.stdout.strip() else None
    return done.returncode, report, done.stderr.strip()


def row(name: str, preset: str, code: int, report: dict | None, stderr: str) -> str:
    if report is None:
        return f"| {name} | {preset} | exit {code}: {stderr} |" + " |" * 8
    before, choice = report["source"]["accuracy"], report["choice"]
    last = report["variants"][-1]
    chosen = next(c for c in report["candidates"] if c["name"] == choice["candidate"])

    def top1(accuracy):
        return "-" if not accuracy else f"{accuracy['value']:.2f}"

    compiled = [c for c in report["candidates"] if c["engine"] == "tvm"]
    tvm = "; ".join(
        f"{c['variant']} {c['speedup'][0]:.2f}x" if c["speedup"] else f"{c['variant']} {c['status']}: {c['reason']}"
        for c in compiled
    )
    lost = "-" if last["plain_drop"] is None else f"{last['plain_drop']:.2f}"
    kept = "-" if last["drop"] is None else f"{last['drop']:.2f}"
    returned = ", ".join(last["returned_to_float"]) or "none"
    speed = "{:.2f}x [{:.2f}, {:.2f}]".format(*chosen["speedup"])
    return (
        f"| {name} | {preset} | {code} | {report['source']['nodes']} → {last['nodes']} | {top1(before)} | {lost} | "
        f"{kept} | {returned} | {choice['candidate']} | {speed} | {1e3 * chosen['latency']['median_s']:.2f} | {tvm} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--presets", nargs="*", default=["exact", "int8"])
    parser.add_argument("--tune-seconds", default="60")
    parser.add_argument("--measure-seconds", default="15")
    parser.add_argument("--threads", default="1")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    common = ["--threads", args.threads, "--tune-seconds", args.tune_seconds, "--measure-seconds", args.measure_seconds]
    print(
        "| model | preset | exit | nodes | top-1 | points lost, plain | points lost | returned to float | delivered | "
        "speed against the input in ONNX Runtime | ms | compiled by TVM |"
    )
    print("|---" * 12 + "|")
    for each in CLASSIFIERS:
        for preset in args.presets:
            if args.only and each.name not in args.only:
                continue
            data = ["--calib", str(each.data_path(args.out)), "--calib-samples", "200"]
            data += ["--preprocess", each.preprocess] if each.preprocess else []
            result = optimize(each.path, args.out / f"{each.name}-{preset}", "--preset", preset, *data, *common)
            print(row(each.name, preset, *result), flush=True)
    for name, shapes in OTHERS.items():
        if (args.only and name not in args.only) or "exact" not in args.presets:
            continue
        model = CLASSIFIERS[0].path.with_name(f"{name}.onnx")
        inputs = [part for shape in shapes for part in ("--input", shape)]
        result = optimize(model, args.out / f"{name}-exact", "--preset", "exact", *inputs, *common)
        print(row(name, "exact", *result), flush=True)


if __name__ == "__main__":
    main()
