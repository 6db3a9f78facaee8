"""ONNX's own backend tests on both engines: every test matches or is refused by name.

`make test` runs a sample of them, `make test-all` each in worker processes (`benchmarks/backend_suite.py`).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks import backend_suite as suite

DOCS = Path(suite.__file__).resolve().parent.parent / "docs"
SAMPLES = 60


@pytest.fixture(scope="module")
def known():
    return suite.cases()


def _sample(known) -> list[str]:
    """The same ones every time; whole models and operators of very many nodes take longer than the rest together."""
    short = [n for n, c in known.items() if c.kind != "real" and "attention" not in n and "expanded" not in n]
    return random.Random(2026).sample(sorted(short), SAMPLES)


@pytest.mark.parametrize("engine", suite.ENGINES)
def test_a_sample(known, engine):
    outcomes = [suite.run_case(known[name], engine, suite.operator_of(name, known)) for name in _sample(known)]
    assert not [(o.name, o.detail) for o in outcomes if o.status == "failed"]
    assert sum(o.status == "matched" for o in outcomes) > SAMPLES // 2


@pytest.mark.long
@pytest.mark.parametrize("engine", suite.ENGINES)
def test_all_of_it(known, engine):
    outcomes = list(suite.run_suite(known, engine, known, seconds=300))
    assert len(outcomes) == len(known)
    assert not [(o.name, o.detail) for o in outcomes if o.status == "failed"]


@pytest.mark.long
def test_a_worker_that_crashes_or_hangs_costs_one_test(known):
    worker = suite.Worker("passes", seconds=0.0)
    found = worker.run("test_abs")
    assert found == "not done after 0 s"
    worker = suite.Worker("passes", seconds=60)
    worker.process.kill()
    worker.process.wait()
    assert next(iter(suite.run_suite(["test_abs"], "passes", known, 60))).status == "matched"


def test_the_page_is_what_the_last_run_gives():
    found = json.loads((DOCS / "operators.json").read_text(encoding="utf-8"))
    assert suite.document(found) == (DOCS / "operators.md").read_text(encoding="utf-8")
    assert not [n for n, row in found["operators"].items() for e in suite.ENGINES if row[e]["failed"]]


def test_what_counts_as_rounding():
    """The last place of the largest element, not more, and never another shape, type or infinity."""
    large = np.array([1000.0, 0.0], np.float32)
    near, far = (large + np.array([0, e], np.float32) for e in (1e-4, 1e-2))
    assert suite._within_rounding([large], (near,))
    assert not suite._within_rounding([large], (far,))
    assert not suite._within_rounding([large], (near[:1],))
    assert not suite._within_rounding([large], (near.astype(np.float64),))
    assert not suite._within_rounding([large], (np.array([np.inf, 0], np.float32),))
    assert not suite._within_rounding([large.astype(np.int32)], (large.astype(np.int32),))
