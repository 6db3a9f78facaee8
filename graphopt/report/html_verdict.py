"""The top of the page: what is delivered, whether the accuracy bound held, and three figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.report import formats
from graphopt.report.html_latency import ratio_text, read_latency
from graphopt.report.html_markup import Html, el, finite


@dataclass(frozen=True)
class Outcome:
    """The delivered candidate with its variant, and the input model beside it; None where the report has none."""

    report: Mapping[str, Any]
    source: Mapping[str, Any] | None
    choice: Mapping[str, Any] | None
    chosen: Mapping[str, Any] | None
    reference: Mapping[str, Any] | None
    """The candidate every other is compared with: the input model in ONNX Runtime, or the exact variant, compiled."""
    variant: Mapping[str, Any] | None

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Outcome:
        candidates = report.get("candidates") or ()
        choice = report.get("choice")
        chosen = next((c for c in candidates if choice and c["name"] == choice["candidate"]), None)
        against = (report.get("place") or {}).get("baseline")
        reference = next(
            (c for c in candidates if c["name"] == against or (not against and c["variant"] == "input")), None
        )
        variants = report.get("variants") or ()
        variant = next((v for v in variants if choice and v["name"] == choice["variant"]), None)
        return cls(report, report.get("source"), choice, chosen, reference, variant)

    @property
    def unchanged(self) -> bool:
        """The model that came in is what is delivered."""
        return self.choice is not None and self.choice["variant"] == "input"

    @property
    def sizes(self) -> tuple[float | None, float | None]:
        """Bytes of the input file and of what is delivered."""
        before = (self.source or {}).get("file_bytes")
        after = before if self.unchanged else (self.chosen or {}).get("size_bytes")
        return before, after or None

    @property
    def accuracies(self) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """Before and after: through the delivered engine where measured there, else in ONNX Runtime."""
        before = (self.source or {}).get("accuracy")
        after = (self.chosen or {}).get("accuracy") or (self.variant or {}).get("accuracy")
        return before, (before if self.unchanged and not after else after)

    @property
    def counted(self) -> bool:
        """Instructions stand in the place of time."""
        return formats.compared_by(self.report) == "instructions"

    @property
    def against(self) -> str:
        """What the delivered candidate is compared with."""
        return "the input model" if formats.baseline(self.report) == "input" else "the exact variant, compiled"

    @property
    def gain_is_certain(self) -> bool:
        ratio = (self.chosen or {}).get("speedup")
        return bool(ratio) and finite(ratio[1]) and ratio[1] > 1


def verdict(outcome: Outcome) -> Html:
    """Headline, bound, warnings and the three figures."""
    report = outcome.report
    met = report.get("accuracy_met", True)
    kind = "bad" if not met or outcome.choice is None else "good" if outcome.gain_is_certain else "plain"
    parts: list[Html | None] = [el("p", headline(outcome), class_="headline")]
    if outcome.choice is not None:
        parts.append(el("p", "Delivered: ", el("strong", outcome.choice["candidate"]), f": {outcome.choice['why']}"))
    if not met:
        parts.insert(0, el("p", _missed(outcome), class_="missed", role="alert"))
    parts.append(el("div", _speed(outcome), _accuracy(outcome), _size(outcome), class_="figures"))
    return el("section", parts, class_=f"verdict {kind}", aria_label="verdict")


def warnings(report: Mapping[str, Any]) -> Html | None:
    """Every warning, loud."""
    found = report.get("warnings") or ()
    if not found:
        return None
    title = el("h2", "Warning" if len(found) == 1 else f"{len(found)} warnings", id="warnings")
    return el("section", title, el("ul", [el("li", w) for w in found]), class_="warnings", aria_labelledby="warnings")


def headline(outcome: Outcome) -> str:
    """The result in one line."""
    if outcome.choice is None:
        return "No artifact was chosen: this run did not end"
    if outcome.unchanged:
        return "The input model is delivered as it came: nothing measured faster"
    if formats.compared_by(outcome.report) == "nothing":
        return f"Built for {formats.place(outcome.report)}: neither run nor timed"
    ratio = (outcome.chosen or {}).get("speedup")
    before, after = outcome.sizes
    smaller = f" and {100 * (1 - after / before):.0f} % smaller" if before and after and after < 0.995 * before else ""
    if outcome.counted and ratio:
        share = f"{1 / ratio[0]:.2f}× the instructions of" if ratio[0] != 1 else "As many instructions as"
        return f"{share} {outcome.against}{smaller}; never timed on a device"
    if outcome.gain_is_certain and ratio:
        return f"{ratio[0]:.2f}× as fast as {outcome.against}{smaller}"
    return f"As fast as {outcome.against} within measurement error{smaller}"


def accuracy_text(record: Mapping[str, Any] | None) -> str:
    """`formats.accuracy`, also where the value is null."""
    if not record or (record.get("value") is None and record["metric"] != "snr"):
        return "-"
    return formats.accuracy(record)


def _missed(outcome: Outcome) -> list[Html | str]:
    report = outcome.report
    last = next((v for v in reversed(report.get("variants") or ()) if not v["within_bound"]), None)
    parts: list[Html | str] = [el("strong", "Accuracy bound missed.")]
    if last is not None and finite(last["drop"]):
        allowed = allowance(last, report.get("settings") or {})
        parts.append(
            f" The best {last['name']} variant is {loss(last)}" + (f"; the bound is {allowed}." if allowed else ".")
        )
    kept = outcome.unchanged or (outcome.variant is not None and outcome.variant["within_bound"])
    if kept:
        parts.append(" What is delivered is a variant that keeps the bound.")
    elif outcome.choice is not None:
        parts.append(" It is delivered nevertheless: it is the best that was found.")
    return parts


def loss(variant: Mapping[str, Any]) -> str:
    """`0.40 points worse`; for outputs that are no classes `3.0 dB short`."""
    if (variant.get("accuracy") or {}).get("metric") == "snr":
        return f"{variant['drop']:.1f} dB short" if variant["drop"] > 0 else "enough"
    drop = variant["drop"]
    if abs(drop) < 0.005:
        return "unchanged"
    return f"{abs(drop):.2f} points {'better' if drop < 0 else 'worse'}"


def allowance(variant: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The accuracy bound of the run, in the metric of `variant`; empty where the settings do not say."""
    if (variant.get("accuracy") or {}).get("metric") == "snr":
        return f"at least {settings['min_snr']:g} dB" if finite(settings.get("min_snr")) else ""
    most = settings.get("max_drop")
    return f"at most {most:g} point{'' if most == 1 else 's'} lost" if finite(most) else ""


def _figure(title: str, value: str, before: str, note: str, kind: str = "") -> Html:
    return el(
        "div",
        el("div", title, class_="figure-title"),
        el("div", value, class_=f"figure-value {kind}".strip()),
        el("div", before, class_="figure-change"),
        el("div", note, class_="muted") if note else None,
        class_="figure",
    )


def _instructions(outcome: Outcome) -> Html:
    ratio, count = (outcome.chosen or {}).get("speedup"), (outcome.chosen or {}).get("instructions")
    before = (outcome.reference or {}).get("instructions")
    if count is None or before is None:
        return _figure("Instructions", "-", "not counted", "")
    change = f"{formats.instructions(before)} → {formats.instructions(count)}"
    note = f"of one inference, counted, not timed: {formats.place(outcome.report)}"
    return _figure("Instructions, emulated", formats.share(ratio), change, note, "good" if count < before else "")


def _speed(outcome: Outcome) -> Html:
    if outcome.counted:
        return _instructions(outcome)
    before = read_latency(outcome.reference) if outcome.reference else None
    after = read_latency(outcome.chosen) if outcome.chosen else None
    threads = (outcome.report.get("settings") or {}).get("threads")
    note = f"median of one paired run, {threads} thread{'' if threads == 1 else 's'}" if threads else "one paired run"
    if before is None or after is None:
        return _figure("Latency", "-", "not measured", "")
    if outcome.unchanged:
        return _figure("Latency", f"{after.median_ms:.3f} ms", "as it came in", note)
    value = ratio_text((outcome.chosen or {}).get("speedup"))
    number, _, interval = value.partition(" ")
    change = f"{before.median_ms:.3f} → {after.median_ms:.3f} ms"
    kind = "good" if outcome.gain_is_certain else ""
    return _figure("Speed", number, change, f"95 % interval {interval}; {note}" if interval else note, kind)


def _accuracy(outcome: Outcome) -> Html:
    before, after = outcome.accuracies
    data = outcome.report.get("evaluation")
    if not after:
        reason = "no evaluation data was given" if not data else "not measured"
        return _figure("Accuracy", "not measured", reason, "")
    metric = after["metric"]
    engine = (
        f"through {formats.engine_name(outcome.choice['engine'])}"
        if (outcome.chosen or {}).get("accuracy") and outcome.choice
        else ""
    )
    on = f"on {after['count']} samples" if after.get("count") else ""
    note = " ".join(filter(None, (on, engine)))
    value = accuracy_text(after).removeprefix("top-1 ").removeprefix("agreement ").removeprefix("SNR ")
    titles = {"top1": "Top-1 accuracy", "agreement": "Agreement with the input model", "snr": "Signal-to-noise"}
    change = "against the input model's outputs"
    kind = "bad" if outcome.variant is not None and not outcome.variant["within_bound"] else ""
    if before and before["metric"] == metric and finite(before["value"]) and finite(after["value"]):
        delta = after["value"] - before["value"]
        moved = "unchanged" if abs(delta) < 0.005 else f"{delta:+.2f} points".replace("-", "−")
        change = f"{before['value']:.2f} → {after['value']:.2f} % ({moved})"
    return _figure(titles.get(metric, "Accuracy"), value, change, note, kind)


def _size(outcome: Outcome) -> Html:
    before, after = outcome.sizes
    if not before or not after:
        return _figure("Size", formats.size(after or before), "not compared", "")
    value = (
        f"{100 * (after / before - 1):+.0f} %".replace("-", "−") if abs(after / before - 1) >= 0.005 else "unchanged"
    )
    engine = (outcome.choice or {}).get("engine")
    notes = {"tvm": "compiled library with its weights", "hybrid": "compiled libraries and ONNX files of the parts"}
    note = notes.get(str(engine), "ONNX file")
    kind = "good" if after < 0.995 * before else ""
    return _figure("Size", value, f"{formats.size(before)} → {formats.size(after)}", note, kind)
