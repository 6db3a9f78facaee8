"""What `graphopt optimize --preset auto` delivered, read from its artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiled_race import EXACT, macs

from graphopt import model as models
from graphopt.artifact_writer import LATENCY, PARETO, REPORT
from graphopt.measure import PairedResult, Ratio
from graphopt.report.front import points_on_front
from graphopt.runtime.artifact import MODEL, is_artifact

FP32, INT8 = "exact · tvm", "final · tvm"
"""What these are called in its race."""


@dataclass(frozen=True)
class AutoRun:
    """`over_fp32`, `over_int8`: how often it runs while these run once, None where they were not in its race."""

    setting: str
    top1: float
    lost: float
    macs: int
    parameter_bytes: int
    latency_s: float
    over_fp32: Ratio | None
    over_int8: Ratio | None


def read_auto(folder: Path) -> AutoRun | None:
    """None where there is no artifact."""
    if not is_artifact(folder):
        return None
    report = json.loads((folder / REPORT).read_text())
    result = _race(folder)
    name = report["choice"]["candidate"]
    variant = next((v for v in report["variants"] if v["name"] == report["choice"]["variant"]), None)
    ratios = {base: result.ratio(base, name) for base in (FP32, INT8) if base in result.names}
    measured = report["source"] if variant is None else variant
    return AutoRun(
        "the model as it came" if variant is None else _short(variant["pipeline"]),
        measured["accuracy"]["value"],
        0.0 if variant is None else variant["drop"],
        macs(models.load(folder / MODEL)),
        measured["parameter_bytes"],
        result.stats[name].median_s,
        ratios.get(FP32),
        ratios.get(INT8),
    )


def read_front(folder: Path) -> list[Mapping[str, Any]]:
    """Points of its front that have a latency; [] where there is none."""
    if not (folder / PARETO).is_file():
        return []
    front = json.loads((folder / PARETO).read_text())
    return [point for point in points_on_front(front) if point["latency_s"] is not None]


def int8_seconds(folder: Path) -> float | None:
    """The latency of plain INT8, compiled, in its race; None where it was not in it."""
    result = _race(folder)
    return result.stats[INT8].median_s if INT8 in result.names else None


def _race(folder: Path) -> PairedResult:
    return PairedResult.from_dict(json.loads((folder / LATENCY).read_text()))


def _short(pipeline: str) -> str:
    """Without the exact passes; of lists, how many they name."""
    lossy = pipeline.removeprefix(f"{EXACT},")
    return re.sub(r"\[([^\]]*)\]", lambda found: f"[{len(found[1].split(','))} named]", lossy)
