#!/usr/bin/env python3
"""float16 against float32 on emulated ARM cores: instructions, noise and accuracy: a table of docs/results.md.

    python benchmarks/arm_float16.py OUT [--models resnet20_cifar10,mobilenetv2] [--core a76] [--pictures 32]

Each classifier of `shared_data` is compiled twice after the preset `exact`, with the templates' first decisions.
Instructions are those of one inference. Noise and accuracy are those of real pictures, the first of each drawn set:
signal-to-noise ratio over all of them and the lowest of one, both against ONNX Runtime in float32, and how many
pictures get the same class from both, and the right one from each.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.calibration import load_dataset
from graphopt.candidates import specialise
from graphopt.passes.base import Context
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.remote.emulator import emulated
from graphopt.remote.engine import RemoteEngine
from graphopt.remote.instructions import count_instructions
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.targets.arm import Arm

SEED = 1


@dataclass(frozen=True)
class Row:
    """Of one model; accuracies in per cent."""

    float32: int
    float16: int
    """Instructions."""
    snr_db: float
    lowest_db: float
    agreement: float
    right32: float
    right16: float


def measured(which: Classifier, core: str, pictures: int, out: Path) -> Row:
    model = models.load(which.path)
    signature = models.signature(model)
    data, _ = load_dataset(which.data_path(out), signature, which.preprocess).draw(pictures, SEED)
    samples = list(data.batches(1))
    exact = specialise(Pipeline.parse(PRESETS["exact"]).run(model, Context())[0], samples[0])
    counts = []
    with tempfile.TemporaryDirectory() as name:
        for precision in ("float32", "float16"):
            target, folder = Arm(mcpu=core, threads=1, precision=precision), Path(name) / precision
            folder.mkdir()
            target.build(target.lower(exact), folder)
            cpu = target.llvm_cpu
            counts.append(count_instructions(folder, samples[0], cpu).total)
        with emulated("aarch64", cpu) as address:
            engine = RemoteEngine(folder, address)
            found = [next(iter(engine.run(each).values())).reshape(-1).astype(np.float64) for each in samples]
    reference = OnnxRuntimeEngine(which.path, 1)
    wanted = [next(iter(reference.run(each).values())).reshape(-1).astype(np.float64) for each in samples]
    labels = data.labels
    assert labels is not None
    classes = [np.array([int(np.argmax(x)) for x in each]) for each in (wanted, found)]
    ratios = [_db(a, b) for a, b in zip(wanted, found, strict=True)]
    right32, right16 = (100 * float(np.mean(each == labels)) for each in classes)
    return Row(
        counts[0],
        counts[1],
        _db(np.concatenate(wanted), np.concatenate(found)),
        min(ratios),
        100 * float(np.mean(classes[0] == classes[1])),
        right32,
        right16,
    )


def _db(wanted: np.ndarray, found: np.ndarray) -> float:
    noise = float(((found - wanted) ** 2).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10((wanted**2).sum() / noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default=",".join(each.name for each in CLASSIFIERS))
    parser.add_argument("--core", default="a76")
    parser.add_argument("--pictures", type=int, default=32)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print("| model | float32, millions | float16 | ratio | dB, lowest | same class | right: float32, float16 |")
    print("|---" * 7 + "|")
    for which in (each for each in CLASSIFIERS if each.name in args.models.split(",")):
        row = measured(which, args.core, args.pictures, args.out)
        print(
            f"| {which.name} | {row.float32 / 1e6:.2f} | {row.float16 / 1e6:.2f} | {row.float16 / row.float32:.3f} "
            f"| {row.snr_db:.1f}, {row.lowest_db:.1f} | {row.agreement:.1f} % | {row.right32:.1f} %, "
            f"{row.right16:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
