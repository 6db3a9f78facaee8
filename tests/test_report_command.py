"""`graphopt report` on an artifact: its report again, and its kernels with their share of the peak."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import graphopt
from graphopt.cli import group
from graphopt.errors import ArtifactError
from tests.models import save_small_cnn


def run(*arguments):
    return CliRunner().invoke(group, ["report", *map(str, arguments)], standalone_mode=False)


@pytest.fixture
def artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_small_cnn(tmp_path)
    graphopt.optimize(model, tmp_path / "out", engine="tvm", tune_seconds=10.0, measure_seconds=0.5, threads=1)
    return tmp_path / "out"


def test_kernels_and_their_share_of_the_peak(artifact):
    shown = run("--all", artifact)
    assert shown.exception is None, shown.exception
    assert "Kernels of exact · tvm" in shown.stdout and "of peak" in shown.stdout
    assert "Layers, µs in a run of the model" in shown.stdout and "float32" in shown.stdout
    whole = run("--format", "json", artifact)
    candidates = {c["name"]: c for c in json.loads(whole.stdout)["candidates"]}
    tuned = candidates["exact · tvm"]["tuning"]
    assert tuned["peaks"]["float32"] > 1
    (share,) = [row["share_of_peak"] for row in tuned["rows"] if row["workload"].startswith("fused_conv2d")][:1]
    assert 0 < share < 2


def test_a_folder_without_a_report_is_one_line(tmp_path):
    assert isinstance(run(tmp_path).exception, ArtifactError)
    (tmp_path / "report.json").write_text("{")
    assert isinstance(run(tmp_path).exception, ArtifactError)
