#!/usr/bin/env python3
"""Top-1 of the INT8 artifacts' model.onnx in ONNX Runtime, without its optimisations, and in OpenVINO.

    python benchmarks/engine_accuracy.py OUT          # the folder that every_model.py wrote; needs openvino

Judged on what the calibration draw of every_model.py held out. Artifacts that carry a float model are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agreement import openvino_runner
from shared_data import CLASSIFIERS

import graphopt
from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

CALIBRATION_SAMPLES, SEED = 200, 0
"""What every_model.py gives to `graphopt optimize`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print("| model | float | ONNX Runtime | ONNX Runtime, not optimised | OpenVINO |\n|---|---|---|---|---|")
    for each in CLASSIFIERS:
        folder = args.out / f"{each.name}-int8"
        if graphopt.load(folder).manifest["variant"] != "final":
            continue
        signature = models.signature(models.load(each.path))
        data = load_dataset(each.data_path(args.out), signature, each.preprocess)
        _, held_out = data.draw(CALIBRATION_SAMPLES, SEED)
        path = folder / "model.onnx"
        runs = (each.path, path, OnnxRuntimeEngine(path, optimize=False).run, openvino_runner(path))
        cells = [f"{evaluate(run, held_out, signature=signature).value:.2f}" for run in runs]
        print(f"| {each.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
