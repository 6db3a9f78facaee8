"""The latency plot: every candidate's raw samples on one axis in milliseconds, against the input model.

A row shows the distribution three times over the same axis: a histogram of all samples, the samples themselves
as dots below it, and the median with its 95 % interval across both (a "raincloud", Allen et al., Wellcome Open
Research 4:63, 2019). Text is HTML, shapes are SVG stretched to the width there is, so that lettering keeps its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.report import formats
from graphopt.report.html_markup import Html, badge, el, finite, nice_step, plural

WIDTH, HEIGHT = 1000, 100
BASELINE = 58
"""Histogram above, dots below."""
MOST_DOTS = 400
BINS = 60
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Latency:
    """One candidate's samples in ms, with the summary that goes beside them."""

    name: str
    samples_ms: np.ndarray
    median_ms: float
    interval_ms: tuple[float, float]

    @property
    def summary(self) -> dict[str, Any]:
        """What `formats.milliseconds` reads."""
        return {"median_s": self.median_ms / 1e3, "interval_s": [t / 1e3 for t in self.interval_ms]}


def read_latency(candidate: Mapping[str, Any]) -> Latency | None:
    """From a candidate of the report; None when it was not timed or no usable sample is left."""
    record = candidate.get("latency")
    if not record:
        return None
    samples = np.array([s for s in record.get("samples_s") or () if finite(s) and s > 0], dtype=np.float64)
    if not samples.size:
        return None
    median = record.get("median_s")
    median = float(median if finite(median) else np.median(samples))
    interval = record.get("interval_s")
    if not (isinstance(interval, Sequence) and len(interval) == 2 and all(finite(t) for t in interval)):
        interval = (median, median)
    low, high = (1e3 * float(t) for t in interval)
    return Latency(str(candidate["name"]), 1e3 * samples, 1e3 * median, (low, high))


def latency_plot(candidates: Sequence[Mapping[str, Any]], reference: str, chosen: str | None) -> Html | None:
    """One row per timed candidate; `reference` names the one whose median is drawn through all rows."""
    timed = [(c, latency) for c in candidates if (latency := read_latency(c)) is not None]
    if not timed:
        return None
    low, high, step = _axis([latency for _, latency in timed])
    against = next((latency.median_ms for c, latency in timed if c["name"] == reference), None)
    ticks = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0  # no -0
    rows = []
    for candidate, latency in timed:
        delivered = candidate["name"] == chosen
        drawing = _row(latency, low, high, ticks, against)
        beyond = int(np.count_nonzero((latency.samples_ms > high) | (latency.samples_ms < low)))
        name = [latency.name, " ", badge("delivered", "good")] if delivered else latency.name
        count = plural(latency.samples_ms.size, "sample") + (f", {beyond} beyond the axis" if beyond else "")
        count += f", {MOST_DOTS} drawn" if latency.samples_ms.size - beyond > MOST_DOTS else ""
        value = [
            el("strong", f"{latency.median_ms:.3f} ms"),
            el("span", f"95 % [{latency.interval_ms[0]:.3f}, {latency.interval_ms[1]:.3f}]"),
            el("span", f"speed {ratio_text(candidate.get('speedup'))}") if candidate["name"] != reference else None,
        ]
        left = el("div", el("div", name, class_="lat-title"), el("div", count, class_="muted"), class_="lat-name")
        kind = (
            "lat-row delivered" if delivered else "lat-row reference" if candidate["name"] == reference else "lat-row"
        )
        rows.append(el("div", left, drawing, el("div", value, class_="lat-value"), class_=kind))
    digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    labels = [
        el(
            "span",
            f"{t:.{digits}f}{' ms' if t == ticks[0] else ''}",
            style=f"left:{_percent(t, low, high):.2f}%",
            class_="start" if _percent(t, low, high) < 2 else None,
        )
        for t in ticks
    ]
    cut = el("div", None if low == 0 else "axis starts above 0", class_="muted")
    axis = el("div", cut, el("div", labels, class_="axis", aria_hidden="true"), el("div"), class_="lat-row axis-row")
    return el("div", rows, axis, class_="latency")


def ratio_text(ratio: Sequence[float | None] | None) -> str:
    """`2.31x [2.25, 2.38]`, also where an end of the interval is not known (null)."""
    if not ratio or not finite(ratio[0]):
        return "-"
    if all(finite(r) for r in ratio):
        return formats.speedup([float(r) for r in ratio if r is not None])
    return f"{ratio[0]:.2f}x [too few rounds for an interval]"


def _axis(rows: Sequence[Latency]) -> tuple[float, float, float]:
    """Ends and tick step. One wild sample must not squeeze the rest, so the axis ends just past the slowest p99."""
    lowest = min(float(latency.samples_ms.min()) for latency in rows)
    highest = max(max(float(np.percentile(r.samples_ms, 99)) * 1.04, r.interval_ms[1] * 1.02) for r in rows)
    start = 0.0 if lowest < 0.6 * highest else lowest - 0.15 * (highest - lowest)
    step = nice_step(max(highest - start, 1e-9 * highest))
    return start, highest, step


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)


def _row(latency: Latency, low: float, high: float, ticks: np.ndarray, against: float | None) -> Html:
    def x(value: float) -> float:
        return WIDTH * (value - low) / (high - low)

    shown = np.sort(latency.samples_ms[(latency.samples_ms >= low) & (latency.samples_ms <= high)])
    start, end = (min(max(x(t), 0.0), float(WIDTH)) for t in latency.interval_ms)
    grid = "".join(f"M{x(t):.1f} 0V{HEIGHT}" for t in ticks)
    shapes = [el("path", d=grid, class_="grid")]
    if shown.size:
        shapes.append(el("path", d=_histogram(shown, low, high), class_="hist"))
        shapes.append(el("path", d=_dots(shown, low, high), class_="dots"))
    shapes.append(el("path", d=f"M0 {BASELINE}H{WIDTH}", class_="grid"))
    if low == 0:  # then lengths may be compared
        shapes.append(el("path", d=f"M0 {BASELINE}H{x(latency.median_ms):.1f}", class_="length"))
    if against is not None:
        shapes.append(el("path", d=f"M{x(against):.1f} 0V{HEIGHT}", class_="against"))
    shapes.append(el("path", d=f"M{start:.1f} 4H{end:.1f}V96H{start:.1f}Z", class_="interval"))
    shapes.append(el("path", d=f"M{x(latency.median_ms):.1f} 4V96", class_="median"))
    what = f"{latency.name}: median and 95 % interval {formats.milliseconds(latency.summary)} ms"
    title = el("title", f"{what}; from {latency.samples_ms.min():.3f} to {latency.samples_ms.max():.3f} ms")
    view = f"0 0 {WIDTH} {HEIGHT}"
    return el("svg", title, shapes, viewBox=view, preserveAspectRatio="none", role="img", aria_label=what)


def _histogram(ordered: np.ndarray, low: float, high: float) -> str:
    """Outline over the candidate's own range, its highest bin at full height; no bin thinner than a few pixels."""
    span = max(float(ordered[-1] - ordered[0]), (high - low) / 250)
    width = max(span / min(BINS, max(4, int(2 * ordered.size ** (1 / 3)))), (high - low) / 250)
    count = int(np.ceil(span / width))
    # Centred, so that a single value is drawn where it is.
    first = (ordered[0] + ordered[-1]) / 2 - count * width / 2
    edges = first + width * np.arange(count + 1)
    heights, _ = np.histogram(ordered, edges)
    scale = (BASELINE - 6) / max(int(heights.max()), 1)
    left = WIDTH * (edges - low) / (high - low)
    steps = [f"V{BASELINE - scale * h:.1f}H{right:.1f}" for h, right in zip(heights, left[1:], strict=True)]
    return f"M{left[0]:.1f} {BASELINE}{''.join(steps)}V{BASELINE}Z"


def _dots(ordered: np.ndarray, low: float, high: float) -> str:
    """Zero-length strokes with round caps: they stay round however the drawing is stretched.

    Beyond MOST_DOTS, order statistics at even ranks stand for all: the same picture each time, extremes kept.
    """
    if ordered.size > MOST_DOTS:
        ordered = ordered[np.linspace(0, ordered.size - 1, MOST_DOTS).round().astype(int)]
    # The golden ratio's multiples spread evenly: a jitter without a random number.
    heights = BASELINE + 9 + 28 * ((np.arange(ordered.size) * GOLDEN) % 1)
    left = WIDTH * (ordered - low) / (high - low)
    return "".join(f"M{a:.1f} {b:.0f}h0" for a, b in zip(left, heights, strict=True))
