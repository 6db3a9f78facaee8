"""The search on a terminal: every recipe that was evaluated, and how well its cost had been predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.report.formats import accuracy


def search_text(report: Mapping[str, Any]) -> RenderableType | None:
    """None where there was no search."""
    search = report.get("search")
    if not search:
        return None
    table = Table(title=_title(search), title_justify="left", title_style="bold")
    for heading in ("recipe", "predicted", "measured", f"noise added, {search['noise_unit']}", "accuracy", "lost"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", overflow="fold")
    for trial in search["trials"]:
        table.add_row(
            Text(trial["pipeline"]),
            f"{trial['cost'] / search['plain_cost']:.3f}",
            "-" if trial["measured"] is None else f"{trial['measured']:.3f}",
            f"{trial['noise']:.3g}",
            accuracy(trial["accuracy"]),
            "failed" if trial["drop"] is None else f"{trial['drop']:.2f}",
            style="green" if trial["within_bound"] else None,
        )
    error = prediction_error(search)
    if error is None:
        return table
    return Group(
        table, Text(f"The latency table's predictions were off by {100 * error:.1f} % (mean of the measured).")
    )


def prediction_error(search: Mapping[str, Any]) -> float | None:
    """Mean of |predicted / measured - 1|, of time over the plain pipeline's; None where nothing was measured."""
    errors = [
        abs(trial["cost"] / search["plain_cost"] / trial["measured"] - 1)
        for trial in search["trials"]
        if trial["measured"]
    ]
    return sum(errors) / len(errors) if errors else None


def _title(search: Mapping[str, Any]) -> str:
    what = {"seconds": "time of all kernels", "bytes": "bytes of parameters"}[search["cost_unit"]]
    open_ = "" if search["complete"] else "; time ran out before all were tried"
    return f"Search: {what}, over the plain pipeline's; {len(search['offers'])} choices weighed{open_}"
