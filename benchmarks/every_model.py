#!/usr/bin/env python3
"""Every shared model through `graphopt optimize` as a user runs it: the table "Every model" of docs/results.md.

    python benchmarks/every_model.py OUT [--only NAME ...] [--presets exact int8 int4] [--document docs/results.md]

Artifacts are written to OUT/NAME-PRESET, what became of each run to OUT/NAME-PRESET.json. A run that is there is not
repeated unless `--again` says so: the same command goes on where it was interrupted, and prints the whole table.
`--document` puts the table between the two markers of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS, Outcome, Run, Task

import graphopt
from graphopt.errors import GraphoptError
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

PRESETS = ("exact", "int8", "int4")
BEGIN, END = "<!-- every model: begin -->", "<!-- every model: end -->"
HEADING = (
    "model", "preset", "exit", "nodes", "model.onnx, MB", "the task's figure", "right by", "in float again",
    "delivered", "speed", "ms", "minutes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--presets", nargs="*", choices=PRESETS, default=PRESETS)
    parser.add_argument("--again", action="store_true", help="repeat runs that are there")
    parser.add_argument("--kept", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--document", type=Path, help="write the table between the markers of this file")
    parser.add_argument("--tune-seconds", default="20")
    parser.add_argument("--measure-seconds", default="6")
    parser.add_argument("--threads", default="1")
    args = parser.parse_args()
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    options = ["--threads", args.threads, "--tune-seconds", args.tune_seconds]
    options += ["--measure-seconds", args.measure_seconds]
    lines, runs = [_line(HEADING), "|---" * len(HEADING) + "|"], []
    print("\n".join(lines), flush=True)
    for task in TASKS.values():
        for preset in PRESETS:
            asked = preset in args.presets and (not args.only or task.name in args.only)
            if not asked or (preset == "int4" and not task.products):
                continue
            kept = args.out / f"{task.name}-{preset}.json"
            if args.kept and not kept.is_file():
                continue
            if not args.kept and (args.again or not kept.is_file()):
                kept.write_text(json.dumps(record(task, preset, args.out, options, int(args.threads))))
            runs.append(json.loads(kept.read_text()))
            lines.append(_line(cells(task.name, preset, runs[-1])))
            print(lines[-1], flush=True)
    if runs:
        print(f"\n{conditions(runs)}")
    if runs and args.document is not None:
        write_between(args.document, f"{conditions(runs)}\n\n" + "\n".join(lines))


def record(task: Task, preset: str, out: Path, options: list[str], threads: int) -> dict[str, Any]:
    """One run, and the task's figure before and after."""
    data, artifact = out / "data", out / f"{task.name}-{preset}"
    command = [sys.executable, "-m", "graphopt.cli", "optimize", str(task.path), "-o", str(artifact), "--overwrite"]
    command += ["-q", "--format", "json", "--preset", preset, *options, *task.arguments(data)]
    command += [part for each in task.inputs for part in ("--input", each)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    report = json.loads(done.stdout) if done.stdout.strip() else None
    result: dict[str, Any] = {"exit": done.returncode, "seconds": seconds, "stderr": done.stderr.strip()}
    result |= {"date": time.strftime("%d %B %Y"), "load": os.getloadavg()[1]}
    if report is None:
        return result
    reference = reference_outcome(task, data, threads)
    try:
        outcome = task.outcome(graphopt.load(artifact, threads).run, data)
    except (GraphoptError, RuntimeError) as error:
        return {**result, "stderr": f"the artifact does not run: {error}"}
    return {
        **result,
        "report": _shortened(report),
        "model_bytes": (artifact / "model.onnx").stat().st_size,
        "before": task.figures(reference),
        "after": task.figures(outcome),
        "against": task.against(outcome, reference),
    }


def reference_outcome(task: Task, data: Path, threads: int) -> Outcome:
    """Of the model as it came, in ONNX Runtime; made once."""
    file = data / f"{task.name}-outcome.npz"
    if not file.is_file():
        run: Run = OnnxRuntimeEngine(task.path, threads).run
        np.savez(file, **task.outcome(run, data))  # pyright: ignore[reportArgumentType]
    return dict(np.load(file))


def cells(name: str, preset: str, run: Mapping[str, Any]) -> list[str]:
    if "report" not in run:
        last = run["stderr"].splitlines()[-1] if run["stderr"] else "no word"
        return [name, preset, str(run["exit"]), last, *["-"] * (len(HEADING) - 5), f"{run['seconds'] / 60:.1f}"]
    report = run["report"]
    source, choice = report["source"], report["choice"]
    chosen = next(c for c in report["candidates"] if c["name"] == choice["candidate"])
    variant = next((v for v in report["variants"] if v["name"] == choice["variant"]), None)
    nodes = source["nodes"] if variant is None else variant["nodes"]
    floats = 0 if variant is None else len({*variant["returned_to_float"], *variant["float_for_speed"]})
    parts = f" ({len(chosen['parts'])} parts)" if chosen["parts"] else ""
    return [
        name,
        preset,
        str(run["exit"]),
        f"{source['nodes']} → {nodes}",
        f"{source['file_bytes'] / 1e6:.2f} → {run['model_bytes'] / 1e6:.2f}",
        _figure(run),
        _right(chosen, variant, source["accuracy"]),
        str(floats) if floats else "-",
        choice["candidate"] + parts,
        "{:.2f}x [{:.2f}, {:.2f}]".format(*chosen["speedup"]),
        f"{1e3 * chosen['latency']['median_s']:.2f}",
        f"{run['seconds'] / 60:.1f}",
    ]


def conditions(runs: Sequence[Mapping[str, Any]]) -> str:
    """When and where these were run, and how busy the machine was: on a quiet one the load is about one."""
    dates = sorted({run.get("date", "?") for run in runs})
    machines = sorted({run["report"]["environment"]["machine"]["cpu"] for run in runs if "report" in run})
    load = statistics.median(run.get("load", float("nan")) for run in runs)
    minutes = sum(run["seconds"] for run in runs) / 60
    return (
        f"{len(runs)} runs, {minutes:.0f} minutes, {', '.join(dates)}, {', '.join(machines)}; load average {load:.1f} "
        "(median over the runs)."
    )


def _figure(run: Mapping[str, Any]) -> str:
    """`60.75 → 60.50 % top-1 of 800`: the number first, since the unit says what it is of."""
    before = [f"{was:.4g} → {run['after'][unit]:.4g} {unit}" for unit, was in run["before"].items()]
    return "; ".join(before + [f"{value:.4g} {unit}" for unit, value in run["against"].items()])


def _right(chosen: Mapping[str, Any], variant: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> str:
    """Against what the delivered candidate was held: rounding, or the bound on accuracy."""
    if variant is None:
        return "the input model"
    if variant["name"] != "exact":
        accuracy = chosen["accuracy"]
        if accuracy is None:
            return "not judged"
        if accuracy["metric"] == "snr":
            return f"{accuracy['value']:.1f} dB"
        lost = (100.0 if before is None else before["value"]) - accuracy["value"]
        return f"{lost:.2f} points lost"
    errors = chosen["errors"] or variant["errors"]
    if not errors:
        return "nothing changed"
    worst = max(e["max_abs_error"] / e["tolerance"] if e["tolerance"] else 0.0 for e in errors)
    return f"{worst:.1g} of the tolerance" if worst else "no error"


def _shortened(report: dict[str, Any]) -> dict[str, Any]:
    """Without the raw samples."""
    for each in report["candidates"]:
        if each["latency"]:
            each["latency"] = {"median_s": each["latency"]["median_s"]}
        each.pop("tuning", None)
    kept = ("source", "choice", "candidates", "variants", "warnings", "environment", "seconds", "stages")
    return {name: report[name] for name in kept if name in report}


def write_between(document: Path, table: str) -> None:
    """Replace what is between the markers. Ends the program where they are not there."""
    text = document.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{document} lacks the lines {BEGIN} and {END}, in this order")
    document.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _line(texts: Any) -> str:
    return "| " + " | ".join(text.replace("|", "/") for text in texts) + " |"


if __name__ == "__main__":
    main()
