"""The tables of the report: candidates, size, accuracy, operators, passes, tuning, conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphopt.report import formats, text
from graphopt.report.html_latency import ratio_text, read_latency
from graphopt.report.html_markup import (
    Child,
    Html,
    Row,
    badge,
    bars,
    code,
    el,
    finite,
    fold,
    plural,
    table,
)
from graphopt.report.html_verdict import Outcome, accuracy_text, allowance, loss

MOST_NODES = 40
"""Nodes listed for one reason of skipping; the rest are counted."""
MOST_TASKS = 200


def candidates(outcome: Outcome) -> Html | None:
    """Every variant on every engine: measured, or why not."""
    rows = []
    counted = formats.compared_by(outcome.report) == "instructions"
    for record in outcome.report.get("candidates") or ():
        delivered = record is outcome.chosen
        latency = read_latency(record)
        if counted:
            figures = formats.instructions(record.get("instructions")), formats.share(record["speedup"])
        else:
            figures = formats.milliseconds(latency.summary) if latency else "-", ratio_text(record["speedup"])
        kind = "good" if delivered else {"measured": "plain", "not asked": "plain"}.get(record["status"], "warn")
        if record["status"] == "wrong":
            kind = "bad"
        cells = (
            el("span", record["name"], class_="nowrap"),
            figures[0],
            figures[1] if record is not outcome.reference else "reference",
            formats.size(record["size_bytes"] or None),
            errors_text(record["errors"]),
            [badge("delivered" if delivered else record["status"], kind), " ", record["reason"]],
        )
        rows.append(Row.of(cells, "delivered" if delivered else None))
    if not rows:
        return None
    against = formats.baseline(outcome.report)
    figures = (
        ("instructions, emulated", f"of {against}'s")
        if counted
        else ("median ms [95 %]", f"speed against {against} [95 %]")
    )
    headings = ("candidate", *figures, "size", "error of outputs", "status")
    return table(headings, rows, label="candidates", numeric=(1, 2, 3), wide=5)


def errors_text(errors: Sequence[Mapping[str, Any]]) -> str:
    """`text.error_text`, also where an error is null (infinite)."""
    known = [{**e, "max_abs_error": e["max_abs_error"] if finite(e["max_abs_error"]) else float("inf")} for e in errors]
    return text.error_text({"errors": known})


def size_bars(outcome: Outcome) -> Html | None:
    """The input file, every variant as an ONNX file, every compiled candidate."""
    rows: list[tuple[Child, float, str, str]] = []

    def add(name: str, count: Any, delivered: bool) -> None:
        if finite(count) and count > 0:
            label = [name, " ", badge("delivered", "good")] if delivered else name
            kind = "delivered" if delivered else "reference" if not rows else ""
            rows.append((label, count, formats.size(count), kind))

    choice = outcome.choice or {}
    as_onnx = choice.get("engine") == "onnxruntime"
    if outcome.source:
        add("input · ONNX file", outcome.source["file_bytes"], outcome.unchanged)
    for variant in outcome.report.get("variants") or ():
        delivered = as_onnx and choice.get("variant") == variant["name"]
        add(f"{variant['name']} · ONNX file", variant["file_bytes"], delivered)
    for record in outcome.report.get("candidates") or ():
        if record["engine"] != "onnxruntime":
            add(f"{record['name']} · compiled", record["size_bytes"], record is outcome.chosen)
    return bars(rows, label="size of the files") if rows else None


def accuracies(outcome: Outcome) -> Html | None:
    """Accuracy of the input model, of each variant in ONNX Runtime, and of what is delivered through its engine."""
    settings = outcome.report.get("settings") or {}
    rows, allowed = [], ""
    if (outcome.source or {}).get("accuracy"):
        rows.append(("input", accuracy_text((outcome.source or {})["accuracy"]), None, None))
    for variant in outcome.report.get("variants") or ():
        if not variant["accuracy"]:
            continue
        allowed = allowed or allowance(variant, settings)
        change = _change(variant) if finite(variant["drop"]) else "-"
        held = badge("kept", "good") if variant["within_bound"] else badge("missed", "bad")
        row = (variant["name"], accuracy_text(variant["accuracy"]), change, held)
        rows.append(row if variant["within_bound"] else Row.of(row, "bad"))
    delivered = (outcome.chosen or {}).get("accuracy")
    if delivered and outcome.choice:
        name = [outcome.choice["candidate"], " ", badge("delivered", "good")]
        rows.append(Row.of((name, accuracy_text(delivered), None, None), "delivered"))
    if not rows:
        return None
    bound = el("p", f"Bound: {allowed}.", class_="muted") if allowed else None
    shown = table(("variant", "accuracy", "against input", "bound"), rows, label="accuracy", numeric=(1, 2))
    return el("div", shown, bound)


def _change(variant: Mapping[str, Any]) -> str:
    """`−0.60 points`; for outputs that are no classes what `loss` says."""
    if (variant["accuracy"] or {}).get("metric") == "snr" or abs(variant["drop"]) < 0.005:
        return loss(variant)
    return f"{-variant['drop']:+.2f} points".replace("-", "−")


def recovery_text(variant: Mapping[str, Any]) -> str | None:
    """What returning layers to float brought, in a sentence."""
    before, after = variant.get("plain_drop"), variant.get("drop")
    returned = variant.get("returned_to_float") or ()
    if not returned or not finite(before) or not finite(after):
        return None
    unit = "dB short" if (variant.get("accuracy") or {}).get("metric") == "snr" else "points lost"
    return (
        f"With every layer in integers {before:.2f} {unit}; {after:.2f} after returning "
        f"{plural(len(returned), 'layer')} to float."
    )


def operators(outcome: Outcome) -> Html | None:
    """Nodes by operator type, before and after, with the difference to the input model."""
    variants = outcome.report.get("variants") or ()
    columns = [("input", outcome.source)] if outcome.source else []
    columns += [(v["name"], v) for v in variants]
    if not columns:
        return None
    names = sorted({op for _, c in columns for op in c["operators"]}, key=str.lower)
    rows: list[Sequence[Child]] = [
        (name, *_changes([c["operators"].get(name, 0) for _, c in columns])) for name in names
    ]
    rows.append(Row.of(("all nodes", *_changes([c["nodes"] for _, c in columns])), "total"))
    for title, key in (("parameters", "parameter_bytes"), ("ONNX file", "file_bytes")):
        sizes = [[formats.size(c[key]), el("span", class_="delta") if i else None] for i, (_, c) in enumerate(columns)]
        rows.append(Row.of((title, *sizes), "total"))
    headings = ("operator", *(name for name, _ in columns))
    shown = table(headings, rows, label="operators before and after", numeric=range(1, len(headings)))
    return el("div", shown, class_="compact")


def _changes(counts: Sequence[int]) -> Iterable[Child]:
    for index, count in enumerate(counts):
        difference = count - counts[0]
        if difference == 0:
            yield [count or el("span", "0", class_="muted"), el("span", class_="delta") if index else None]
        else:
            sign = f"{difference:+d}".replace("-", "−")
            yield [str(count), el("span", sign, class_="delta less" if difference < 0 else "delta more")]


def passes(records: Sequence[Mapping[str, Any]]) -> Html | None:
    """One row a pass; below it, foldable, what each skipped and noted."""
    if not records:
        return None
    rows = [
        (
            code(r["spec"]),
            r["fidelity"].lower(),
            r["applied"],
            len(r["skipped"]),
            f"{r['nodes_before']} → {r['nodes_after']}",
            f"{formats.size(r['parameter_bytes_before'])} → {formats.size(r['parameter_bytes_after'])}",
            el("div", errors_text(r["errors"]), class_="prose"),
            f"{r['seconds']:.1f}",
        )
        for r in records
    ]
    headings = ("pass", "fidelity", "applied", "skipped", "nodes", "parameters", "against the input model", "s")
    shown = table(headings, rows, label="passes", numeric=(2, 3, 4, 5, 7), wide=0)
    return el("div", shown, [_skips(r) for r in records if r["skipped"] or r["notes"]])


def _skips(record: Mapping[str, Any]) -> Html:
    reasons: dict[str, list[str]] = {}
    for skip in record["skipped"]:
        reasons.setdefault(skip["reason"], []).append(skip["node"])
    rows = []
    for reason, nodes in sorted(reasons.items(), key=lambda item: -len(item[1])):
        listed: list[Child] = [[code(node), " "] for node in nodes[:MOST_NODES]]
        if len(nodes) > MOST_NODES:
            listed.append(f"and {len(nodes) - MOST_NODES} more")
        rows.append((el("div", reason, class_="prose"), len(nodes), listed))
    name = record["spec"].partition("{")[0]
    count = plural(len(record["skipped"]), "node") + " skipped" if rows else "notes"
    notes = el("ul", [el("li", note) for note in record["notes"]]) if record["notes"] else None
    skipped = table(("reason", "count", "nodes"), rows, label=f"skipped by {name}", numeric=(1,), wide=2)
    return fold([el("strong", name), f": {count}"], notes, skipped if rows else None)


def layer_times(outcome: Outcome) -> Html | None:
    """The time of each layer in every compiled candidate, and what it multiplies there."""
    layers = outcome.report.get("layers") or ()
    names = list(dict.fromkeys(name for layer in layers for name in layer["seconds"]))
    if not names:
        return None
    rows = [
        (code(layer["layer"]), layer["operator"], *(_layer_time(layer, name, names) for name in names))
        for layer in layers
    ]
    numeric = tuple(range(2, 2 + len(names)))
    headings = ("layer", "operator", *(f"{name}, µs" for name in names))
    shown = table(headings, rows, label="time of every layer", numeric=numeric, wide=0)
    return fold(f"All {plural(len(layers), 'layer')}", shown)


def _layer_time(layer: Mapping[str, Any], candidate: str, names: Sequence[str]) -> Child:
    seconds = layer["seconds"].get(candidate)
    if not finite(seconds):
        return "-"
    text = f"{1e6 * seconds:.1f} {layer['precision'][candidate]}"
    fastest = min(layer["seconds"][name] for name in names if finite(layer["seconds"].get(name)))
    return el("strong", text) if seconds == fastest and len(names) > 1 else text


def parts(record: Mapping[str, Any]) -> Html:
    """The parts of a model that is cut for two engines, in the order in which they run."""
    rows = [
        (
            formats.engine_name(part["engine"]),
            str(part["nodes"]),
            code(part["first"]),
            code(part["last"]),
            formats.part_times(part),
            part["why"],
        )
        for part in record["parts"]
    ]
    headings = ("engine", "nodes", "from", "to", "alone, ms: TVM / ONNX Runtime", "why")
    return table(headings, rows, label=f"parts of {record['name']}", numeric=(1, 4), wide=5)


def tuning(records: Sequence[Mapping[str, Any]]) -> Html | None:
    """What the schedule search decided, by candidate."""
    parts = [_tuning(r["name"], r["tuning"]) for r in records if r.get("tuning")]
    return el("div", parts) if parts else None


def _tuning(name: str, tuned: Mapping[str, Any]) -> Html:
    tasks, known = tuned.get("tasks", 0), tuned.get("from_database", 0)
    summary = f"{plural(tasks, 'task')}, {known} known from the database, {plural(tuned.get('trials', 0), 'trial')}"
    if finite(tuned.get("seconds")):
        summary += f", {tuned['seconds']:.1f} s"
    early = [" ", badge("stopped early: the time budget ended", "warn")] if tuned.get("stopped_early") else None
    ordered = sorted(tuned.get("rows") or (), key=lambda row: -_task_time(row))
    total = sum(_task_time(row) for row in ordered)
    rows = []
    for row in ordered[:MOST_TASKS]:
        share = f"{100 * _task_time(row) / total:.1f} %" if total else "-"
        decision: Any = row.get("decision")
        if isinstance(decision, Mapping):
            decision = ", ".join(f"{k}={v}" for k, v in decision.items())
        cells = (code(str(row.get("workload", "-"))), row.get("template") or "-", code(str(decision or "-")))
        peak = f"{100 * row['share_of_peak']:.0f} %" if finite(row.get("share_of_peak")) else "-"
        rows.append((*cells, row.get("calls", "-"), _number(row, "time_us"), share, _number(row, "gflops"), peak))
    headings = ("workload", "template", "decision", "calls", "time µs", "share of time", "GFLOP/s", "of peak")
    shown = table(headings, rows, label=f"tuning of {name}", numeric=(3, 4, 5, 6, 7)) if rows else None
    rest = el("p", f"and {len(ordered) - MOST_TASKS} more tasks", class_="muted") if len(ordered) > MOST_TASKS else None
    digest = el("p", "decisions ", code(str(tuned["digest"])), class_="muted") if tuned.get("digest") else None
    return fold([el("strong", name), f": {summary}", early], shown, rest, digest)


def _task_time(row: Mapping[str, Any]) -> float:
    time, calls = row.get("time_us"), row.get("calls", 1)
    return float(time) * (calls if finite(calls) else 1) if finite(time) else 0.0


def _number(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.1f}" if finite(row.get(key)) else "-"


def seconds_bars(seconds: Mapping[str, float]) -> Html | None:
    """Wall time of each stage."""
    rows = [(stage, value, f"{value:.1f} s", "") for stage, value in seconds.items() if finite(value)]
    return bars(rows, label="seconds by stage") if rows else None


def facts(content: Mapping[str, Any], label: str) -> Html | None:
    """Settings and conditions: a nested dictionary as `key` and value, one row each."""
    rows = list(_flat(content))
    if not rows:
        return None
    return el(
        "dl", [el("div", el("dt", key), el("dd", value)) for key, value in rows], class_="facts", aria_label=label
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Child]]:
    for key, value in content.items():
        title = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{title} · ")
        elif value is None:
            yield title, el("span", "not set", class_="muted")
        elif isinstance(value, (list, tuple)):
            yield title, code(", ".join(map(str, value)))
        else:
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            yield title, code(f"{shown:g}" if isinstance(shown, float) else str(shown))


def data_facts(report: Mapping[str, Any]) -> Html | None:
    """Where calibration and evaluation data came from."""
    rows = {}
    for title in ("calibration", "evaluation"):
        record = report.get(title)
        if not record:
            rows[title] = None
            continue
        kind = "RANDOM numbers" if record["is_random"] else "labelled" if record["labelled"] else "without labels"
        rows[title] = f"{record['source']}: {plural(record['samples'], 'sample')}, {kind}"
    return facts(rows, "data")


def model_facts(source: Mapping[str, Any]) -> Html | None:
    """The model that came in."""
    keys = ("path", "sha256", "opset", "nodes", "inputs", "outputs")
    shapes = {name: "×".join(map(str, shape)) for name, shape in (source.get("measured_shapes") or {}).items()}
    return facts({k: source[k] for k in keys} | {"measured with": shapes}, "input model")
