"""The report as one HTML file that needs nothing else: no script, no font, no network.

A view of the same dictionary as `report.json`, in the order a reader asks: what do I get, how fast is it, is it
still right, what was tried, what was done, under what conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from graphopt.report import html_tables as tables
from graphopt.report.formats import size, speedup
from graphopt.report.front import front_plot, pareto
from graphopt.report.html_latency import latency_plot
from graphopt.report.html_layers import layer_errors
from graphopt.report.html_markup import Html, code, el, join, section
from graphopt.report.html_style import STYLE
from graphopt.report.html_verdict import Outcome, verdict, warnings


def to_html(report: Mapping[str, Any]) -> str:
    """The whole page, from what `Report.to_dict` returns or `report.json` holds.

    Parts that the report lacks (no calibration, nothing measured, no lossy variant) are left out. Every string of
    the report is escaped. The same report gives the same page.
    """
    outcome = Outcome.of(report)
    name = PurePath((report.get("source") or {}).get("path") or "model").name
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{name} · graphopt report"),
        el("style", Html(STYLE)),
    )
    body = el("body", _header(report, name), el("main", _parts(outcome)))
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _header(report: Mapping[str, Any], name: str) -> Html:
    target = (report.get("target") or {}).get("spec")
    passes = (report.get("settings") or {}).get("passes")
    line = [["for ", code(str(target))] if target else None, ["  with ", code(str(passes))] if passes else None]
    return el("header", el("p", "graphopt report", class_="eyebrow"), el("h1", name), el("p", line, class_="muted"))


def _parts(outcome: Outcome) -> Html:
    return join(
        [
            verdict(outcome),
            warnings(outcome.report),
            _latency(outcome),
            _front(outcome),
            _candidates(outcome),
            _model_parts(outcome),
            _size_and_accuracy(outcome),
            _operators(outcome),
            _passes(outcome),
            _layers(outcome),
            _layer_times(outcome),
            _tuning(outcome),
            _conditions(outcome),
        ]
    )


def _latency(outcome: Outcome) -> Html | None:
    reference = (outcome.reference or {}).get("name", "")
    chosen = (outcome.choice or {}).get("candidate")
    plot = latency_plot(outcome.report.get("candidates") or (), reference, chosen)
    if plot is None:
        return None
    note = (
        "Raw samples of one paired, interleaved run. Above the line their histogram, below it the samples "
        "themselves; the upright stroke is the median in its 95 % interval, the dashed one the median of "
        f"{outcome.against}."
    )
    return section("Latency", "latency", plot, note=note)


def _front(outcome: Outcome) -> Html | None:
    front = pareto(outcome.report)
    if front is None or not front["points"]:
        return None
    note = (
        "Every recipe that the search evaluated. Rings were not in the final race: their latency is the plain "
        "pipeline's, times what the search predicted or found between the two. pareto.json holds the recipes; "
        "graphopt optimize --config pareto.json --pick N makes one."
    )
    return section("Accuracy and cost", "front", front_plot(front), note=note)


def _candidates(outcome: Outcome) -> Html | None:
    shown = tables.candidates(outcome)
    return section("Candidates", "candidates", shown) if shown else None


def _model_parts(outcome: Outcome) -> Html | None:
    records = [r for r in outcome.report.get("candidates") or () if r.get("parts")]
    if not records:
        return None
    note = "A model that TVM cannot compile whole is cut into the fewest parts; they run one after another."
    shown = [el("div", el("h3", record["name"]), tables.parts(record), class_="group") for record in records]
    return section("Parts", "parts", shown, note=note)


def _size_and_accuracy(outcome: Outcome) -> Html | None:
    size, accuracy = tables.size_bars(outcome), tables.accuracies(outcome)
    lost = [tables.recovery_text(v) for v in outcome.report.get("variants") or ()]
    sentences = [el("p", sentence) for sentence in lost if sentence]
    parts = [
        section("Size", "size", size) if size else None,
        section("Accuracy", "accuracy", accuracy, sentences) if accuracy else None,
    ]
    return el("div", parts, class_="pair") if any(parts) else None


def _operators(outcome: Outcome) -> Html | None:
    shown = tables.operators(outcome)
    return section("Operators", "operators", shown) if shown else None


def _passes(outcome: Outcome) -> Html | None:
    shown = tables.passes(outcome.report.get("passes") or ())
    return section("Passes", "passes", shown) if shown else None


def _layers(outcome: Outcome) -> Html | None:
    for variant in reversed(outcome.report.get("variants") or ()):
        shown = layer_errors(variant)
        if shown is not None:
            note = (
                f"Noise over signal (root mean square) of each layer's output in the {variant['name']} variant, "
                "against the same value in the exact variant. Layers whose output has no counterpart are left out."
            )
            return section("Error per layer", "layers", shown, note=note)
    return None


def _layer_times(outcome: Outcome) -> Html | None:
    shown = tables.layer_times(outcome)
    if shown is None:
        return None
    note = (
        "The kernel of each layer, with what was fused behind it, timed in runs of the whole model, the candidates in "
        "turns. What converts values between layers is not among them. The fastest is in bold."
    )
    return section("Time per layer", "layer-times", shown, note=note)


def _tuning(outcome: Outcome) -> Html | None:
    shown = tables.tuning(outcome.report.get("candidates") or ())
    return section("Tuning", "tuning", shown) if shown else None


def _size_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """With `--sizes`: what runs each, and how it compares with the input model in ONNX Runtime."""
    found = {}
    for each in report.get("sizes") or ():
        speeds = " to ".join(speedup(speed) for speed in each["speedups"])
        runs = "TVM" if each["status"] == "compiled" else f"ONNX Runtime: {each['reason'] or each['status']}"
        found[each["sizes"]] = f"{runs} ({speeds})" if speeds else runs
    return found


def _library_facts(report: Mapping[str, Any]) -> dict[str, str]:
    """With several targets: what each library is."""
    return {
        each["target"]: ", ".join(filter(None, (size(each["size_bytes"] or None), each["status"], each["reason"])))
        for each in report.get("libraries") or ()
    }


def _conditions(outcome: Outcome) -> Html:
    report = outcome.report
    groups = (
        ("Input model", tables.model_facts(report["source"]) if report.get("source") else None),
        ("Settings", tables.facts(report.get("settings") or {}, "settings")),
        ("Target", tables.facts(report.get("target") or {}, "target")),
        ("Sizes", tables.facts(_size_facts(report), "size")),
        ("Libraries", tables.facts(_library_facts(report), "library")),
        ("Where candidates ran", tables.facts(report.get("place") or {}, "place")),
        ("Environment", tables.facts(report.get("environment") or {}, "environment")),
        ("Data", tables.data_facts(report)),
        ("Time of each stage", tables.seconds_bars(report.get("seconds") or {})),
    )
    shown = [el("div", el("h3", title), content, class_="group") for title, content in groups if content]
    schema = el("p", f"Report schema {report.get('schema', '?')}; the same data is in report.json.", class_="muted")
    return section("Conditions", "conditions", el("div", shown, class_="groups"), schema)
