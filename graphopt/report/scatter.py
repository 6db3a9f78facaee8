"""A picture of points in series, accuracy over cost say, as one SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.report.html_markup import Html, el, nice_step

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
COLOURS = ("#4a78c8", "#1f8a4c", "#cf4a3c", "#b98300", "#7c4dbd", "#2a9d9d", "#7c8794", "#c2528b")
"""Readable on white and on black."""
LINE_HEIGHT = 18


@dataclass(frozen=True)
class Series:
    """Points in the order in which `line` joins them; `notes`: a title for each, shown on hovering."""

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str] = ()
    line: bool = True
    hollow: Sequence[bool] = ()
    """Points drawn as rings."""


def scatter(series: Sequence[Series], across: str, upward: str, bound: float | None = None) -> Html:
    """`across`, `upward`: titles of the axes, with units. `bound`: a dashed line at this height."""
    shown = [point for each in series for point in each.points]
    if not shown:
        raise ValueError("there is no point to draw")
    low_x, high_x, step_x = _range([x for x, _ in shown])
    low_y, high_y, step_y = _range([y for _, y in shown] + ([] if bound is None else [bound]))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - low_x) / (high_x - low_x),
            TOP + (HEIGHT - TOP - BOTTOM) * (high_y - y) / (high_y - low_y),
        )

    parts: list[Html] = [_style()]
    for x in _ticks(low_x, high_x, step_x):
        at = place(x, low_y)[0]
        parts.append(el("path", d=f"M{at:.1f} {TOP}V{HEIGHT - BOTTOM}", class_="grid"))
        parts.append(el("text", _number(x, step_x), x=f"{at:.1f}", y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    for y in _ticks(low_y, high_y, step_y):
        at = place(low_x, y)[1]
        parts.append(el("path", d=f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(el("text", _number(y, step_y), x=LEFT - 8, y=f"{at + 4:.1f}", text_anchor="end"))
    if bound is not None:
        at = place(low_x, bound)[1]
        parts.append(el("path", d=f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}", class_="bound"))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(el("text", across, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 10, text_anchor="middle"))
    parts.append(el("text", upward, transform=f"translate(14 {middle:.0f}) rotate(-90)", text_anchor="middle"))
    for number, each in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in each.points]
        if each.line and len(places) > 1:
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            parts.append(el("path", d=d, fill="none", stroke=colour, stroke_width=1.5))
        for index, (x, y) in enumerate(places):
            ring = index < len(each.hollow) and each.hollow[index]
            note = el("title", each.notes[index]) if index < len(each.notes) else None
            fill = "none" if ring else colour
            parts.append(el("circle", note, cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, fill=fill, stroke=colour))
    parts += _legend(series)
    return el(
        "svg", parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"{upward} over {across}", class_="scatter",
    )  # fmt: skip


def _legend(series: Sequence[Series]) -> list[Html]:
    top = HEIGHT - BOTTOM - 10 - LINE_HEIGHT * len(series)
    found = []
    for number, each in enumerate(series):
        y = top + LINE_HEIGHT * (number + 1)
        found.append(el("circle", cx=WIDTH - RIGHT - 170, cy=y - 4, r=4, fill=COLOURS[number % len(COLOURS)]))
        found.append(el("text", each.name, x=WIDTH - RIGHT - 160, y=y))
    return found


def _style() -> Html:
    return el(
        "style",
        Html(
            ".scatter{font:12px system-ui,sans-serif;max-width:100%}.scatter text{fill:#6b7682}"
            ".scatter .grid{stroke:#8895a3;stroke-opacity:.25;fill:none}"
            ".scatter .bound{stroke:#cf4a3c;stroke-dasharray:5 4;fill:none}"
        ),
    )


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Ends of an axis with some air, and the step of its ticks."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.08 * span, high + 0.08 * span
    return low, high, nice_step(high - low, 6)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, step: float) -> str:
    return f"{value + 0.0:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
