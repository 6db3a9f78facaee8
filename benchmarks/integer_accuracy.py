#!/usr/bin/env python3
"""Top-1 of the artifacts of `integer_artifacts.py`, through their own engine and their model.onnx in ONNX Runtime.

    python benchmarks/integer_accuracy.py OUT [--threads 1] [--samples 32]

Judged on the pictures that calibration (`--samples`, as given to `integer_artifacts.py`) did not see. The last column
counts pictures for which the two disagree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from shared_data import CLASSIFIERS

import graphopt
from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    print("| model | pictures | float | ONNX Runtime | graphopt | other class |\n|---|---|---|---|---|---|")
    for each in CLASSIFIERS:
        folder = args.out / f"{each.name}-{args.threads}"
        if not folder.is_dir():
            continue
        signature = models.signature(models.load(each.path))
        data = load_dataset(each.data_path(args.out), signature, each.preprocess)
        _, held_out = data.draw(args.samples, 0)
        theirs, mine = OnnxRuntimeEngine(folder / "model.onnx", args.threads).run, graphopt.load(folder).run
        other = 0
        for feeds in held_out.batches(1):
            one, two = (next(iter(run(feeds).values())) for run in (theirs, mine))
            other += int(np.argmax(one) != np.argmax(two))
        figures = [evaluate(run, held_out, signature=signature).value for run in (each.path, theirs, mine)]
        print(f"| {each.name} | {len(held_out)} | {' | '.join(f'{f:.2f}' for f in figures)} | {other} |", flush=True)


if __name__ == "__main__":
    main()
