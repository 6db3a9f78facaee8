#!/usr/bin/env python3
"""Does an artifact's model.onnx, opened in ONNX Runtime and in OpenVINO, agree with `artifact.run`?

    python benchmarks/agreement.py ARTIFACT [ARTIFACT ...] [--data DATA --preprocess NAME --samples 200]

Prints, per artifact, the worst output's signal-to-noise ratio in dB (inf: equal) and how often the largest output is
the same, over eight samples of seeded noise, or over samples drawn (seeded) from DATA. Needs openvino.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

import graphopt
from graphopt import model as models
from graphopt.calibration import load_dataset
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.samples import random_feeds


def openvino_runner(path: Path):
    import openvino  # pyright: ignore[reportMissingImports] - of the extra `bench`

    request = (
        openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    )

    def run(feeds):
        results = request.infer(feeds)
        return {name: array for port, array in results.items() for name in port.get_names()}

    return run


def snr_db(wanted: np.ndarray, got: np.ndarray) -> float:
    noise = float(np.square(wanted.astype(np.float64) - got).sum())
    return (
        math.inf
        if noise == 0
        else 10 * math.log10(max(float(np.square(wanted.astype(np.float64)).sum()), 1e-300) / noise)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--preprocess")
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    print("| artifact | engine | ONNX Runtime, dB | same class | OpenVINO, dB | same class |")
    print("|---|---|---|---|---|---|")
    for folder in args.artifacts:
        artifact = graphopt.load(folder, threads=1)
        path = folder / "model.onnx"
        shapes = {name: tuple(shape) for name, shape in artifact.manifest["compiled_shapes"].items()}
        signature = models.signature(models.fix_inputs(models.load(path), shapes))
        cells = []
        if args.data:
            drawn, _ = load_dataset(args.data, signature, args.preprocess).draw(args.samples, seed=1)
            samples = list(drawn.batches(1))
        else:
            samples = [random_feeds(signature, seed) for seed in range(8)]
        ours = [artifact.run(feeds) for feeds in samples]
        for run in (OnnxRuntimeEngine(path, 1).run, openvino_runner(path)):
            worst, same = math.inf, 0
            for feeds, mine in zip(samples, ours, strict=True):
                theirs = run(feeds)
                for name, array in mine.items():
                    worst = min(worst, snr_db(array, np.asarray(theirs[name])))
                first = next(iter(mine))
                same += int(np.argmax(mine[first]) == np.argmax(theirs[first]))
            cells += [f"{worst:.1f}", f"{same}/{len(samples)}"]
        print(f"| {folder.name} | {artifact.engine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
