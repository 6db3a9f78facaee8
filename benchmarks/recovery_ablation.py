"""What each way of recovering accuracy around INT8 gives: top-1 lost and signal-to-noise, each switched on and off.

    python benchmarks/recovery_ablation.py [--models NAME ...] [--draws N ...] [--recipes NAME ...] [--samples 200]

Models and pictures: see `shared_data`. Each draw takes 200 samples to calibrate with; the evaluation is on the first
`--evaluate` of all others (default: all). Signal-to-noise is that of the model's output against the float model's.
Everything runs in ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.calibration import Dataset, load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

RECIPES = {
    "nearest": "quantize-int8{rounding=nearest}",
    "nearest+bias": "quantize-int8{rounding=nearest,correct_bias=true}",
    "nearest+bias+clip": "quantize-int8{rounding=nearest,correct_bias=true,clip=mse}",
    "compensated": "quantize-int8{rounding=compensated}",
    "compensated-bias": "quantize-int8{rounding=compensated,correct_bias=false}",
    "compensated+clip": "quantize-int8{rounding=compensated,clip=mse}",
    "learned": "quantize-int8{rounding=learned}",
    "learned-bias": "quantize-int8{rounding=learned,correct_bias=false}",
    "learned+clip": "quantize-int8{rounding=learned,clip=mse}",
    "equalized+nearest": "equalize-layers,quantize-int8{rounding=nearest}",
    "equalized+compensated": "equalize-layers,quantize-int8{rounding=compensated}",
    "equalized+learned": "equalize-layers,quantize-int8{rounding=learned}",
    "float16 weights": "convert-float16",
    "float16": "convert-float16{compute=true}",
}
BATCH = 16


def in_memory(which: Classifier, signature: models.Signature, folder: Path) -> Dataset:
    """All samples decoded once: every recipe goes over them several times."""
    decoded = load_dataset(which.data_path(folder), signature, which.preprocess)
    arrays = {name: np.concatenate([feeds[name] for feeds in decoded.batches(50)]) for name in decoded.names}
    assert decoded.labels is not None
    file = folder / "decoded.npz"
    kept: dict = {name: array[: len(decoded)] for name, array in arrays.items()}
    np.savez(file, labels=decoded.labels, **kept)
    return load_dataset(file, signature)


def outputs(model: ir.Model, data: Dataset, threads: int) -> np.ndarray:
    """float64 (samples, classes)."""
    engine = OnnxRuntimeEngine(models.to_bytes(model), threads=threads)
    name = engine.output_names[0]
    rows = np.concatenate([engine.run(feeds)[name] for feeds in data.batches(BATCH)])
    return rows[: len(data)].astype(np.float64)


def top1(rows: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * float((rows.argmax(axis=1) == labels).mean())


def compare(which: Classifier, given: argparse.Namespace, folder: Path) -> None:
    source = models.load(which.path)
    data = in_memory(which, models.signature(source), folder)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, Context())
    for draw in given.draws:
        calibration, rest = data.draw(given.samples, draw)
        evaluation = rest.subset(np.arange(min(given.evaluate or len(rest), len(rest))))
        labels = evaluation.labels
        assert labels is not None
        wanted = outputs(source, evaluation, given.threads)
        before = top1(wanted, labels)
        context = Context(data=calibration)
        for name in given.recipes:
            started = time.perf_counter()
            made, _ = Pipeline.parse(RECIPES[name]).run(exact, context)
            seconds = time.perf_counter() - started
            got = outputs(made, evaluation, given.threads)
            noise = float(np.square(got - wanted).sum())
            snr = math.inf if noise == 0 else 10 * math.log10(float(np.square(wanted).sum()) / noise)
            lost = before - top1(got, labels)
            print(f"| {which.name} | {draw} | {name} | {lost:.3f} | {snr:.2f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--samples", type=int, default=200, help="to calibrate with")
    parser.add_argument("--evaluate", type=int, default=0, help="samples to evaluate on; 0: all others")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print("| model | draw | recipe | top-1 lost | SNR, dB | s |")
    print("|---|---|---|---|---|---|", flush=True)
    for which in (c for c in CLASSIFIERS if c.name in given.models):
        with tempfile.TemporaryDirectory() as folder:
            compare(which, given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
