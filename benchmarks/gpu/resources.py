#!/usr/bin/env python3
"""What compiled kernels take of a multiprocessor, by model and architecture: no GPU needed.

    python benchmarks/gpu/resources.py [MODEL.onnx ...] [--archs sm_80,sm_90] [--precisions fp32,fp16,int8] [--out OUT]

A row a model, precision and architecture: kernels, how many are of which template, the most registers, kernels that
spill and how many bytes, seconds to build. Prints a table, and writes it to OUT/resources.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from graphopt.errors import GraphoptError
from graphopt.targets.cuda import Cuda


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--archs", default="sm_80,sm_90")
    parser.add_argument("--precisions", default=",".join(common.PRECISIONS))
    parser.add_argument("--out", type=Path, default=Path("gpu-checks"))
    arguments = parser.parse_args()
    shared = Path(os.environ.get("GRAPHOPT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    table = ["| model | precision | arch | kernels | templates | registers | spill | s |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(table))
    failed = 0
    for path in common.shared_models(arguments.models, shared):
        for precision in common.parse_list(arguments.precisions):
            for arch in common.parse_list(arguments.archs):
                begun = time.monotonic()
                try:
                    built = common.build(path, precision, 1, Cuda(arch=arch), arguments.out)
                except GraphoptError as error:
                    failed += 1
                    table.append(f"| {path.stem} | {precision} | {arch} | {error} | | | | |")
                    print(table[-1], flush=True)
                    continue
                kernels = json.loads((built.folder / "engine.json").read_text())["kernels"].values()
                chosen = Counter(row["template"] for row in json.loads((built.folder / "choices.json").read_text()))
                templates = ", ".join(f"{count} {name}" for name, count in chosen.most_common())
                spilling = [k["spill_bytes"] for k in kernels if k["spill_bytes"]]
                spill = f"{len(spilling)} ({sum(spilling)} B)" if spilling else "none"
                registers = max(k["registers"] for k in kernels)
                table.append(f"| {path.stem} | {precision} | {arch} | {len(kernels)} | {templates} | {registers} | "
                             f"{spill} | {time.monotonic() - begun:.0f} |")  # fmt: skip
                print(table[-1], flush=True)
    (arguments.out / "resources.md").write_text("\n".join(table) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
