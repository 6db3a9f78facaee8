"""Figures beside the time: what they are, how they are bounded, what follows for the exit code."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ci import instructions
from graphopt.ci.bounds import Bound
from graphopt.ci.figures import Value, figures_of, judge_accuracy, judge_figures, parse_bounds
from graphopt.ci.judged import gravest, judge
from graphopt.ci.performance_events import SOFTWARE_TASK_CLOCK, Counter
from graphopt.cli import group
from graphopt.errors import SpecError, TargetError
from graphopt.measure import Contender, wire
from graphopt.model import load, save

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
FEEDS = {"image": np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)}


@given(st.integers(1, 10**9), st.integers(0, 500))
def test_growth_of_exactly_the_bound_is_within(base, per_cent):
    limit = Bound.parse(f"{per_cent}%", "x").limit(base)
    assert limit is not None
    grown, rest = divmod(base * (100 + per_cent), 100)
    assert grown <= limit
    if not rest:
        assert grown + 1 > limit


@pytest.mark.parametrize(
    ("text", "base", "limit"),
    [
        ("+3", 10, 13),
        ("2MB", 10, 2e6),
        ("1.5k", None, 1500),
        ("64 kB", 1, 64e3),
        ("0", 5, 0),
        ("+0", 5, 5),
        ("+3", None, None),
    ],
)
def test_bounds_as_people_write_them(text, base, limit):
    assert Bound.parse(text, "x").limit(base) == limit


def test_growth_needs_a_base():
    assert Bound.parse("+3", "x").limit(None) is None
    assert Bound.parse("3%", "x").limit(None) is None


@pytest.mark.parametrize("text", ["", "-3", "+5%", "five", "5 %%", "nan", "1e3", "3 TB"])
def test_what_is_no_bound(text):
    with pytest.raises(SpecError, match="max-size"):
        Bound.parse(text, "max-size")


@pytest.mark.parametrize(
    ("base", "new", "bound", "state", "code"),
    [
        (Value(100), Value(110), "10%", "within", 0),
        (Value(100), Value(111), "10%", "over", 4),
        (Value(100), Value(None, "no counter"), "10%", "unknown", 5),
        (Value(None), Value(5), "10%", "unknown", 5),
        (Value(None), Value(5), "6", "within", 0),
        (Value(100, how="perf"), Value(10, how="valgrind"), "10%", "unknown", 5),
        (Value(100), Value(200), None, "shown", 0),
    ],
)
def test_the_state_of_a_figure(base, new, bound, state, code):
    bounds = parse_bounds({} if bound is None else {"max-instructions": bound}, "x")
    (row,) = judge_figures({"instructions": base}, {"instructions": new}, bounds)
    assert (row.state, row.exit_code) == (state, code)
    json.dumps(row.to_dict(), allow_nan=False)


def test_a_regression_outweighs_what_cannot_be_told():
    assert gravest([0, 5, 4]) == 4
    assert gravest([0, 5, 1]) == 1
    assert gravest([0, 5]) == 5
    assert gravest([]) == 0


@pytest.mark.parametrize("options", [{"max-drop": -1}, {"max-drop": "1"}, {"max-drop": True}, {"maxsize": "1%"}])
def test_wrong_bounds_are_named(options):
    with pytest.raises(SpecError, match="plan: .*" + next(iter(options))):
        parse_bounds(options, "plan")


def test_figures_of_a_model():
    found = figures_of(str(DIGITS / "digits.onnx"), FEEDS, {"nodes", "kernels", "size_bytes", "peak_activation_bytes"})
    assert found["nodes"].value == 16
    assert found["size_bytes"].value == (DIGITS / "digits.onnx").stat().st_size
    assert found["peak_activation_bytes"].value == 147456  # the batch is one, as it is timed
    assert found["kernels"] == Value(None, "nothing is compiled")


def broken(folder: Path) -> Path:
    """The digits model with its classifier's weights negated."""
    model = load(DIGITS / "digits.onnx")
    node = next(n for n in model.graph if n.op_type == "Gemm")
    weights = node.inputs[1]
    assert weights is not None
    assert weights.const_value is not None
    weights.const_value = ir.Tensor(-weights.const_value.numpy(), name=weights.name)
    save(model, folder / "broken.onnx")
    return folder / "broken.onnx"


def test_accuracy_has_a_bound_too(tmp_path):
    base, data = str(DIGITS / "digits.onnx"), str(DIGITS / "eval.npz")
    bounds = parse_bounds({"max-drop": 1.0}, "x")
    same = judge_accuracy(base, base, data, None, bounds)
    assert same.state == "within"
    assert same.base == same.new == pytest.approx(99.44, abs=0.01)
    worse = judge_accuracy(base, str(broken(tmp_path)), data, None, bounds)
    assert worse.state == "over"
    assert worse.exit_code == 4
    found = judge(base, str(broken(tmp_path)), bounds, timed=False, show=True, data=data)
    assert found.exit_code == 4
    assert found.over == ["top-1"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_event_of_the_system_is_counted():
    """The hardware's counter is hidden in most virtual machines; the same calls read a software event."""
    try:
        counter = Counter(SOFTWARE_TASK_CLOCK)
    except OSError as error:
        pytest.skip(f"perf_event_open: {error}")
    few, many = (counter.count(lambda n=n: sum(range(n))) for n in (1_000, 1_000_000))
    counter.close()
    assert 0 < few < many


@pytest.mark.long
def test_instructions_repeat_and_follow_the_work(tmp_path):
    model = Contender.onnx(DIGITS / "digits.onnx")
    batch = {"image": np.repeat(FEEDS["image"], 4, axis=0)}
    try:
        first, again, four = (instructions.count(model, feeds) for feeds in (FEEDS, FEEDS, batch))
    except TargetError as error:
        pytest.skip(str(error))
    assert first.counter == again.counter == four.counter
    assert math.isclose(first.value, again.value, rel_tol=0.002)
    assert 2.5 < four.value / first.value < 4.5


@pytest.mark.long
def test_valgrind_counts_about_the_same(tmp_path):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    wire.save_feeds(FEEDS, tmp_path / "feeds.npz")
    found = instructions.by_valgrind(Contender.onnx(DIGITS / "digits.onnx"), tmp_path)
    assert 1e6 < found.value < 1e7


def test_figures_alone_on_the_command_line(capsys):
    model = str(DIGITS / "digits.onnx")

    def compare(*options: str) -> int:
        return group.main(["compare", model, model, "--format", "json", *options], standalone_mode=False)

    assert compare("--no-time") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] is None
    assert {row["name"] for row in shown["figures"]} >= {"nodes", "size_bytes", "parameter_bytes"}
    assert compare("--no-time", "--max-nodes", "15") == 4
    assert compare("--no-time", "--max-kernels", "+0") == 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 5
    with pytest.raises(SpecError, match="evaluation data"):
        compare("--max-drop", "1")
    with pytest.raises(SpecError, match="times only"):
        group.main(["compare", "a.json", "b.json", "--max-size", "1%"], standalone_mode=False)
