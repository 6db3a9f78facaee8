"""A few hundred hostile files, always the same; `make fuzz` runs 20 000."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

from tests.fuzz.cases import make_case
from tests.fuzz.corpus import corpus
from tests.fuzz.mutations import MUTATIONS
from tests.fuzz.runner import run_cases

CASES = 300
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")


def test_hostile_files_are_fine_or_refused_in_one_line():
    outcome = run_cases(0, range(CASES), jobs=2)
    assert not outcome.findings, str(outcome)
    assert sum(outcome.counts.values()) == CASES
    assert outcome.counts["fine"] > CASES / 20, "most cases end in the checker: the passes see too little"
    assert outcome.counts["ModelError"] > CASES / 4


def test_the_models_that_are_changed_are_valid():
    for content in corpus().values():
        onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)


def test_a_case_is_always_the_same(tmp_path):
    contents = []
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
        path, what = make_case(3, 14, tmp_path / name / "model")
        contents.append((path.read_bytes(), what))
    assert contents[0] == contents[1]


def test_every_mutation_is_used(tmp_path):
    (tmp_path / "model").mkdir()
    used = {word for number in range(400) for word in make_case(0, number, tmp_path / "model")[1].split()[1:]}
    assert {m.__name__ for m in MUTATIONS} <= used


@pytest.mark.parametrize("way", ["crash", "hang", "error", "memory"])
def test_a_crash_a_hang_and_an_odd_error_are_found(monkeypatch, tmp_path, way):
    """The net holds: a worker with a fault in it is told apart from one that is fine."""
    fault = {
        "crash": "import os; os.abort()",
        "hang": "import time; time.sleep(600)",
        "error": "raise IndexError('odd')",
        "memory": "bytearray(64 << 30)",
    }[way]
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'tests.fuzz.worker' in sys.orig_argv:\n"
        "    import graphopt.model\n"
        "    def load(path):\n"
        f"        {fault}\n"
        "    graphopt.model.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parents[2]}")
    outcome = run_cases(0, [1], jobs=1, time_s=12.0)
    assert len(outcome.findings) == 1
    assert {"crash": "SIGABRT", "hang": "hang", "error": "odd", "memory": "MemoryError"}[way] in outcome.findings[0]
