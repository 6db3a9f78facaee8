"""The Pareto front of a search: each recipe that was evaluated, with its accuracy and what it costs.

`pareto.json` in an artifact holds it; every point's pipeline makes it again (`graphopt optimize --pick`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.report.html_markup import Html
from graphopt.report.scatter import Series, scatter

SCHEMA = 1
COSTS = {"latency": "latency_s", "size": "parameter_bytes"}
"""By objective: what a point is judged by, besides accuracy."""


def pareto(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """From a report as a dictionary; None where there was no search.

    Points are in order of cost. `measured` says whether a latency comes from the final race; else it is the plain
    pipeline's, times what the search predicted or found out between the two. `on_front`: no other point is both
    cheaper and as accurate.
    """
    search = report.get("search")
    if not search:
        return None
    points = [*_variants(report), *_trials(report, search)]
    key = COSTS[search["objective"]]
    # An infinite signal-to-noise ratio is None in a report: outputs equal to the input model's have no place in a plot.
    points = [p for p in points if p[key] is not None and p["accuracy"] is not None]
    points = sorted(points, key=lambda p: (p[key], -p["accuracy"]))
    best = -math.inf
    for number, point in enumerate(points):
        point["number"] = number
        point["on_front"] = point["accuracy"] > best
        best = max(best, point["accuracy"])
    settings = {k: v for k, v in report["settings"].items() if k not in ("passes", "output", "objective", "preset")}
    return {
        "schema": SCHEMA,
        "objective": search["objective"],
        "metric": points[0]["metric"] if points else None,
        "max_drop": report["settings"]["max_drop"],
        "points": points,
        "settings": settings,
    }


def _variants(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Variants that were raced, in their fastest engine."""
    found = []
    for variant in report["variants"]:
        raced = [c for c in report["candidates"] if c["variant"] == variant["name"] and c["latency"]]
        fastest = min(raced, key=lambda c: c["latency"]["median_s"], default=None)
        seconds = None if fastest is None else fastest["latency"]["median_s"]
        if variant["accuracy"] is not None and seconds is not None:
            found.append(_point(variant["name"], variant, seconds, True, variant["parameter_bytes"]))
    return found


def _trials(report: Mapping[str, Any], search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes that were evaluated and not raced."""
    known = {v["pipeline"] for v in report["variants"]}
    plain = next((v for v in report["variants"] if v["name"] == "final"), None)
    raced = [c["latency"]["median_s"] for c in report["candidates"] if c["variant"] == "final" and c["latency"]]
    found = []
    for trial in search["trials"]:
        if trial["accuracy"] is None or any(text.endswith(trial["pipeline"]) for text in known):
            continue
        share = trial["cost"] / search["plain_cost"] if trial["measured"] is None else trial["measured"]
        latency = share * min(raced) if raced and search["objective"] == "latency" else None
        size = trial["cost"] if search["objective"] == "size" else None
        whole = "" if plain is None else _exact_part(report)
        found.append(_point("trial", {**trial, "pipeline": whole + trial["pipeline"]}, latency, False, size))
    return found


def _exact_part(report: Mapping[str, Any]) -> str:
    exact = next(v for v in report["variants"] if v["name"] == "exact")
    return exact["pipeline"] + "," if exact["pipeline"] else ""


def _point(
    name: str, source: Mapping[str, Any], latency: float | None, measured: bool, size: float | None
) -> dict[str, Any]:
    accuracy = source["accuracy"]
    return {
        "name": name,
        "pipeline": source["pipeline"],
        "accuracy": accuracy["value"],
        "metric": accuracy["metric"],
        "drop": source["drop"],
        "within_bound": source["within_bound"],
        "latency_s": latency,
        "measured": measured,
        "parameter_bytes": size,
    }


def points_on_front(front: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Those that no other beats, the cheapest first."""
    return [point for point in front["points"] if point["on_front"]]


def front_plot(front: Mapping[str, Any]) -> Html:
    """Accuracy over cost: the front joined up, other recipes as points; rings are predicted, not raced."""
    key, unit, factor = {
        "latency": ("latency_s", "latency, ms", 1e3),
        "size": ("parameter_bytes", "parameters, MB", 1e-6),
    }[front["objective"]]

    def series(name: str, points: Sequence[Mapping[str, Any]], line: bool) -> Series:
        return Series(
            name,
            [(factor * p[key], p["accuracy"]) for p in points],
            [f"{p['number']}: {p['pipeline']}" for p in points],
            line,
            [not p["measured"] and key == "latency_s" for p in points],
        )

    best = points_on_front(front)
    others = [p for p in front["points"] if not p["on_front"]]
    unit_up = "dB" if front["metric"] == "snr" else "%"
    shown = [series("front", best, True), *([series("others", others, False)] if others else [])]
    return scatter(shown, unit, f"{front['metric']}, {unit_up}")
