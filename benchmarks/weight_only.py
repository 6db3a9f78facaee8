"""What weights in 4 bits and weights set to zero cost in top-1, and what they save in bytes.

    python benchmarks/weight_only.py [--models NAME ...] [--what int4 prune] [--blocks 16 32 64 128] [--pictures N]
                                     [--facenet]

Models and pictures: see `shared_data`. 200 samples are drawn to calibrate with; top-1 is measured on others, all of
them or the first `--pictures` of a draw. With correct_bias=false, `nearest` and `hqq` see no data. Ratios: of
parameters, to those of the float model after `simplify,fold-batch-norm`, and of the file, to the one the model came
in. `--facenet`: cosine of the embeddings to the float model's, on pictures it was not calibrated with. Everything runs
in ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shared_data import CLASSIFIERS, SHARED, Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import Dataset, load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

CALIBRATION_SAMPLES = 200
NAMES = ("resnet20_cifar10", "resnet56_cifar10", "tiny_darknet", "mobilenetv2", "squeezenet1_1", "mobilenetv1_075")


def int4_passes(blocks: list[int]) -> Iterator[str]:
    for block in blocks:
        for method in ("nearest", "hqq"):
            yield f"quantize-int4{{block={block},method={method},correct_bias=false}}"
        yield f"quantize-int4{{block={block},method=nearest}}"
        yield f"quantize-int4{{block={block},method=gptq}}"
        yield f"quantize-int4{{block={block},method=gptq,symmetric=true}}"
    yield "quantize-int4{bits=mixed}"


def prune_passes() -> Iterator[str]:
    for pattern in ("sparsity=0.5", "pattern=2:4"):
        for method in ("magnitude", "wanda", "sparsegpt"):
            yield f"prune-weights{{{pattern},method={method}}}"


def measure(which: Classifier, passes: list[str], pictures: int | None, folder: Path) -> None:
    source = models.load(which.path)
    signature = models.signature(source)
    data = load_dataset(which.data_path(folder), signature, which.preprocess)
    calibration, rest = data.draw(CALIBRATION_SAMPLES, 0)
    evaluation = rest if pictures is None else rest.draw(min(pictures, len(rest)), 1)[0]
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, Context())
    size, file_size = models.parameter_bytes(exact), which.path.stat().st_size
    before = evaluate(models.to_bytes(source), evaluation, signature=signature).value
    for text in passes:
        started = time.perf_counter()
        made, (record,) = Pipeline.parse(text).run(exact, Context(data=calibration))
        seconds = time.perf_counter() - started
        stored = models.to_bytes(made)
        after = evaluate(stored, evaluation, signature=signature).value
        ratios = f"{size / models.parameter_bytes(made):.2f} | {file_size / len(stored):.2f}"
        print(
            f"| {which.name} | `{text}` | {record.applied} | {ratios} | {before:.2f} | {after:.2f} | "
            f"{before - after:+.2f} | {seconds:.0f} |",
            flush=True,
        )


def measure_facenet(passes: list[str], pictures: int | None) -> None:
    path = SHARED / "models" / "facenet.onnx"
    source = models.load(path)
    data = load_dataset(SHARED / "images" / "imagenet", models.signature(source), "imagenet-inception")
    calibration, rest = data.draw(CALIBRATION_SAMPLES // 4, 0)
    evaluation = rest.draw(min(pictures or 200, len(rest)), 1)[0]
    wanted = _embeddings(models.to_bytes(source), evaluation)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, Context())
    for text in passes:
        started = time.perf_counter()
        made, (record,) = Pipeline.parse(text).run(exact, Context(data=calibration))
        seconds = time.perf_counter() - started
        stored = models.to_bytes(made)
        found = _embeddings(stored, evaluation)
        cosine = (wanted * found).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(found, axis=1)
        ratios = f"{models.parameter_bytes(exact) / models.parameter_bytes(made):.2f} | "
        ratios += f"{path.stat().st_size / len(stored):.2f}"
        print(
            f"| facenet | `{text}` | {record.applied} | {ratios} | 1 | {cosine.mean():.4f} | "
            f"least {cosine.min():.4f} | {seconds:.0f} |",
            flush=True,
        )


def _embeddings(model: bytes, data: Dataset) -> np.ndarray:
    engine = OnnxRuntimeEngine(model)
    return np.concatenate([next(iter(engine.run(feeds).values())) for feeds in data.batches(16)]).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--what", nargs="+", default=["int4", "prune"], choices=["int4", "prune"])
    parser.add_argument("--passes", nargs="+", help="these instead of --what, each the lossy part of a pipeline")
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--pictures", type=int, help="evaluate on so many samples instead of all")
    parser.add_argument("--facenet", action="store_true", help="facenet as well, by cosine")
    given = parser.parse_args()
    passes = given.passes or [
        *(int4_passes(given.blocks) if "int4" in given.what else ()),
        *(prune_passes() if "prune" in given.what else ()),
    ]
    columns = "model", "pass", "layers", "parameters", "file", "before", "after", "lost", "s"
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        by_name = {which.name: which for which in CLASSIFIERS}
        for name in given.models:
            measure(by_name[name], passes, given.pictures, Path(folder))
    if given.facenet:
        measure_facenet(passes, given.pictures)


if __name__ == "__main__":
    sys.exit(main())
