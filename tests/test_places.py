"""Candidates that run elsewhere: chosen by instructions in an emulator, and never called faster."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import capabilities, gate
from graphopt.accuracy import Accuracy
from graphopt.candidates import PLAIN, Candidate
from graphopt.cli import group
from graphopt.engine_accuracy import judge_engine
from graphopt.errors import SpecError, TargetError
from graphopt.measure import Counts
from graphopt.places import Here, place_for
from graphopt.places.emulated import FEWEST_SAMPLES, MOST_SAMPLES, Emulated
from graphopt.plugins import parse_target
from graphopt.remote import emulator
from graphopt.report import CandidateRecord, VariantRecord
from graphopt.report.html import to_html
from graphopt.report.text import to_text
from graphopt.runtime.artifact import read_manifest

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
elsewhere = pytest.mark.skipif(capabilities.host_arch() == "aarch64", reason="this machine is an ARM itself")


@pytest.fixture
def emulation(runtime_cache, monkeypatch):
    """Skips where nothing emulates ARM."""
    if emulator.find_emulator("aarch64") is None or emulator.find_system("aarch64") is None:
        pytest.skip(f"no emulator of aarch64: {emulator.remedy('aarch64')}")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(runtime_cache))


def optimized(tmp_path, **options):
    """One run through the emulator; skips where TVM's libraries for ARM cannot be fetched."""
    try:
        return graphopt.optimize(
            DIGITS / "digits.onnx", tmp_path / "out", target="arm{device=rpi4}", tune_seconds=0.0, **options
        )
    except TargetError as error:
        if "fetched" in str(error):
            pytest.skip(str(error))
        raise


@elsewhere
def test_a_target_elsewhere_is_chosen_by_instructions(emulation, tmp_path):
    out = tmp_path / "out"
    result = optimized(
        tmp_path, preset="int8", calib=DIGITS / "calib.npz", eval=DIGITS / "eval.npz", calib_samples=16
    )  # fmt: skip
    report = result.report.to_dict()
    assert report["place"]["unit"] == "instructions" and report["place"]["baseline"] == PLAIN
    assert report["place"]["cpu"] == "cortex-a72"
    candidates = {c["name"]: c for c in report["candidates"]}
    assert set(candidates) == {"exact · tvm", "final · tvm"}, "ONNX Runtime does not run there"
    for each in candidates.values():
        assert each["status"] == "measured" and each["latency"] is None
        assert each["instructions"] > sum(each["kernel_instructions"].values()) > 0
        assert each["errors"], "it ran, and was compared with ONNX Runtime"
    fewest = min(candidates.values(), key=lambda c: c["instructions"])
    assert report["choice"]["candidate"] == fewest["name"] and "never timed" in report["choice"]["why"]
    assert fewest["accuracy"]["count"] == report["place"]["evaluation_samples"] == MOST_SAMPLES

    manifest = read_manifest(out)
    assert manifest["measured"]["timed"] is False and "cortex-a72" in manifest["measured"]["where"]
    counted = json.loads((out / "instructions.json").read_text())
    assert counted["contenders"][fewest["name"]]["instructions"] == fewest["instructions"]
    assert not (out / "latency.json").exists()

    said = CliRunner().invoke(group, ["report", str(out)], standalone_mode=False).output
    page = to_html(report)
    for view in (said, page):
        assert "instructions, emulated" in view and "median ms" not in view
        assert f"on {MOST_SAMPLES} samples" in " ".join(view.split())
    assert "never timed on a device" in page and "Latency" not in page
    to_text(report, details=True)


@elsewhere
def test_what_only_this_machine_can_do_is_refused(tmp_path):
    refused: list[tuple[dict[str, Any], str]] = [
        ({"engine": "onnxruntime"}, "ONNX Runtime does not run"),
        ({"objective": "latency", "calib": DIGITS / "calib.npz"}, "the target is another one"),
    ]
    for options, said in refused:
        with pytest.raises(SpecError, match=said):
            graphopt.optimize(DIGITS / "digits.onnx", tmp_path / "out", target="arm{mcpu=a72}", **options)
    assert not (tmp_path / "out").exists()


def test_threads_are_those_of_the_place(tmp_path):
    with pytest.raises(SpecError, match="more than this machine has"):
        graphopt.optimize(DIGITS / "digits.onnx", tmp_path / "out", threads=10_000)


def test_a_place_for_every_target():
    assert isinstance(place_for(parse_target("cpu")), Here)
    if capabilities.host_arch() == "aarch64":
        assert isinstance(place_for(parse_target("arm{mcpu=a72}")), Here)
        return
    for text, cpu in (("arm", "cortex-a53"), ("arm{mcpu=a55}", "cortex-a76"), ("arm{mcpu=n2}", "max")):
        place = place_for(parse_target(text))
        assert isinstance(place, Emulated) and place.cpu == cpu


def test_samples_in_the_emulator_are_bounded_by_arithmetic():
    from graphopt import model as models

    place = Emulated("aarch64", "cortex-a72", frozenset({"asimd"}))
    small = models.fix_inputs(models.load(DIGITS / "digits.onnx"), {"image": (1, 1, 16, 16)})
    assert place.evaluation_limit(small) == MOST_SAMPLES
    large = models.fix_inputs(models.load(DIGITS / "digits.onnx"), {"image": (1024, 1, 16, 16)})
    assert FEWEST_SAMPLES <= place.evaluation_limit(large) < MOST_SAMPLES


def record(name: str, **options) -> VariantRecord:
    return VariantRecord(name, "", 1, {}, options.pop("parameter_bytes", 1), 1, **options)


def candidate(name: str, counts: Counts, drop: float | None = None) -> Candidate:
    """As if it had been counted."""
    from graphopt.passes.base import Fidelity
    from graphopt.variants import Variant

    ratio = counts.ratio(PLAIN, name).median
    figures = CandidateRecord(
        name, name, "tvm", "measured", instructions=counts.totals[name], speedup=(ratio, ratio, ratio)
    )
    variant = Variant(None, Path(name), record(name, drop=drop), Fidelity.LOSSY)  # pyright: ignore[reportArgumentType]
    return Candidate(figures, variant, Path(name))


def test_fewest_instructions_win_by_a_hair():
    counts = Counts({PLAIN: 1000, "a": 999, "b": 1001}, {}, "max")
    ranked = gate.choose([candidate(name, counts) for name in counts.totals], counts, PLAIN)
    assert [c.name for c in ranked] == ["a", PLAIN], "none that takes more than the exact variant"
    assert gate.choose([candidate(PLAIN, counts)], counts, PLAIN)[0].name == PLAIN


@dataclasses.dataclass(frozen=True)
class FakeJudge:
    """Of 100 samples; `engine` and `reference` are right on so many of the few."""

    engine: float
    reference: float
    few: bool = False

    @property
    def bound(self):
        from graphopt.variants import Bound

        return Bound(1.0, 20.0)

    def limited(self, samples):
        return dataclasses.replace(self, few=True) if samples else self

    def accuracy(self, model):
        return Accuracy("agreement", self.reference if isinstance(model, Path) else self.engine, 4)

    def drop(self, after):
        return 100.0 - after.value


@pytest.mark.parametrize(
    ("engine", "known", "within"),
    [(75.0, 0.5, True), (75.0, 1.5, False), (50.0, 0.5, False), (100.0, 0.5, True)],
)
def test_a_few_samples_say_what_the_engine_adds(engine, known, within):
    """The variant agrees on three of these four, and loses `known` points over all."""
    made = candidate("a", Counts({PLAIN: 2, "a": 1}, {}, "max"), drop=known)
    judged = judge_engine(made, lambda feeds: {"y": np.zeros(1)}, FakeJudge(engine, 75.0), 4)  # pyright: ignore[reportArgumentType]
    assert judged.within == within
