"""Error per layer: noise of each layer's output relative to its signal, in graph order, the worst ones named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.report.html_markup import Html, badge, code, el, finite, fold, plural, table

MOST_COLUMNS = 400
WORST = 8
HEIGHT = 100


def layer_errors(variant: Mapping[str, Any]) -> Html | None:
    """Plot and tables of `layer_snr_db`; None when nothing was compared."""
    ratios = variant.get("layer_snr_db") or {}
    layers = [(str(name), float(db) if finite(db) else math.inf) for name, db in ratios.items()]
    returned = [str(name) for name in variant.get("returned_to_float") or ()]
    parts: list[Html] = []
    if any(math.isfinite(db) for _, db in layers):
        worst = sorted(layers, key=lambda layer: layer[1])[: min(WORST, 1 + len(layers) // 4)]
        parts += [_plot(layers, {name for name, _ in worst}, returned), _legend(bool(returned))]
        parts.append(_rows(worst, returned, "layers with the largest error"))
        if len(layers) > len(worst):
            every = _rows(layers, returned, "error of every layer")
            parts.append(fold(f"All {plural(len(layers), 'layer')}, in graph order", every))
    elif layers:
        parts.append(el("p", f"None of {plural(len(layers), 'layer')} differs from its float version."))
    if returned:
        names = [el("li", code(name)) for name in returned]
        parts.append(el("h3", f"Returned to float: {plural(len(returned), 'layer')}"))
        parts.append(el("ul", names, class_="names"))
    return el("div", parts, class_="layers") if parts else None


def is_returned(output: str, returned: Sequence[str]) -> bool:
    """Whether the layer with this output was returned to float: lists name nodes, errors name their outputs."""
    return any(output == name or output.startswith((f"{name}_output", f"{name}:")) for name in returned)


def relative_error(snr_db: float) -> float:
    """Noise over signal, root mean square: 20 dB -> 0.1."""
    return 10 ** (-snr_db / 20)


def percent(fraction: float) -> str:
    """0.0123 -> `1.23 %`, three digits."""
    return f"{100 * fraction:.3g} %"


def _plot(layers: Sequence[tuple[str, float]], worst: set[str], returned: Sequence[str]) -> Html:
    drawn = _condensed(layers)
    exponents = [-db / 20 for _, db in drawn if math.isfinite(db)]
    top = math.ceil(max(exponents) + 1e-9)
    # Four decades at most: below a ten-thousandth of the worst nothing matters.
    floor = max(math.floor(min(exponents) - 0.05), top - 4)
    columns = []
    for index, (name, db) in enumerate(drawn):
        level = (-db / 20 - floor) / (top - floor) if math.isfinite(db) else 0.0
        height = HEIGHT * min(max(level, 0.008), 1.0)
        kind = "returned" if is_returned(name, returned) else "worst" if name in worst else None
        title = el("title", f"{name}: {_amount(db)}")
        columns.append(
            el("rect", title, x=f"{index + 0.1:.1f}", y=f"{HEIGHT - height:.2f}", width="0.8",
               height=f"{height:.2f}", class_=kind)
        )  # fmt: skip
    decades = range(floor, top + 1)
    lines = "".join(f"M0 {HEIGHT * (top - d) / (top - floor):.2f}H{len(drawn)}" for d in decades)
    labels = [el("span", percent(10.0**d), style=f"top:{100 * (top - d) / (top - floor):.2f}%") for d in decades]
    lowest = min(layers, key=lambda layer: layer[1])
    what = f"Relative error of {plural(len(layers), 'layer')}; the largest is {_amount(lowest[1])} at {lowest[0]}"
    svg = el(
        "svg", el("title", what), el("path", d=lines, class_="grid"), columns,
        viewBox=f"0 0 {len(drawn)} {HEIGHT}", preserveAspectRatio="none", role="img", aria_label=what,
    )  # fmt: skip
    # Few layers: columns would be slabs.
    width = f"max-width:{24 * len(drawn)}px"
    plot = el("div", svg, style=width, class_="columns")
    return el("div", el("div", labels, class_="y-axis", aria_hidden="true"), plot, class_="column-plot")


def _condensed(layers: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """At most MOST_COLUMNS columns; of neighbours that share one, the worst is shown."""
    group = math.ceil(len(layers) / MOST_COLUMNS)
    return [min(layers[i : i + group], key=lambda layer: layer[1]) for i in range(0, len(layers), group)]


def _legend(any_returned: bool) -> Html:
    keys = [("worst", "largest errors"), ("", "other layers")] + ([("returned", "returned to float")] * any_returned)
    items = [el("span", el("span", class_=f"key {kind}".strip()), text) for kind, text in keys]
    return el("p", items, el("span", "first layer left, last layer right"), class_="legend")


def _rows(layers: Sequence[tuple[str, float]], returned: Sequence[str], label: str) -> Html:
    rows = []
    for name, db in layers:
        note = badge("returned to float", "plain") if is_returned(name, returned) else None
        error = percent(relative_error(db)) if math.isfinite(db) else "0"
        rows.append((code(name), error, f"{db:.1f} dB" if math.isfinite(db) else "∞", note))
    return table(("layer output", "error", "SNR", ""), rows, label=label, numeric=(1, 2), wide=0)


def _amount(db: float) -> str:
    return f"{percent(relative_error(db))} ({db:.1f} dB)" if math.isfinite(db) else "no error"
