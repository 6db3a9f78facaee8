"""Mixed precision: layers go to float by measurement, and what comes of it is a candidate like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt import mixing
from graphopt.runtime.kernel_times import KernelTime, kernel_times
from tests.models import save_small_cnn

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
FAST = {"tune_seconds": 0.0, "measure_seconds": 1.0, "threads": 1}


def calls(*pairs: tuple[str, float]) -> tuple[KernelTime, ...]:
    return tuple(KernelTime(f"kernel{i}", layer, seconds) for i, (layer, seconds) in enumerate(pairs))


def test_layers_that_gain_less_than_their_share_of_the_borders_go_back():
    before = calls(("a", 10.0), ("b", 10.0), ("c", 5.0), ("", 1.0))
    after = calls(("a", 2.0), ("", 3.0), ("b", 9.0), ("c", 5.0), ("", 1.0))
    assert mixing.gaining(("a", "b"), before, after) == ("a",)  # the borders cost 3, half of that each
    assert mixing.gaining(("a", "b"), before, after[:1] + after[2:]) == ("a", "b")  # no borders
    assert mixing.gaining(("a", "b"), before, before) == ()


def test_a_layer_that_became_slower_beside_the_float_ones_counts_as_their_border():
    before = calls(("a", 10.0), ("c", 5.0))
    assert mixing.gaining(("a",), before, calls(("a", 4.0), ("c", 10.0))) == ("a",)
    assert mixing.gaining(("a",), before, calls(("a", 4.0), ("c", 12.0))) == ()


@pytest.fixture
def quantized(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(**options):
        return graphopt.optimize(
            DIGITS / "digits.onnx", tmp_path / "out", preset="int8", calib=DIGITS / "calib.npz",
            eval=DIGITS / "eval.npz", engine="tvm", overwrite=True, **{**FAST, **options},
        )  # fmt: skip

    return run


def test_every_layer_is_reported_in_8_bits_and_in_float(quantized):
    report = quantized().report
    assert len(report.layers) >= 3
    for layer in report.layers:
        assert layer.precision["exact · tvm"] == "float32"
        assert layer.precision["final · tvm"] == "int8"
        assert all(seconds > 0 for seconds in layer.seconds.values())


def test_a_mixed_candidate_races_and_is_right(quantized, monkeypatch):
    """Whatever measurement says, so that there is one: every layer is tried in float, then the first one alone."""
    monkeypatch.setattr(mixing, "FASTER", 1e9)
    monkeypatch.setattr(mixing, "WORTH", 1e9)
    monkeypatch.setattr(mixing, "gaining", lambda floats, before, after: floats[:1])
    report = quantized().report
    mixed = report.variant("mixed")
    assert mixed.within_bound and mixed.accuracy is not None
    (candidate,) = [c for c in report.candidates if c.variant == "mixed"]
    assert candidate.status == "measured" and candidate.latency is not None, candidate
    precision = {layer.layer: layer.precision["mixed · tvm"] for layer in report.layers}
    assert mixed.float_for_speed
    for layer, found in precision.items():
        assert found == ("float32" if layer in mixed.float_for_speed else "int8")


def test_a_float_model_is_timed_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = save_small_cnn(tmp_path)
    result = graphopt.optimize(model, tmp_path / "out", engine="tvm", **FAST)
    assert result.report.layers and set(result.report.layers[0].precision.values()) == {"float32"}
    shape = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    folder = tmp_path / "out" / "compiled"
    if folder.is_dir():
        times = kernel_times({"it": folder}, shape, 1, 0.1)["it"]
        assert {t.layer for t in times} >= {layer.layer for layer in result.report.layers}
