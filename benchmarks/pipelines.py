"""Top-1 of a classifier behind any pipelines, and how far its outputs move: to compare ways of compressing it.

    python benchmarks/pipelines.py MODEL [--samples N] PIPELINE [PIPELINE ...]

MODEL is a name of `shared_data`. N pictures (200) calibrate, others evaluate; divergence is the mean over 128 of these
of KL(p || q) of the class probabilities, in nats (graphopt/search/sensitivity.py). Everything runs in ONNX Runtime,
behind `simplify,fold-batch-norm`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from shared_data import CLASSIFIERS

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.search.sensitivity import Sensitivity

WATCHED = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[which.name for which in CLASSIFIERS])
    parser.add_argument("pipelines", nargs="+", type=Pipeline.parse)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    which = next(each for each in CLASSIFIERS if each.name == given.model)
    source = models.load(which.path)
    signature = models.signature(source)
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset(which.data_path(Path(folder)), signature, which.preprocess)
        calibration, evaluation = data.draw(given.samples, 0)
        context = Context(data=calibration)
        exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)
        sensitivity = Sensitivity(exact, evaluation.draw(WATCHED, 0)[0], signature)
        print("| pipeline | top-1 | divergence |\n|---|---|---|", flush=True)
        for pipeline in (Pipeline(), *given.pipelines):
            model, _ = pipeline.run(exact, context)
            top1 = evaluate(models.to_bytes(model), evaluation, signature=signature).value
            print(f"| {pipeline} | {top1:.2f} | {sensitivity.of(model).noise:.4f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
