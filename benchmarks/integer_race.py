#!/usr/bin/env python3
"""The artifacts of `integer_artifacts.py` against the INT8 of ONNX Runtime and OpenVINO: a table of docs/results.md.

    python benchmarks/integer_race.py OUT MODEL.onnx ... --versus versus.py [--threads 1] [--rounds 6]

For each model whose artifact OUT/NAME-THREADS exists the script given by `--versus` (or GRAPHOPT_VERSUS) is called as
`versus.py MODEL ARTIFACT --threads N --rounds R --json FILE`; it quantizes the model with ONNX Runtime's own recipe for
the other engines, and they take turns. A race that is newer than its artifact is not run again. The table goes to
stdout and OUT/int8-THREADS.md: milliseconds, and how often graphopt runs while the other runs once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from engines import static

RIVALS = ("ort-int8", "openvino-int8", "openvino-bf16")
LIMIT_S = 900


def race(model: Path, artifact: Path, file: Path, args: argparse.Namespace) -> dict | None:
    """The figures of one model, from FILE where they are newer than the artifact."""
    if not file.exists() or file.stat().st_mtime < (artifact / "manifest.json").stat().st_mtime:
        command = [sys.executable, str(Path(args.versus).resolve()), str(model), str(artifact)]
        options = ["--threads", str(args.threads), "--rounds", str(args.rounds), "--json", str(file)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=LIMIT_S)
        if done.returncode or not file.exists():
            said = done.stderr.strip().splitlines()
            print(f"{model.stem}: the race failed: {said[-1] if said else done.returncode}", file=sys.stderr)
            return None
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--versus", default=os.environ.get("GRAPHOPT_VERSUS"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    if not args.versus:
        parser.error("the race script is not known: give --versus or set GRAPHOPT_VERSUS")
    lines = ["| model | ONNX Runtime | OpenVINO | graphopt | against ONNX Runtime | against OpenVINO | against bf16 |"]
    lines.append("|---" * 7 + "|")
    gained: dict[str, list[tuple[float, str]]] = {rival: [] for rival in RIVALS}
    for path in args.models:
        artifact = args.out / f"{path.stem}-{args.threads}"
        if not artifact.is_dir():
            print(f"{path.stem}: no artifact in {artifact}", file=sys.stderr)
            continue
        folder = args.out / path.stem
        folder.mkdir(exist_ok=True)
        found = race(static(path, folder), artifact, folder / f"int8-{args.threads}.json", args)
        if found is None:
            continue
        (mine,) = (name for name in found["median_ms"] if name.startswith("artifact:"))
        cells = []
        for rival in RIVALS:
            ratio = found["ratios"].get(f"{rival} / {mine}")
            cells.append("-" if ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio))
            if ratio is not None:
                gained[rival].append((ratio[0], path.stem))
        times = [found["median_ms"].get(name) for name in (*RIVALS[:2], mine)]
        shown = ["-" if t is None else f"{t:.3f}" for t in times]
        lines.append(f"| {path.stem} | {' | '.join([*shown, *cells])} |")
        print(lines[-1], flush=True)
    lines.append("")
    for rival, ratios in gained.items():
        if ratios:
            mean = float(np.exp(np.mean(np.log([r for r, _ in ratios]))))
            least, name = min(ratios)
            lines.append(
                f"against {rival}: {len(ratios)} models, geometric mean {mean:.3f}, least {least:.2f} ({name})"
            )
    text = "\n".join(lines) + "\n"
    (args.out / f"int8-{args.threads}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
