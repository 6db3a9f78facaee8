"""The report on a terminal: what people print after onnxslim and onnxsim, plus accuracy and measured latency.

Works on the dictionary of `report.json`, so a saved report prints the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graphopt.report.formats import (
    accuracy,
    baseline,
    compared_by,
    engine_name,
    instructions,
    milliseconds,
    part_times,
    place,
    share,
    size,
    speedup,
)
from graphopt.report.text_search import search_text


def to_text(report: Mapping[str, Any], details: bool = False) -> RenderableType:
    """Everything worth reading after a run; `details` lists every skipped node."""
    parts: list[RenderableType] = [_passes(report), _operators(report)]
    skipped = _skipped(report, details)
    if skipped is not None:
        parts.append(skipped)
    searched = search_text(report)
    parts += [] if searched is None else [searched]
    parts.append(_candidates(report))
    parts += [_parts(record) for record in report["candidates"] if record.get("parts")]
    if report.get("libraries"):
        parts.append(_libraries(report))
    if report.get("sizes"):
        parts.append(_sizes(report))
    parts += _conclusion(report)
    return Group(*parts)


def pass_line(record: Mapping[str, Any]) -> str:
    """One line for a pass that has just run."""
    skipped = f", {len(record['skipped'])} skipped" if record["skipped"] else ""
    error = error_text(record)
    return (
        f"{record['spec']}: {record['applied']} applied{skipped}; nodes {record['nodes_before']} -> "
        f"{record['nodes_after']}, parameters {size(record['parameter_bytes_before'])} -> "
        f"{size(record['parameter_bytes_after'])}" + (f"; {error}" if error != "-" else "")
    )


def error_text(record: Mapping[str, Any]) -> str:
    """Worst error against the input model: absolute and its tolerance, or signal-to-noise for lossy passes."""
    errors = record["errors"]
    if not errors:
        return "-"
    if any(e["tolerance"] is None for e in errors):
        ratios = [e["snr_db"] for e in errors if e["snr_db"] is not None]
        return f"SNR {min(ratios):.1f} dB" if ratios else "exact"
    worst = max(errors, key=lambda e: e["max_abs_error"] / max(e["tolerance"], 1e-300))
    return f"error {worst['max_abs_error']:.1e} (rounding explains {worst['tolerance']:.1e})"


def _passes(report: Mapping[str, Any]) -> RenderableType:
    table = Table(title="Passes", title_justify="left", title_style="bold")
    for heading in ("pass", "fidelity", "applied", "skipped", "nodes", "parameters", "against the input model", "s"):
        worded = heading in ("pass", "fidelity", "against the input model")
        table.add_column(heading, justify="left" if worded else "right", overflow="fold")
    for record in report["passes"]:
        table.add_row(
            Text(record["spec"]),
            record["fidelity"].lower(),
            str(record["applied"]),
            str(len(record["skipped"])),
            f"{record['nodes_before']} → {record['nodes_after']}",
            f"{size(record['parameter_bytes_before'])} → {size(record['parameter_bytes_after'])}",
            error_text(record),
            f"{record['seconds']:.1f}",
        )
    return table


def _operators(report: Mapping[str, Any]) -> RenderableType:
    columns = [("input", report["source"]), *((v["name"], v) for v in report["variants"])]
    names = sorted({op for _, c in columns for op in c["operators"]})
    table = Table(title="Operators", title_justify="left", title_style="bold")
    table.add_column("operator")
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for name in names:
        counts = [c["operators"].get(name, 0) for _, c in columns]
        table.add_row(name, *(_changed(n, counts[0]) for n in counts))
    table.add_section()
    table.add_row("all nodes", *(_changed(c["nodes"], columns[0][1]["nodes"]) for _, c in columns))
    table.add_row("parameters", *(size(c["parameter_bytes"]) for _, c in columns))
    table.add_row("file", *(size(c["file_bytes"]) for _, c in columns))
    if any(c.get("accuracy") for _, c in columns):
        table.add_row("accuracy", *(accuracy(c.get("accuracy")) for _, c in columns))
    return table


def _changed(count: int, before: int) -> Text:
    return Text(str(count), style="green" if count < before else "yellow" if count > before else "")


def _skipped(report: Mapping[str, Any], details: bool) -> RenderableType | None:
    rows = [(p["spec"].partition("{")[0], s) for p in report["passes"] for s in p["skipped"]]
    if not rows:
        return None
    table = Table(title="Skipped", title_justify="left", title_style="bold")
    table.add_column("pass")
    table.add_column("nodes", justify="left" if details else "right", overflow="fold")
    table.add_column("reason", overflow="fold")
    if details:
        for name, skip in rows:
            table.add_row(name, Text(skip["node"]), Text(skip["reason"]))
    else:
        for (name, reason), count in Counter((n, s["reason"]) for n, s in rows).most_common(8):
            table.add_row(name, str(count), Text(reason))
    return table


def _candidates(report: Mapping[str, Any]) -> RenderableType:
    threads = report["settings"].get("threads")
    counted = compared_by(report) == "instructions"
    if counted:
        title = f"Instructions of one inference, counted, not timed: {place(report)}"
        headings = ("candidate", "instructions, emulated", f"of {baseline(report)}'s", "size", "")
    elif compared_by(report) == "nothing":
        title = f"Built, neither run nor timed: {place(report)}"
        headings = ("candidate", "median ms [95 %]", f"speed against {baseline(report)}", "size", "")
    else:
        title = f"Measured on {place(report)}, {threads} thread{'s' if threads != 1 else ''}, one paired run"
        headings = ("candidate", "median ms [95 %]", f"speed against {baseline(report)} [95 %]", "size", "")
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("candidate", "") else "right", overflow="fold")
    choice = report["choice"]["candidate"] if report["choice"] else None
    for record in report["candidates"]:
        chosen = record["name"] == choice
        note = "delivered" if chosen else "" if record["status"] == "measured" else record["status"]
        if record["reason"]:
            note = f"{note}: {record['reason']}"
        table.add_row(
            record["name"],
            instructions(record["instructions"]) if counted else milliseconds(record["latency"]),
            share(record["speedup"]) if counted else speedup(record["speedup"]),
            size(record["size_bytes"] or None),
            Text(note),
            style="bold green" if chosen else None,
        )
    return table


def _parts(record: Mapping[str, Any]) -> RenderableType:
    """A model cut for two engines: which, where and why."""
    table = Table(title=f"Parts of {record['name']}, in order", title_justify="left", title_style="bold")
    for heading in ("engine", "nodes", "from", "to", "alone, ms: TVM / ONNX Runtime", "why"):
        numeric = heading == "nodes" or heading.startswith("alone")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for part in record["parts"]:
        cells = (engine_name(part["engine"]), str(part["nodes"]), Text(part["first"]), Text(part["last"]))
        table.add_row(*cells, part_times(part), Text(part["why"]))
    return table


def _libraries(report: Mapping[str, Any]) -> RenderableType:
    table = Table(title="Libraries, in the order a processor tries them", title_justify="left", title_style="bold")
    for heading in ("target", "median ms [95 %]", "instructions, emulated", "size", ""):
        table.add_column(heading, justify="left" if heading in ("target", "") else "right", overflow="fold")
    for record in report["libraries"]:
        note = f"{record['status']}: {record['reason']}" if record["reason"] else record["status"]
        table.add_row(
            Text(record["target"]),
            milliseconds(record["latency"]),
            instructions(record["instructions"]),
            size(record["size_bytes"] or None),
            Text(note),
        )
    return table


def _sizes(report: Mapping[str, Any]) -> RenderableType:
    title = "Sizes, compiled, against the input model in ONNX Runtime [95 %]"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("sizes", "speed of the smallest", "of the largest", "run by"):
        table.add_column(heading, justify="right" if heading.startswith(("speed", "of")) else "left", overflow="fold")
    for record in report["sizes"]:
        speeds = [speedup(each) for each in record["speedups"]] or ["-"]
        compiled = record["status"] == "compiled"
        runs = "TVM" if compiled else f"ONNX Runtime: {record['reason'] or record['status']}"
        table.add_row(Text(record["sizes"]), speeds[0], speeds[-1], Text(runs))
    return table


def _conclusion(report: Mapping[str, Any]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for variant in report["variants"]:
        if variant["plain_drop"] is not None:
            unit = "dB short of the bound" if variant["accuracy"]["metric"] == "snr" else "points lost"
            returned = variant["returned_to_float"]
            text = f"{variant['name']}: {variant['plain_drop']:.2f} {unit}"
            if returned:
                text += (
                    f"; {variant['drop']:.2f} after returning {len(returned)} "
                    f"layer{'s' if len(returned) > 1 else ''} to float: {', '.join(returned)}"
                )
            lines.append(Text(text))
    choice = report["choice"]
    if choice:
        chosen = next(c for c in report["candidates"] if c["name"] == choice["candidate"])
        before = accuracy(report["source"].get("accuracy"))
        measured = f"; {accuracy(chosen['accuracy'])} through the artifact's engine" if chosen["accuracy"] else ""
        if (
            chosen["accuracy"]
            and report.get("evaluation")
            and chosen["accuracy"]["count"] < report["evaluation"]["samples"]
        ):
            measured += f" on {chosen['accuracy']['count']} samples"
        measured += f" (input model {before})" if measured and before != "-" else ""
        lines.append(Text(f"Delivered: {choice['candidate']}: {choice['why']}{measured}", style="bold"))
    lines += [Text(f"WARNING: {w}", style="bold red") for w in report["warnings"]]
    return lines
