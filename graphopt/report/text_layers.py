"""Layers on a terminal: the time of each in every compiled candidate, and what it multiplies there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def layer_table(report: Mapping[str, Any]) -> Table | None:
    """A row for each layer, a column for each compiled candidate; None when no layer was timed."""
    layers = report.get("layers") or ()
    names = list(dict.fromkeys(name for layer in layers for name in layer["seconds"]))
    if not names:
        return None
    delivered = (report.get("choice") or {}).get("candidate")
    table = Table(title="Layers, µs in a run of the model", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("operator")
    for name in names:
        table.add_column(name, justify="right", style="bold" if name == delivered else None)
    for layer in layers:
        table.add_row(Text(layer["layer"]), layer["operator"], *(cell(layer, name) for name in names))
    return table


def cell(layer: Mapping[str, Any], candidate: str) -> str:
    """`12.3 int8`; `-` where the candidate has no kernel for the layer."""
    seconds = layer["seconds"].get(candidate)
    return "-" if seconds is None else f"{1e6 * seconds:.1f} {layer['precision'][candidate]}"
