"""Each way to make a classifier smaller or faster at its strongest within a point of top-1, in one race of all.

    python benchmarks/compression.py [--models NAME ...] [--methods low-rank pruning INT4 auto] [--auto FOLDER]
                                     [--max-drop 1.0] [--whole-ladder] [--evaluate N] [--threads 1]
                                     [--tune-seconds 20] [--seconds 30]
    python benchmarks/compression.py --curves MODEL --picture OUT.svg [--auto FOLDER] ...

Models and pictures: see `shared_data`. 200 samples calibrate (400 of CIFAR-10, 1000 of MNIST), all others, or N of
them, evaluate, in ONNX Runtime. A method goes from its mildest setting on until one loses more than `--max-drop`; the
one before is compiled for this machine, as fp32 and plain INT8 are, and all take turns. With `--whole-ladder` every
setting is tried, all within the bound are timed, and the fastest has the row: the next setting of a ladder may lose
less or take longer. Settings that leave the model as it is do not count. INT4 is first tried for all layers, then with
those in 8 bits that need it; TVM folds 4-bit weights to float32, so its latency says nothing about 4 bits. MACs,
parameters: shares of the fp32 model's.

`--auto`: FOLDER/NAME are artifacts of `graphopt optimize --preset auto --calib-samples N`. Their figures come from
their own report: accuracy from its evaluation data, latency and ratios from the race in that run, in which fp32 and
INT8 took part.

`--curves` draws top-1 over latency for every setting of low-rank and pruning, alone and with INT8 behind (see
`compression_curves`).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compiled_race import Maker, Version, pictures, points, race
from compression_auto import AutoRun, read_auto
from compression_curves import draw_curves
from compression_methods import FP32, INT8, INT8_PASSES, METHODS, within
from shared_data import CLASSIFIERS, Classifier

from graphopt.measure import PairedResult, Ratio

COLUMNS = (
    "model", "method", "setting", "top-1", "lost", "MACs (share of fp32)", "parameters, MB (times smaller)",
    "latency, ms", "speed against fp32 [95 %]", "speed against INT8 [95 %]",
)  # fmt: skip
NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """A line of the table; figures None where the setting could not be timed."""

    method: str
    setting: str
    top1: float
    lost: float
    macs: int
    parameter_bytes: int
    latency_s: float | None
    over_fp32: Ratio | None
    over_int8: Ratio | None

    def cells(self, exact: Version) -> tuple[str, ...]:
        times = exact.parameter_bytes / self.parameter_bytes
        return (
            self.method, self.setting, f"{self.top1:.2f}", points(self.lost),
            f"{self.macs / exact.macs:.3f}", f"{self.parameter_bytes / 1e6:.3f} ({times:.2f}x)",
            NOTHING if self.latency_s is None else f"{1e3 * self.latency_s:.3f}",
            *(NOTHING if ratio is None else _brief(ratio) for ratio in (self.over_fp32, self.over_int8)),
        )  # fmt: skip


def compare(which: Classifier, given: argparse.Namespace, folder: Path) -> None:
    """Prints the rows of one model."""
    maker = Maker(which, folder, given.threads, given.evaluate)
    found = {FP32: {"as it is": maker.exact}, INT8: {"all layers": maker.make(INT8_PASSES)}}
    missing: dict[str, str] = {}
    for key, method in METHODS.items():
        if key in given.methods:
            kept = within(maker, method, given.max_drop, given.whole_ladder)
            if isinstance(kept, str):
                missing[method.name] = kept
            else:
                found[method.name] = kept
    lanes = {_lane(name, setting): v.model for name, settings in found.items() for setting, v in settings.items()}
    result = race(
        lanes, FP32, maker.source, pictures(maker.evaluation),
        threads=given.threads, tune_seconds=given.tune_seconds, seconds=given.seconds,
    )  # fmt: skip
    for name, why in result.failed.items():
        print(f"{which.name}, {name}: not timed: {why}", file=sys.stderr)
    for name in (FP32, INT8, *(method.name for method in METHODS.values())):
        if name in found:
            rows = [_row(name, setting, version, result) for setting, version in found[name].items()]
            fastest = min(rows, key=lambda row: math.inf if row.latency_s is None else row.latency_s)
            _print(which, fastest.cells(maker.exact))
        elif name in missing:
            _print(which, (name, missing[name]))
    if "auto" in given.methods:
        auto = None if given.auto is None else read_auto(given.auto / which.name)
        _print(which, ("auto", "not run") if auto is None else _auto_row(auto).cells(maker.exact))


def _lane(name: str, setting: str) -> str:
    return name if name in (FP32, INT8) else f"{name} {setting}"


def _row(name: str, setting: str, version: Version, result: PairedResult) -> Row:
    lane = _lane(name, setting)
    timed = lane in result.names
    ratios: Mapping[str, Ratio] = {
        base: result.ratio(base, lane) for base in (FP32, INT8) if timed and base in result.names and base != lane
    }
    return Row(
        name, setting, version.top1, version.lost, version.macs, version.parameter_bytes,
        result.stats[lane].median_s if timed else None, ratios.get(FP32), ratios.get(INT8),
    )  # fmt: skip


def _auto_row(auto: AutoRun) -> Row:
    return Row(
        "auto", auto.setting, auto.top1, auto.lost, auto.macs, auto.parameter_bytes,
        auto.latency_s, auto.over_fp32, auto.over_int8,
    )  # fmt: skip


def _brief(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _print(which: Classifier, cells: tuple[str, ...]) -> None:
    padded = (which.name, *cells, *(NOTHING,) * (len(COLUMNS) - 1 - len(cells)))
    print(f"| {' | '.join(padded)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    methods = [*METHODS, "auto"]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, help="besides fp32 and INT8")
    parser.add_argument("--auto", type=Path, help="folder of artifacts, one for each model")
    parser.add_argument("--max-drop", type=float, default=1.0, help="points of top-1")
    parser.add_argument("--whole-ladder", action="store_true", help="go on where a setting fails; time all that hold")
    parser.add_argument("--evaluate", type=int, help="evaluate on so many samples instead of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune-seconds", type=float, default=20.0, help="schedule search of each compiled model")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a race")
    parser.add_argument("--curves", choices=names, help="draw this model's curves instead")
    parser.add_argument("--picture", type=Path, help="where --curves draws, an SVG")
    given = parser.parse_args()
    if (given.curves is None) != (given.picture is None):
        parser.error("--curves and --picture go together")
    with tempfile.TemporaryDirectory() as folder:
        if given.curves is not None:
            which = next(each for each in CLASSIFIERS if each.name == given.curves)
            maker = Maker(which, Path(folder), given.threads, given.evaluate)
            draw_curves(maker, given)
            return
        print(f"| {' | '.join(COLUMNS)} |")
        print("|---" * len(COLUMNS) + "|", flush=True)
        for which in (c for c in CLASSIFIERS if c.name in given.models):
            compare(which, given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
