"""The page is well formed, whole in itself, and says what the report says, however much of the report there is."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.measure.stats import LatencyStats
from graphopt.passes.base import Fidelity, Skip
from graphopt.pipeline import PassRecord
from graphopt.report import CandidateRecord, Choice, DataRecord, LayerRecord, Report, SourceRecord, VariantRecord
from graphopt.report.html import to_html
from graphopt.report.html_latency import read_latency
from graphopt.report.html_layers import is_returned, relative_error
from graphopt.report.html_markup import bars, el, escape, nice_step
from graphopt.report.html_style import STYLE
from graphopt.targets.base import TuningReport
from graphopt.verify import OutputError

VOID = {"meta", "br", "col"}
NASTY = "layer<script>alert(1)</script>&\"'\x00\ud800"


class Page(HTMLParser):
    """Parses strictly: every tag closed by its own end tag. Keeps text, elements and attributes."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def count(self, tag: str, class_: str = "") -> int:
        return sum((t == tag and class_ in (a.get("class") or "").split(" ")) or (t == tag and not class_)
                   for t, a in self.elements)  # fmt: skip

    def headings(self) -> list[str]:
        return [str(a["id"]) for t, a in self.elements if t == "h2"]


def samples(median_ms: float, count: int, seed: int) -> dict:
    """Right-skewed latencies, as operating systems give them."""
    noise = np.random.default_rng(seed).gamma(2.0, 0.012, count)
    return LatencyStats(tuple(1e-3 * median_ms * (0.98 + noise))).to_dict()


def full_report(layers: int = 40, count: int = 300) -> Report:
    """A run of the int8 preset on a classifier: recovery, tuning, an unavailable candidate, random names."""
    before = {"Conv": 26, "Relu": 26, "Concat": 8, "MaxPool": 3, "Constant": 2, "Dropout": 1, "Identity": 4}
    exact = {"Conv": 26, "Relu": 26, "Concat": 8, "MaxPool": 3}
    final = {**exact, "QuantizeLinear": 31, "DequantizeLinear": 83}
    noise = np.random.default_rng(7).normal(34, 5, layers)
    names = [f"/features/fire{i // 3}/expand3x3/Conv{i}_output_0" for i in range(layers)]
    snr = dict(zip(names, noise.tolist(), strict=True)) | {names[3]: math.inf, names[layers // 2]: 11.2}
    source = SourceRecord(
        path="/models/squeezenet1_1.onnx", sha256="1f96f3c3" * 8, inputs=("image float32[N,3,224,224]",),
        outputs=("logits float32[N,1000]",), opset=17, nodes=sum(before.values()), operators=before,
        parameter_bytes=4_940_000, file_bytes=4_956_000, measured_shapes={"image": (1, 3, 224, 224)},
        accuracy={"metric": "top1", "value": 72.4, "count": 1000},
    )  # fmt: skip
    skips = tuple(Skip(f"/classifier/Dropout_{i}", "its input has another consumer") for i in range(60))
    passes = [
        PassRecord("simplify", Fidelity.EXACT, 7, skips, ("onnxsim was not used: it grows the graph",), 70, 63, before,
                   exact, 4_940_000, 4_940_000, 1.24, (OutputError("logits", 0.0, 2.3e-4, math.inf),)),
        PassRecord("quantize-int8{calibration=percentile}", Fidelity.LOSSY, 26, (Skip("/classifier/Conv", "excluded"),),
                   (), 63, 177, exact, final, 4_940_000, 1_260_000, 14.8,
                   (OutputError("logits", 0.81, math.inf, 24.3),)),
    ]  # fmt: skip
    variants = [
        VariantRecord("exact", "simplify", 63, exact, 4_940_000, 4_950_000,
                      (OutputError("logits", 1.1e-6, 2.3e-4, 121.0),), {"metric": "top1", "value": 72.4, "count": 1000},
                      0.0),
        VariantRecord("final", "simplify,quantize-int8{exclude=[/features/fire0/expand3x3/Conv2]}", 175, final,
                      1_260_000, 1_310_000, (OutputError("logits", 0.81, math.inf, 24.3),),
                      {"metric": "top1", "value": 71.8, "count": 1000}, 0.6, True, 1.7,
                      ("/features/fire0/expand3x3/Conv2",), layer_snr_db=snr),
    ]  # fmt: skip
    row = {"workload": "conv2d 1x64x56x56 * 64x64x3x3", "template": "conv2d_blocked", "gflops": 71.4, "calls": 2,
           "decision": {"ow": 14, "lanes": 16, "unroll": True}, "time_us": 512.3}  # fmt: skip
    rows = tuple({**row, "time_us": 40.0 * i + 20, "workload": f"conv2d {i} <{NASTY}>"} for i in range(14))
    tuning = dataclasses.asdict(TuningReport(14, 3, 168, 58.2, "c0ffee" * 10, rows, stopped_early=True))
    times = {"input · onnxruntime": (14.2, None), "exact · onnxruntime": (14.0, (1.01, 1.0, 1.02)),
             "exact · tvm": (10.4, (1.37, 1.35, 1.39)), "final · onnxruntime": (6.1, (2.33, 2.28, 2.37))}  # fmt: skip
    candidates = []
    for seed, (name, (median, ratio)) in enumerate(times.items()):
        variant, _, engine = name.partition(" · ")
        record = CandidateRecord(name, variant, engine, "measured", latency=samples(median, count, seed),
                                 speedup=ratio or (1.0, 1.0, 1.0), size_bytes=1_310_000 if variant == "final" else
                                 4_956_000)  # fmt: skip
        candidates.append(dataclasses.replace(record, tuning=tuning) if engine == "tvm" else record)
    candidates[-1] = dataclasses.replace(candidates[-1], accuracy={"metric": "top1", "value": 71.9, "count": 1000})
    reason = "operator Einsum is not supported (node 'head & tail')"
    candidates.append(CandidateRecord("final · tvm", "final", "tvm", "unavailable", reason))
    return Report(
        settings={"model": "/models/squeezenet1_1.onnx", "passes": "simplify,quantize-int8{calibration=percentile}",
                  "max_drop": 1.0, "min_snr": 20.0, "threads": 1, "overwrite": False, "output": None, "inputs": {},
                  "seed": 0},
        source=source,
        target={"spec": "cpu{mcpu=cascadelake,threads=1}", "architecture": "x86-64", "int8 dot product": "vnni"},
        environment={"fingerprint": "ab" * 32, "machine": {"cpu": "Xeon (6/85/7)", "cores": 2},
                     "versions": {"python": "3.11.2", "numpy": "2.1.0"}},
        calibration=DataRecord("/data/calib", 200, True, False),
        evaluation=DataRecord("/data/eval", 1000, True, False),
        passes=passes,
        variants=variants,
        candidates=candidates,
        layers=(LayerRecord(NASTY, "Conv", {"exact · tvm": 41e-6, "final · tvm": 11.5e-6},
                            {"exact · tvm": "float32", "final · tvm": "int8"}),
                LayerRecord("fc", "Gemm", {"exact · tvm": 7e-6}, {"exact · tvm": "float32"})),
        choice=Choice("final · onnxruntime", "final", "onnxruntime", "2.33x the speed of the input model"),
        seconds={"load": 1.1, "rewrite": 21.9, "compile": 64.0, "measure": 15.2},
    )  # fmt: skip


def page_of(report: Report) -> Page:
    """What is read back from disk: through JSON and UTF-8, as in an artifact."""
    written = to_html(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    return Page(written.encode("utf-8").decode("utf-8"))


def test_says_what_is_delivered_first():
    page = page_of(full_report())
    assert page.headings() == [
        "latency", "candidates", "size", "accuracy", "operators", "passes", "layers", "layer-times", "tuning",
        "conditions",
    ]  # fmt: skip
    first = page.text[: page.text.index("Raw samples of one")]
    for words in ("2.33× as fast as the input model and 74 % smaller", "final · onnxruntime", "[2.28, 2.37]",
                  "72.40 → 71.90 % (−0.50 points)", "4.96 MB → 1.31 MB"):  # fmt: skip
        assert words in first
    assert "bound missed" not in page.text


def test_every_candidate_pass_layer_and_task_is_there():
    report = full_report()
    page = page_of(report)
    for candidate in report.candidates:
        assert page.text.count(candidate.name) >= 1
    assert "operator Einsum is not supported (node 'head & tail')" in page.text
    assert "simplify: 60 nodes skipped" in page.text
    assert "and 20 more" in page.text
    assert "onnxsim was not used" in page.text
    assert "With every layer in integers 1.70 points lost; 0.60 after returning 1 layer to float." in page.text
    assert "14 tasks, 3 known from the database, 168 trials" in page.text
    assert "top-1 71.80 %−0.60 pointskept" in page.text
    assert "ow=14, lanes=16, unroll=True" in page.text
    assert "41.0 float3211.5 int8" in page.text and "fcGemm7.0 float32-" in page.text
    assert page.count("rect") == len(report.variants[-1].layer_snr_db)
    assert page.count("rect", "returned") == 1
    assert "Conv20_output_0: 27.5 % (11.2 dB)" in page.text  # 10^(-11.2 / 20)


def test_needs_nothing_but_itself():
    html = to_html(full_report().to_dict())
    page = Page(html)
    assert not {t for t, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [a for _, a in page.elements if set(a) & {"src", "href", "srcset", "action", "xlink:href"}]
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_same_report_same_page():
    assert to_html(full_report().to_dict()) == to_html(full_report().to_dict())


def test_every_drawing_has_a_name():
    for tag, attributes in page_of(full_report()).elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if attributes.get("role") == "region":
            assert attributes["aria-label"]


def replace_text(value, old: str, new: str):
    """The same report with `new` wherever a string (also a key) holds `old`."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [replace_text(v, old, new) for v in value]
    if isinstance(value, dict):
        return {replace_text(k, old, new): replace_text(v, old, new) for k, v in value.items()}
    return value


@pytest.mark.parametrize("old", ["e", "o", "n", "i", "/"])
def test_no_string_of_the_report_becomes_markup(old):
    """Poison the contents, not the schema: only keys and strings below the fields that hold names are replaced."""
    clean = full_report().to_dict()
    poisoned = json.loads(json.dumps(clean))
    for key in ("settings", "target", "environment"):
        poisoned[key] = replace_text(poisoned[key], old, NASTY)
    for record in (*poisoned["variants"], poisoned["source"]):
        for key in ("operators", "layer_snr_db", "returned_to_float", "inputs", "path", "pipeline"):
            record[key] = replace_text(record.get(key), old, NASTY)
    for record in poisoned["passes"]:
        for key in ("spec", "notes"):
            record[key] = replace_text(record[key], old, NASTY)
        record["skipped"] = [{k: replace_text(v, old, NASTY) for k, v in s.items()} for s in record["skipped"]]
    for record in poisoned["candidates"]:
        for key in ("name", "reason", "engine"):
            record[key] = replace_text(record[key], old, NASTY)
    poisoned["choice"]["candidate"] = replace_text(poisoned["choice"]["candidate"], old, NASTY)
    poisoned["choice"]["why"] = poisoned["warnings"] = [NASTY]
    poisoned["choice"]["why"] = NASTY
    html = to_html(poisoned)
    page = Page(html.encode("utf-8").decode("utf-8"))
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert "layer<script>alert(1)</script>&\"'\ufffd\ufffd" in page.text
    assert set(tags) - {"ul", "li", "h2", "span"} <= {tag for tag, _ in Page(to_html(clean)).elements}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_any_text_survives_and_stays_text(text):
    parsed = Page(el("p", text, title=text))
    assert [t for t, _ in parsed.elements] == ["p"]
    shown = escape(text)
    shown.encode("utf-8")
    replaced = sum(a != b for a, b in zip(text, "".join(parsed.words), strict=False))
    # The parser itself turns carriage returns to nothing else; only what HTML cannot hold is replaced.
    assert replaced == sum((ord(c) < 32 and c not in "\t\n\r") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000
                           or c in "\ufffe\uffff" for c in text)  # fmt: skip
    assert parsed.elements[0][1]["title"] == "".join(parsed.words)


def test_nothing_done_yet():
    page = page_of(Report(settings={}))
    assert "No artifact was chosen" in page.text
    assert page.count("svg") == 0
    assert page.headings() == ["conditions"]


def test_input_delivered_without_data():
    """exact preset, no data, nothing faster: no accuracy, no calibration, no final variant."""
    full = full_report()
    only = dataclasses.replace(full.candidates[0])
    report = dataclasses.replace(
        full, calibration=None, evaluation=None, variants=[dataclasses.replace(full.variants[0], accuracy=None)],
        source=dataclasses.replace(full.source, accuracy=None) if full.source else None, candidates=[only],
        choice=Choice(only.name, "input", "onnxruntime", "nothing measured faster"), passes=[],
    )  # fmt: skip
    page = page_of(report)
    assert "The input model is delivered as it came" in page.text
    assert "no evaluation data was given" in page.text
    assert "layers" not in page.headings()
    assert "accuracy" not in page.headings()
    assert page.count("svg") == 1


def test_missed_bound_is_loud():
    full = full_report()
    final = dataclasses.replace(full.variants[1], within_bound=False, drop=4.25)
    chosen = full.candidates[2]
    report = dataclasses.replace(
        full, accuracy_met=False, variants=[full.variants[0], final], warnings=["the accuracy bound is MISSED", "two"],
        choice=Choice(chosen.name, "exact", "tvm", "1.37x the speed"),
    )  # fmt: skip
    page = page_of(report)
    assert [a for _, a in page.elements if a.get("role") == "alert" and a.get("class") == "missed"]
    assert (
        "Accuracy bound missed. The best final variant is 4.25 points worse; the bound is at most 1 point lost."
        in page.text
    )
    assert page.count("section", "bad") == 1
    assert page.headings()[0] == "warnings"
    assert page.text.index("MISSED") < page.text.index("Raw samples of one")


def test_outputs_that_are_no_classes():
    full = full_report()
    accuracy = {"metric": "snr", "value": 17.5, "count": 8}
    exact = dataclasses.replace(full.variants[0], accuracy={"metric": "snr", "value": math.inf, "count": 8})
    final = dataclasses.replace(full.variants[1], accuracy=accuracy, drop=2.5, within_bound=False)
    candidates = [dataclasses.replace(c, accuracy=accuracy if c.accuracy else None) for c in full.candidates]
    assert full.source is not None
    source = dataclasses.replace(full.source, accuracy=None)
    page = page_of(dataclasses.replace(full, source=source, variants=[exact, final], candidates=candidates))
    assert "SNR ∞" in page.text
    assert "2.5 dB short" in page.text
    assert "Bound: at least 20 dB." in page.text
    assert "17.5 dB against the input model's outputs" in page.text.replace("dBagainst", "dB against")


def test_infinities_and_empty_samples():
    full = full_report()
    empty = dataclasses.replace(full.candidates[1], latency={"samples_s": [], "bursts": []})
    nulls = dataclasses.replace(full.candidates[2], latency={"samples_s": [math.nan, 0.01, 0.02]},
                                speedup=(1.4, -math.inf, math.inf), tuning={"tasks": 1, "rows": [{}]})  # fmt: skip
    broken = dataclasses.replace(
        full.candidates[3], status="wrong", errors=(OutputError("y", math.inf, 1e-4, -math.inf),)
    )
    first = full.candidates[0]
    choice = Choice(first.name, "input", "onnxruntime", "nothing measured faster")
    page = page_of(dataclasses.replace(full, candidates=[first, empty, nulls, broken], choice=choice))
    assert page.count("div", "lat-row") == 1 + 3
    assert "1.40x [too few rounds for an interval]" in page.text
    assert "15.000 ms" in page.text
    assert "wrong" in page.text
    assert "error inf" in page.text


def test_layers_without_any_error():
    full = full_report()
    same = dataclasses.replace(full.variants[1], layer_snr_db={"a": math.inf, "b": math.inf}, returned_to_float=())
    assert "None of 2 layers differs from its float version." in page_of(
        dataclasses.replace(full, variants=[same])
    ).text  # fmt: skip


def test_large_reports_stay_small():
    full = full_report(layers=400, count=20_000)
    rows = tuple({"workload": f"conv2d {i}", "time_us": 1.0, "calls": 1} for i in range(2000))
    tuning = dataclasses.asdict(TuningReport(2000, 0, 0, 1.0, "", rows))
    skips = tuple(Skip(f"/a/long/path/to/the/node/number/{i}", "not applicable here") for i in range(5000))
    candidates = [dataclasses.replace(c, tuning=tuning if c.engine == "tvm" else None) for c in full.candidates]
    passes = [dataclasses.replace(p, skipped=skips) for p in full.passes]
    html = to_html(dataclasses.replace(full, candidates=candidates, passes=passes).to_dict())
    assert len(html.encode()) < 500_000
    page = Page(html)
    assert re.search(r"20000 samples, \d+ beyond the axis, 400 drawn", page.text)
    for tag, attributes in page.elements:
        if tag == "path" and attributes.get("class") == "dots":
            assert (attributes["d"] or "").count("M") == 400


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(1e-7, 100.0), min_size=1, max_size=30), min_size=1, max_size=4),
    st.booleans(),
)
def test_latency_marks_lie_inside_the_drawing(times, scaled):
    """Whatever the samples: every coordinate is finite and within the view box, the median where it belongs."""
    latencies = [LatencyStats(tuple(t[0] * (1 + 1e-3 * i) for i in range(3)) if scaled else tuple(t)) for t in times]
    candidates = [
        CandidateRecord(f"c{i}", "input" if i == 0 else "exact", "tvm", "measured", latency=stats.to_dict())
        for i, stats in enumerate(latencies)
    ]
    page = page_of(Report(settings={}, candidates=candidates))
    medians = []
    for tag, attributes in page.elements:
        if tag != "path":
            continue
        numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", str(attributes["d"]))]
        assert numbers
        kind = attributes["class"]
        if kind in ("dots", "median", "grid", "interval"):
            assert all(0 <= n <= 1000 for n in numbers), (kind, attributes["d"])
        assert all(math.isfinite(n) for n in numbers)
        if kind == "median":
            medians.append(numbers[0])
    order = np.argsort([stats.median_s for stats in latencies], kind="stable")
    assert np.all(np.diff(np.asarray(medians)[order]) >= -0.11)  # one decimal is written


def test_reads_the_derived_figures_of_latency_stats():
    stats = LatencyStats((0.010, 0.011, 0.012, 0.013, 0.030))
    latency = read_latency({"name": "a", "latency": stats.to_dict()})
    assert latency is not None
    assert latency.median_ms == pytest.approx(1e3 * stats.median_s, rel=1e-12)
    assert latency.interval_ms == pytest.approx([1e3 * t for t in stats.interval_s], rel=1e-12)
    assert read_latency({"name": "a", "latency": None}) is None


@pytest.mark.parametrize(("fastest_ms", "cut"), [(2.0, False), (9.0, True)])
def test_says_when_the_axis_does_not_start_at_zero(fastest_ms, cut):
    candidates = [
        CandidateRecord(name, "input", "onnxruntime", "measured", latency=samples(median, 50, 0))
        for name, median in (("a", 10.0), ("b", fastest_ms))
    ]
    page = page_of(Report(settings={}, candidates=candidates))
    assert ("axis starts above 0" in page.text) == cut
    assert (page.count("path", "length") == 0) == cut


def test_only_a_quarter_of_the_layers_counts_as_worst():
    full = full_report()
    for count, worst in ((1, 1), (8, 3), (200, 8)):
        layers = {f"layer{i}": 30.0 - i / 10 for i in range(count)}
        variant = dataclasses.replace(full.variants[1], layer_snr_db=layers, returned_to_float=())
        assert page_of(dataclasses.replace(full, variants=[variant])).count("rect", "worst") == worst


def test_returned_layers_are_known_by_their_outputs():
    assert is_returned("/conv1/Conv_output_0", ["/conv1/Conv"])
    assert is_returned("conv1", ["conv1"])
    assert not is_returned("/conv1/Conv2_output_0", ["/conv1/Conv"])


def test_relative_error_is_the_root_of_the_power_ratio():
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=10_000), 0.03 * rng.normal(size=10_000)
    snr_db = 10 * math.log10(np.square(signal).sum() / np.square(noise).sum())
    expected = np.sqrt(np.mean(np.square(noise))) / np.sqrt(np.mean(np.square(signal)))
    assert relative_error(snr_db) == pytest.approx(expected, rel=1e-12)


@given(st.floats(1e-9, 1e9))
def test_steps_are_one_two_or_five(span):
    step = nice_step(span)
    assert span / 5 * (1 - 1e-9) <= step <= span / 2 * (1 + 1e-9)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-9


def test_bars_are_in_proportion():
    page = Page(bars([("a", 4.0, "4", ""), ("b", 1.0, "1", ""), ("c", math.inf, "?", "")], label="x"))
    widths = [a["style"] for t, a in page.elements if (a.get("class") or "") == "bar"]
    assert widths == ["width:100.00%", "width:25.00%"]


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast_meets_wcag_aa(scheme):
    """4.5 for text, 3 for drawings (WCAG 2.1, 1.4.3 and 1.4.11)."""
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", STYLE, re.S)[scheme]))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(colours[a]), luminance(colours[b])))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "good", "bad", "warn"):
        for ground in ("card", "fill"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for text, ground in (("good", "good-fill"), ("bad", "bad-fill"), ("warn", "warn-fill"), ("soft", "page")):
        assert contrast(text, ground) >= 4.5, (text, ground)
    for drawn in ("series", "delivered", "reference", "worst", "returned"):
        assert contrast(drawn, "card") >= 3, drawn
