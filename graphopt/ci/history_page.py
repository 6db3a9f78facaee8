"""A history as people see it: a line of blocks on a terminal, a page of plots in a browser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphopt.ci.change_points import Change
from graphopt.ci.history import Entry
from graphopt.report.html_markup import Html, el, section, table
from graphopt.report.html_style import STYLE
from graphopt.report.scatter import Series, scatter

BLOCKS = "▁▂▃▄▅▆▇█"
WIDEST = 100


def sparkline(values: Sequence[float]) -> str:
    """A block a value on a logarithmic scale from the least to the largest; the last `WIDEST` of them."""
    logs = [math.log(value) for value in values[-WIDEST:]]
    low, span = min(logs), max(logs) - min(logs)
    if span < 1e-9:
        return BLOCKS[0] * len(logs)
    return "".join(BLOCKS[min(int((x - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for x in logs)


def history_page(
    lines: Mapping[tuple[str, str], Sequence[Entry]], changes: Mapping[tuple[str, str], Sequence[Change]]
) -> Html:
    """One self-contained page: for each case and machine a plot, and a table of its changes."""
    parts = []
    for number, (key, line) in enumerate(lines.items()):
        case, machine = key
        parts.append(
            section(
                case,
                f"case-{number}",
                _plot(line, changes[key]),
                _changes(line, changes[key]),
                note=f"On the machine {machine[:12]}, {len(line)} commits.",
            )
        )
    head = el("head", el("meta", charset="utf-8"), el("title", "Latency by commit"), el("style", STYLE))
    return Html(
        "<!doctype html>\n" + el("html", head, el("body", el("main", el("h1", "Latency by commit"), parts)), lang="en")
    )


def _plot(line: Sequence[Entry], changes: Sequence[Change]) -> Html:
    """Commits in their order; a line joins each level's median."""
    points = [(float(k), 1e3 * entry.median_s) for k, entry in enumerate(line)]
    notes = [f"{entry.commit[:12]}, {entry.time}: {1e3 * entry.median_s:.4g} ms" for entry in line]
    starts = {change.index for change in changes}
    drawn = [Series("commit", points, notes, hollow=[k in starts for k in range(len(points))])]
    edges = [0, *sorted(starts), len(line)]
    levels = [changes[0].before, *(change.after for change in changes)] if changes else []
    drawn += [
        Series(f"level {k + 1}", [(edges[k], 1e3 * level), (edges[k + 1] - 1, 1e3 * level)])
        for k, level in enumerate(levels)
    ]
    return scatter(drawn, "commits, in the order measured", "median latency, ms")


def _changes(line: Sequence[Entry], changes: Sequence[Change]) -> Html:
    if not changes:
        return el("p", "No change of level.")
    rows = [
        (
            line[c.index].commit[:12], line[c.index].time, f"{1e3 * c.before:.3f}", f"{1e3 * c.after:.3f}",
            f"{100 * (c.ratio - 1):+.1f} %", f"{c.p_value:.4f}",
        )
        for c in changes
    ]  # fmt: skip
    headings = ("since commit", "measured", "before, ms", "after, ms", "change", "p")
    return table(headings, rows, label="changes of level", numeric=(2, 3, 4, 5))
