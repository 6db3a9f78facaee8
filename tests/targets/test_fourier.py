"""DFT and STFT against NumPy's fast transformation in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.errors import GraphoptError
from tests.targets.oracle import EPSILON, compiled, model, node, uniform


def _complex(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide[..., 0] + (1j * wide[..., 1] if x.shape[-1] == 2 else 0)


def _close(found: np.ndarray, wanted: Any, terms: int) -> None:
    """`wanted` is complex, or real of one part. A sum of `terms` products of numbers below 2 with factors below 1, each
    rounded once: eps * terms / 2 as a random walk, 8 standard deviations."""
    parts = np.stack([wanted.real, wanted.imag], -1) if np.iscomplexobj(wanted) else wanted[..., None]
    assert found.shape == parts.shape
    assert np.abs(found - parts).max() <= 16 * EPSILON * terms * max(1, np.abs(parts).max() / terms)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("length", [None, 5, 12, 16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", ["forward", "inverse", "onesided"])
def test_along_an_axis_of_any_length(axis, length, parts, form):
    if form == "onesided" and parts == 2:
        return
    x = uniform(1, 2, 12, 9, parts)
    constants = {"axis": np.array(axis, np.int64)}
    if length:
        constants["length"] = np.array(length, np.int64)
    attributes = {"inverse": int(form == "inverse"), "onesided": int(form == "onesided")}
    made = model(
        [node("DFT", ["x", "length" if length else "", "axis"], ["y"], **attributes)], {"x": x}, ["y"], constants, 20
    )
    function = {"forward": np.fft.fft, "inverse": np.fft.ifft, "onesided": np.fft.rfft}[form]
    source = _complex(x) if form != "onesided" else x[..., 0].astype(np.float64)
    _close(compiled(made, {"x": x})["y"], function(source, n=length, axis=axis), 16)


@pytest.mark.parametrize("length", [None, 7, 8, 11])
def test_one_side_back_to_a_real_signal(length):
    x = uniform(2, 2, 6, 3, 2)
    constants = {"axis": np.array(1, np.int64)} | ({"length": np.array(length, np.int64)} if length else {})
    made = model(
        [node("DFT", ["x", "length" if length else "", "axis"], ["y"], inverse=1, onesided=1)],
        {"x": x},
        ["y"],
        constants,
        20,
    )
    _close(compiled(made, {"x": x})["y"], np.fft.irfft(_complex(x), n=length, axis=1), 16)


def test_axis_as_an_attribute():
    x = uniform(3, 2, 5, 8, 1)
    made = model([node("DFT", ["x"], ["y"], axis=2)], {"x": x}, ["y"], opset=17)
    _close(compiled(made, {"x": x})["y"], np.fft.fft(_complex(x), axis=2), 8)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("onesided", [0, 1])
def test_short_time(onesided, window):
    size, step = 16, 6
    x, w = uniform(4, 2, 70, 1), np.hanning(size).astype(np.float32)
    constants = {"step": np.array(step, np.int64), "size": np.array(size, np.int64), "w": w}
    made = model(
        [node("STFT", ["x", "step", "w" if window else "", "size"], ["y"], onesided=onesided)],
        {"x": x},
        ["y"],
        constants if window else {k: v for k, v in constants.items() if k != "w"},
    )
    frames = np.stack([x[:, i : i + size, 0] for i in range(0, 70 - size + 1, step)], 1).astype(np.float64)
    wanted = (np.fft.rfft if onesided else np.fft.fft)(frames * (w if window else 1), axis=-1)
    _close(compiled(made, {"x": x})["y"], wanted, size)


def test_very_long_ones_are_refused():
    x = np.zeros((1, 4096, 1), np.float32)
    made = model([node("DFT", ["x"], ["y"], axis=1)], {"x": x}, ["y"], opset=17)
    with pytest.raises(GraphoptError, match="DFT"):
        compiled(made, {"x": x})
