"""Fixtures every test may use. Shared models and pictures are not part of the project: absent, tests skip."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Fresh examples on a developer's machine, the same ones in CI: a commit must not fail for what it did not change.
hypothesis.settings.register_profile("fresh", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "fresh")

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GRAPHOPT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def runtime_cache(tmp_path_factory) -> Path:
    """One folder for TVM's libraries for other processors and the programs for them: fetched and compiled once."""
    return tmp_path_factory.mktemp("runtime-cache")


@pytest.fixture
def shared_model():
    """A function from the name of a shared model to its path; skips where the shared models are absent."""

    def find(name: str) -> Path:
        path = SHARED / "models" / f"{name}.onnx"
        if not path.is_file():
            pytest.skip(f"shared model {name} is not on this machine (set GRAPHOPT_SHARED)")
        return path

    return find


@pytest.fixture
def shared_images() -> Path:
    """The folder of labelled pictures; skips where it is absent."""
    if not (SHARED / "images" / "labels.csv").is_file():
        pytest.skip("the shared pictures are not on this machine (set GRAPHOPT_SHARED)")
    return SHARED / "images"


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory):
    """No test reads or writes the user's schedule database or key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(tmp_path_factory.getbasetemp() / "graphopt-cache"))
        patch.setenv("GRAPHOPT_CONFIG", str(tmp_path_factory.getbasetemp() / "graphopt-config"))
        patch.delenv("GRAPHOPT_TRUST_KEY", raising=False)
        yield
