#!/usr/bin/env python3
"""INT8 artifacts of models, quantized, tuned and compiled, without the measurements and gates of `optimize`.

    python benchmarks/integer_artifacts.py OUT MODEL.onnx ... [--target 'cpu{mcpu=cascadelake}'] [--threads 1]
                                           [--tune-seconds 60] [--samples 32] [--top 0]

For racing the integer engine itself: `optimize` would deliver float where that is faster. Calibration: the pictures of
`shared_data` where the model is one of its classifiers, else noise. A quantized model is kept in OUT and used again.
Printed: microseconds and share of the processor's int8 peak of the slowest kernels (`--top`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import time
from pathlib import Path

import onnx_ir as ir
from shared_data import CLASSIFIERS, OTHERS

from graphopt import model as models
from graphopt.calibration import Dataset, load_dataset, random_dataset
from graphopt.candidates import specialise
from graphopt.errors import GraphoptError
from graphopt.passes.base import Context
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.runtime.artifact import COMPILED, MODEL, write_manifest
from graphopt.schedule_database import database_path
from graphopt.targets.base import TuningReport
from graphopt.targets.cpu import Cpu
from graphopt.tuning import resolve_target


def calibration(name: str, signature: models.Signature, samples: int, work: Path) -> Dataset:
    known = next((each for each in CLASSIFIERS if each.name == name), None)
    if known is None:
        return random_dataset(signature, samples, 0)
    return load_dataset(known.data_path(work), signature, known.preprocess).draw(samples, 0)[0]


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    fixed = (text.rpartition(":") for text in OTHERS.get(name, ()))
    return {key: tuple(int(d) for d in dims.split(",")) for key, _, dims in fixed}


def quantized(path: Path, out: Path, samples: int, target: Cpu) -> ir.Model:
    """The model after the preset `int8`, made once."""
    file = out / f"{path.stem}-{target.capabilities.dot_int8}.onnx"
    if not file.exists():
        model = models.fix_inputs(models.load(path), shapes_of(path.stem))
        data = calibration(path.stem, models.signature(model), samples, out)
        context = Context(data=data, capabilities=target.capabilities)
        models.save(Pipeline.parse(PRESETS["int8"]).run(model, context)[0], file)
    return models.load(file)


def compile_into(folder: Path, model: ir.Model, target: Cpu, seconds: float, database: Path) -> TuningReport:
    """An artifact that `graphopt.load` opens."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / COMPILED).mkdir(parents=True)
    (sample,) = random_dataset(models.signature(model), 1, 0).batches(1)
    lowered = target.lower(specialise(model, sample))
    report = target.tune(lowered, seconds=seconds, database=database, everything=True)
    target.build(lowered, folder / COMPILED)
    models.save(model, folder / MODEL)
    signature = models.signature(model)
    manifest = {
        "engine": "tvm", "variant": "final", "precision": "float32", "target": str(target), "pipeline": PRESETS["int8"],
        "signature": {
            side: [{"name": s.name, "dtype": str(s.dtype), "shape": list(s.shape)} for s in specs]
            for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs))
        },
        "compiled_shapes": {name: list(array.shape) for name, array in sample.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("graphopt", "apache-tvm", "onnx", "numpy")},
    }  # fmt: skip
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    write_manifest(folder, manifest, names)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--database", type=Path, default=None)
    given = parser.parse_args()
    target = resolve_target(given.target, given.threads)
    assert isinstance(target, Cpu)
    given.out.mkdir(parents=True, exist_ok=True)
    for path in given.models:
        begin = time.perf_counter()
        try:
            model = quantized(path, given.out, given.samples, target)
            middle = time.perf_counter()
            folder = given.out / f"{path.stem}-{given.threads}"
            report = compile_into(folder, model, target, given.tune_seconds, given.database or database_path())
        except GraphoptError as error:
            print(f"{path.stem:24s} {type(error).__name__}: {error}", flush=True)
            continue
        print(
            f"{path.stem:24s} kernels {report.kernels_us or 0:9.1f} us  quantized in {middle - begin:4.0f} s, "
            f"tuned and built in {time.perf_counter() - middle:4.0f} s ({report.trials} trials)",
            flush=True,
        )
        for row in sorted(report.rows, key=lambda r: -(r["time_us"] or 0) * r["calls"])[: given.top]:
            spent = f"{row['time_us'] or 0:9.1f} us x{row['calls']:<3d} {row['gflops'] or 0:7.1f} GOP/s"
            print(f"  {spent}  {row['workload'][:56]:56s} {row['decision']}", flush=True)


if __name__ == "__main__":
    main()
