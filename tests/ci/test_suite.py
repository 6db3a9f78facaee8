"""`ci run`: cases from end to end, and the reports of all that can become of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from graphopt.ci.figures import Bounds, Row
from graphopt.ci.judged import Judged
from graphopt.ci.plan import Case
from graphopt.ci.reports import github_annotations, headline, junit, markdown
from graphopt.ci.suite import Outcome, SuiteReport

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
PLAN = """
[ci]
history = "latency.jsonl"
seconds = 2
[ci.bounds]
max-regression = "300%"
[models.same]
new = "digits.onnx"
base = "digits.onnx"
[models.fresh]
new = "digits.onnx"
[models.large]
new = "digits.onnx"
base = "digits.onnx"
bounds = {max-nodes = "3"}
[models.gone]
new = "gone.onnx"
base = "digits.onnx"
"""


def cli(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "CI_"))}
    return subprocess.run(
        [sys.executable, "-m", "graphopt.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**clean, **environment},
    )  # fmt: skip


def test_several_models_in_one_report(tmp_path):
    shutil.copy(DIGITS / "digits.onnx", tmp_path)
    (tmp_path / "graphopt.toml").write_text(PLAN)
    done = cli(
        tmp_path,
        "ci",
        "run",
        "-q",
        GITHUB_ACTIONS="true",
        GITHUB_SHA="abc",
        GITHUB_STEP_SUMMARY=str(tmp_path / "summary"),
    )
    assert done.returncode == 4, done.stderr
    report = json.loads((tmp_path / "graphopt-report" / "report.json").read_text())
    states = {case["case"]: case["state"] for case in report["cases"]}
    assert report["commit"] == "abc"
    assert states["same"] in ("passed", "inconclusive")  # a busy machine may not tell within two seconds
    assert (states["fresh"], states["large"], states["gone"]) == ("no base", "regressed", "error")
    assert "::error title=graphopt%3A large regressed::over the bound%3A" not in done.stdout  # of a property only
    assert "::error title=graphopt%3A large regressed::over the bound: nodes of the graph" in done.stdout
    assert (tmp_path / "summary").read_text() == (tmp_path / "graphopt-report" / "report.md").read_text()
    suite = ElementTree.parse(tmp_path / "graphopt-report" / "junit.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    lines = [json.loads(line) for line in (tmp_path / "latency.jsonl").read_text().splitlines()]
    assert {line["case"] for line in lines} == {"same", "fresh", "large"}
    assert all(line["commit"] == "abc" and line["median_s"] > 0 for line in lines)
    shown = cli(tmp_path, "history", "-o", "history.html")
    assert shown.returncode == 0, shown.stderr
    assert "fresh on " in shown.stdout
    assert (tmp_path / "history.html").read_text().count("<svg") == 3
    required = cli(tmp_path, "ci", "run", "-q", "--only", "fresh", "--require-base")
    assert required.returncode == 1
    built = cli(tmp_path, "ci", "build", "-q", "--only", "fresh", "--output", "base")
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "base" / "fresh").is_file()


@pytest.mark.long
def test_a_model_is_built_for_its_target_and_known_again(tmp_path):
    shutil.copy(DIGITS / "digits.onnx", tmp_path)
    (tmp_path / "graphopt.toml").write_text(
        "[models.digits]\nmodel = 'digits.onnx'\n"
        "optimize = {tune-seconds = 0, measure-seconds = 1, engine = 'onnxruntime'}\n"
    )
    assert cli(tmp_path, "ci", "build", "-q", "--output", "base").returncode == 0
    done = cli(tmp_path, "ci", "run", "-q")
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout


def outcome(state: str, judged: Judged | None = None, code: int = 0, name: str = "a") -> Outcome:
    case = Case(name, None, "cpu", Path("b"), Path("n"), {}, Bounds())
    return Outcome(case, state, "it | took\n100% \x07 <long>", judged, exit_code=code)


def rows(state: str) -> Judged:
    row = Row("size_bytes", "size on disk", "B", 1e6, 2e6, "10%", state, "a `note`")
    return Judged("b", "n", None, (row,))


def test_reports_of_all_states():
    report = SuiteReport(
        "abc",
        (
            outcome("passed", rows("within")),
            outcome("regressed", rows("over"), 4),
            outcome("inconclusive", rows("unknown"), 5),
            outcome("error", code=1, name="b<&"),
            outcome("no base"),
            outcome("identical"),
        ),
        "2026-01-01T00:00:00+00:00",
    )
    assert report.exit_code == 4
    assert headline(report) == "1 passed, 1 identical, 1 no base, 1 regressed, 1 inconclusive, 1 error"
    suite = ElementTree.fromstring(junit(report))[0]
    counted = {key: int(suite.get(key, "")) for key in ("tests", "failures", "errors", "skipped")}
    assert counted == {"tests": 9, "failures": 1, "errors": 1, "skipped": 2}
    table = [line for line in markdown(report).splitlines() if line.startswith("| a ")]
    assert all(line.count(" | ") == 3 for line in table)  # what is told holds a bar, which is escaped
    errors = github_annotations(report)
    assert errors[0] == "::error title=graphopt%3A a regressed::it | took%0A100%25 \x07 <long>"
    assert [line.partition(" ")[0] for line in errors] == ["::error", "::warning", "::error"]
    json.dumps(report.to_dict(), allow_nan=False)
