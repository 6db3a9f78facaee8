"""What `ci init` writes is YAML that says what it should, and overwrites nothing."""

from __future__ import annotations

import pytest

from graphopt.ci.plan import read_plan
from graphopt.ci.workflows import GITHUB, GITLAB, planned_files, write_files
from graphopt.errors import DataError, SpecError

yaml = pytest.importorskip("yaml")


def test_github(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    write_files(planned_files(tmp_path, [str(tmp_path / "net.onnx")], gitlab=False, branch="trunk"), force=False)
    workflow = yaml.safe_load((tmp_path / GITHUB).read_text())
    assert workflow[True]["push"]["branches"] == ["trunk"]  # YAML 1.1 reads `on` so
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["gate"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    runs = [step["run"] for step in steps if "run" in step]
    assert runs[0] == "pip install graphopt"
    assert "graphopt ci run --config graphopt.toml --allow-inconclusive --trust" in runs
    # An expression inside of a script would let a pull request's text run as a command.
    assert not any("${{" in run for run in runs)
    assert [case.name for case in read_plan(tmp_path / "graphopt.toml").cases] == ["net"]


def test_gitlab(tmp_path):
    files = planned_files(tmp_path, [], gitlab=True, install='pip install "graphopt[cross]"')
    write_files(files, force=False)
    job = yaml.safe_load((tmp_path / GITLAB).read_text())["graphopt"]
    assert job["before_script"] == ['pip install "graphopt[cross]"']
    assert job["allow_failure"] == {"exit_codes": [5]}
    assert job["artifacts"]["reports"] == {"junit": "graphopt-report/junit.xml"}
    assert yaml.safe_load((tmp_path / ".gitlab-ci.yml").read_text()) == {"include": [{"local": GITLAB}]}


def test_nothing_is_overwritten_unless_told(tmp_path):
    (tmp_path / ".github/workflows").mkdir(parents=True)
    (tmp_path / GITHUB).write_text("mine")
    files = planned_files(tmp_path, [], gitlab=False)
    with pytest.raises(DataError, match="nothing was written"):
        write_files(files, force=False)
    assert (tmp_path / GITHUB).read_text() == "mine"
    assert not (tmp_path / "graphopt.toml").exists()
    write_files(files, force=True)
    write_files(files, force=False)  # the same content is no conflict
    assert "graphopt ci run" in (tmp_path / GITHUB).read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_gitlab_root_file_is_left_alone(tmp_path):
    (tmp_path / ".gitlab-ci.yml").write_text("mine")
    write_files(planned_files(tmp_path, [], gitlab=True), force=False)
    assert (tmp_path / ".gitlab-ci.yml").read_text() == "mine"


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(SpecError, match="branch"):
        planned_files(tmp_path, [], gitlab=False, branch="main]\nevil: x")
    with pytest.raises(DataError, match="no such model"):
        planned_files(tmp_path, ["gone.onnx"], gitlab=False)
