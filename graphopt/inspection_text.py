"""`graphopt inspect` on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from graphopt import model as models
from graphopt.inspection import Inspection, inspect
from graphopt.report.formats import size
from graphopt.runtime.artifact import MODEL, is_artifact


def inspect_path(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> Inspection:
    """Inspect an ONNX file, or the model inside an artifact. Raises ModelError."""
    file = Path(path) / MODEL if is_artifact(path) else Path(path)
    return inspect(models.fix_inputs(models.load(file), shapes))


def inspection_table(found: Sequence[Inspection], names: Sequence[str]) -> Table:
    """Operators and totals, a column a model."""
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(Text(Path(name).name), justify="right", overflow="fold")
    for operator in sorted({op for f in found for op in f.operators}):
        table.add_row(operator, *(str(f.operators.get(operator, 0)) for f in found))
    table.add_section()
    table.add_row("nodes", *(str(f.nodes) for f in found))
    table.add_row("parameters", *(f"{f.parameters:,}, {size(f.parameter_bytes)}" for f in found))
    table.add_row("MACs", *(f.macs_unknown if f.macs is None else count(f.macs) for f in found))
    table.add_row(
        "peak activation memory",
        *(f.peak_unknown if f.peak_activation_bytes is None else size(f.peak_activation_bytes) for f in found),
    )
    table.add_row("inputs", *(Text("\n".join(f.inputs)) for f in found))
    table.add_row("outputs", *(Text("\n".join(f.outputs)) for f in found))
    table.add_row("dynamic dimensions", *(Text("\n".join(f.dynamic_dims) or "none") for f in found))
    table.add_row("opset", *(Text(", ".join(f"{d} {v}" for d, v in f.opsets.items())) for f in found))
    return table


def layer_table(found: Inspection) -> Table:
    """A row for each node of the main graph."""
    table = Table(title="Layers", title_justify="left", title_style="bold")
    for heading in ("node", "operator", "output", "MACs", "parameters", "activations"):
        table.add_column(heading, justify="left" if heading in ("node", "operator") else "right", overflow="fold")
    for layer in found.layers:
        shape = (
            "?" if layer.output_shape is None else "x".join("?" if d is None else str(d) for d in layer.output_shape)
        )
        table.add_row(
            Text(layer.name),
            layer.op,
            shape,
            "?" if layer.macs is None else count(layer.macs) if layer.macs else "",
            f"{layer.parameters:,}" if layer.parameters else "",
            size(layer.activation_bytes) if layer.activation_bytes is not None else "?",
        )
    return table


def count(number: int) -> str:
    """1234567 -> `1.23 M`."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)
