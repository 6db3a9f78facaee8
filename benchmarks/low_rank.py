"""What low-rank-split costs in top-1 for the arithmetic it saves: fitted to outputs on data, and to weights alone.

    python benchmarks/low_rank.py [--models NAME ...] [--methods NAME ...] [--draws N ...] [--max-drop 1.0]
                                  [--settings energy=0.99 ratio=0.5 ...] [--options block=8 ...] [--fits NAME ...]
                                  [--race SECONDS] [--tune-seconds 20]

Models and pictures: see `shared_data`. Each draw takes 200 samples to calibrate with and evaluates on all others, in
ONNX Runtime. A row a setting: the model's multiply-accumulates and the points of top-1 lost, for each fit. Then, for
each fit, the fewest multiply-accumulates of all settings within the bound; with `--race` these are compiled for one
thread of this machine and timed in turns with the whole model: `--methods tucker2 --race 10` is the speed of Tucker-2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import onnx_ir as ir
from compiled_race import macs, pictures, race
from int8_accuracy import split
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.variants import Source

WHOLE = "whole"
SETTINGS = ("energy=0.995", "energy=0.99", "energy=0.98", "energy=0.96", "ratio=0.8", "ratio=0.65", "ratio=0.5")


def compare(which: Classifier, draw: str, method: str, given: argparse.Namespace, folder: Path) -> None:
    source = models.load(which.path)
    signature = models.signature(source)
    calibration, evaluation = split(load_dataset(which.data_path(folder), signature, which.preprocess), draw)
    context = Context(data=calibration)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)
    whole = macs(exact)

    def top1(model: ir.Model) -> float:
        return evaluate(models.to_bytes(model), evaluation, signature=signature).value

    before = top1(exact)
    best: dict[str, tuple[float, float, str]] = {}
    fastest: dict[str, ir.Model] = {}
    for setting in given.settings:
        cells = []
        for fit in given.fits:
            options = ",".join((f"method={method}", f"fit={fit}", setting, *given.options))
            started = time.perf_counter()
            model, (record,) = Pipeline.parse(f"low-rank-split{{{options}}}").run(exact, context)
            seconds = time.perf_counter() - started
            share, drop = macs(model) / whole, before - top1(model)
            cells += [str(record.applied), f"{share:.3f}", f"{drop:.2f}", f"{seconds:.0f}"]
            if drop <= given.max_drop and (fit not in best or share < best[fit][0]):
                best[fit], fastest[fit] = (share, drop, setting), model
        print(f"| {which.name} | {draw} | {method} | {setting} | {' | '.join(cells)} |", flush=True)
    for fit in given.fits:
        found = "none" if fit not in best else "{:.3f} of its MACs, {:.2f} points ({})".format(*best[fit])
        print(f"  {which.name}, {method}, within {given.max_drop:g} points of {before:.2f}: {fit}: {found}", flush=True)
    if given.race is None or not fastest:
        return
    result = race(
        {WHOLE: exact, **fastest}, WHOLE, Source(which.path, source, signature), pictures(evaluation),
        threads=1, tune_seconds=given.tune_seconds, seconds=given.race,
    )  # fmt: skip
    for fit in fastest:
        if fit not in result.names or WHOLE not in result.names:
            found = f"not timed: {result.failed.get(fit) or result.failed.get(WHOLE)}"
        else:
            found = f"{result.ratio(WHOLE, fit)} the speed of the whole model, compiled"
        print(f"  {which.name}, {method}, {fit}: {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10", "resnet56_cifar10"], choices=names)
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--draws", nargs="+", default=["0"])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--options", nargs="+", default=[], help="more options of the pass, as KEY=VALUE")
    parser.add_argument("--fits", nargs="+", default=["outputs", "weights"])
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--race", type=float, metavar="SECONDS", help="time the best of each fit for so long")
    parser.add_argument("--tune-seconds", type=float, default=20.0, help="schedule search of each of them")
    given = parser.parse_args()
    columns = [f"{fit}: {each}" for fit in given.fits for each in ("layers", "MACs", "points lost", "s")]
    print(f"| model | draw | method | setting | {' | '.join(columns)} |")
    print("|---" * (4 + len(columns)) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for which in (c for c in CLASSIFIERS if c.name in given.models):
            for draw in given.draws:
                for method in given.methods:
                    compare(which, draw, method, given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
