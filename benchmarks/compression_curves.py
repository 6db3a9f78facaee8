"""Top-1 over latency of one classifier, for every setting of the methods: a picture and the figures in it.

All models take turns in one race. Points of `auto`'s front come from its own run; their latencies are drawn as if its
plain INT8 had taken as long as INT8 does here, and as much below fp32 as they lost there. Rings were not raced.
"""

from __future__ import annotations

import argparse
import sys

from compiled_race import Maker, Version, pictures, points, race
from compression_auto import int8_seconds, read_front
from compression_methods import FP32, INT8, INT8_PASSES, METHODS

from graphopt.measure import PairedResult
from graphopt.report.scatter import Series, scatter

SETTINGS = 5
"""Of each method, the strongest ones."""
SINGLE = (FP32, INT8)
"""Points rather than curves."""
WITH_INT8 = {"low-rank": "low-rank + INT8", "pruning": "pruning + INT8"}


def draw_curves(maker: Maker, given: argparse.Namespace) -> None:
    """Writes `given.picture`; prints a row for each point."""
    lines = _made(maker)
    made = {f"{line} {setting}".rstrip(): v for line, settings in lines.items() for setting, v in settings.items()}
    result = race(
        {name: version.model for name, version in made.items()}, FP32, maker.source, pictures(maker.evaluation),
        threads=given.threads, tune_seconds=given.tune_seconds, seconds=given.seconds,
    )  # fmt: skip
    for name, why in result.failed.items():
        print(f"{name}: not timed: {why}", file=sys.stderr)
    print("| method | setting | latency, ms | top-1 | lost |\n|---|---|---|---|---|")
    drawn = [_series(line, settings, result) for line, settings in lines.items()]
    front = [] if given.auto is None else _front(maker, given, result)
    shown = [*drawn[len(SINGLE) :], *front, *drawn[: len(SINGLE)]]  # what comes last lies on top
    picture = scatter(
        [each for each in shown if each.points], "latency, ms", "top-1, %", maker.exact.top1 - given.max_drop
    )
    given.picture.write_text(f"{picture}\n", encoding="utf-8")


def _made(maker: Maker) -> dict[str, dict[str, Version]]:
    """By line of the picture and setting; those that change nothing are left out."""
    lines = {FP32: {"": maker.exact}, INT8: {"": maker.make(INT8_PASSES)}}
    for key, together in WITH_INT8.items():
        alone = METHODS[key]
        for line, behind in ((alone.name, ""), (together, f",{INT8_PASSES}")):
            versions = {setting: maker.make(passes + behind) for setting, passes in alone.ladder[-SETTINGS:]}
            lines[line] = {setting: version for setting, version in versions.items() if version.changed}
    return lines


def _series(line: str, settings: dict[str, Version], result: PairedResult) -> Series:
    places, notes = [], []
    for setting, version in settings.items():
        name = f"{line} {setting}".rstrip()
        if name in result.names:
            places.append((1e3 * result.stats[name].median_s, version.top1))
            notes.append(f"{name}: loses {points(version.lost)}")
            figures = f"{places[-1][0]:.4f} | {version.top1:.2f} | {points(version.lost)}"
            print(f"| {line} | {setting} | {figures} |", flush=True)
    return Series(line, places, notes)


def _front(maker: Maker, given: argparse.Namespace, result: PairedResult) -> list[Series]:
    folder = given.auto / maker.which.name
    front = read_front(folder)
    theirs = int8_seconds(folder) if front else None
    if theirs is None or INT8 not in result.names:
        print(f"auto: no front in {folder}, or no INT8 to set it against", file=sys.stderr)
        return []
    drift = result.stats[INT8].median_s / theirs
    places = [(1e3 * drift * point["latency_s"], maker.exact.top1 - point["drop"]) for point in front]
    for point, (milliseconds, top1) in zip(front, places, strict=True):
        how = "raced" if point["measured"] else "predicted"
        print(f"| auto | {point['number']}, {how} | {milliseconds:.4f} | {top1:.2f} | {points(point['drop'])} |")
    notes = [f"{point['number']}: {point['pipeline']}" for point in front]
    return [Series("auto", places, notes, True, [not point["measured"] for point in front])]
