"""What channel pruning saves and what it costs in top-1, with and without solving weights again.

    python benchmarks/prune_channels.py [--models NAME ...] [--ratios R ...] [--options KEY=VALUE,...] [--evaluate N]

Models and pictures: see `shared_data`. 200 samples calibrate, others evaluate (all of them, or N drawn at random).
`plain` cuts the same channels as `solved` but leaves the weights of the layers that read the others as they are.
Everything runs in ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.inspection import inspect
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline

CALIBRATION_SAMPLES = 200
COLUMNS = ("model", "ratio", "MACs", "parameters", "top-1 before", "plain", "solved", "s")


def compare(which: Classifier, ratios: list[float], options: str, samples: int | None, folder: Path) -> None:
    source = models.load(which.path)
    signature = models.signature(source)
    data = load_dataset(which.data_path(folder), signature, which.preprocess)
    calibration, evaluation = data.draw(CALIBRATION_SAMPLES, 0)
    if samples is not None:
        evaluation, _ = evaluation.draw(min(samples, len(evaluation)), 1)
    context = Context(data=calibration)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)
    sizes = {spec.name: (1, *(d for d in spec.shape[1:] if isinstance(d, int))) for spec in signature.inputs}

    def count(model):
        found = inspect(models.fix_inputs(model, sizes))
        return found.macs or 0, found.parameters

    def top1(model) -> float:
        return evaluate(models.to_bytes(model), evaluation, signature=signature).value

    before, (macs, parameters) = top1(exact), count(exact)
    for ratio in ratios:
        results, seconds, left = [], 0.0, (0, 0)
        for again in ("false", "true"):
            text = f"prune-channels{{ratio={ratio:g},reconstruct={again}{',' if options else ''}{options}}}"
            started = time.perf_counter()
            pruned, _ = Pipeline.parse(text).run(exact, context)
            seconds, left = time.perf_counter() - started, count(pruned)
            results.append(top1(pruned))
        row = (f"{left[0] / macs:.3f}", f"{left[1] / parameters:.3f}", f"{before:.2f}", *(f"{r:.2f}" for r in results))
        print(f"| {which.name} | {ratio:g} | {' | '.join(row)} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10", "squeezenet1_1"], choices=names)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--options", default="", help="more options of prune-channels, say round_to=1,scope=layer")
    parser.add_argument("--evaluate", type=int, help="evaluate on so many samples instead of all")
    given = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for which in (c for c in CLASSIFIERS if c.name in given.models):
            compare(which, given.ratios, given.options, given.evaluate, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
