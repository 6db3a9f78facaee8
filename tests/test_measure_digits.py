"""The demo model that ships with the project is what its README says it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from graphopt import model as models
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "digits"
STATED_ACCURACY = 358 / 360


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_train", FOLDER / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_shipped_model_reaches_the_stated_accuracy():
    with np.load(FOLDER / "eval.npz") as data:
        image, labels = data["image"], data["labels"]
    logits = OnnxRuntimeEngine(FOLDER / "digits.onnx", 1, optimize=False).run({"image": image})["logits"]
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(STATED_ACCURACY, abs=1e-9)
    assert f"{100 * STATED_ACCURACY:.1f} %" in (FOLDER / "README.md").read_text()


def test_the_files_are_small_and_fit_each_other():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.*")) < 1_000_000
    model = models.load(FOLDER / "digits.onnx")
    signature = models.signature(model)
    assert [str(spec) for spec in signature.inputs] == ["image: float32[N,1,16,16]"]
    assert [node.op_type for node in model.graph].count("BatchNormalization") == 4
    assert model.opset_imports[""] == 17
    with np.load(FOLDER / "calib.npz") as data:
        calibration = data["image"]
    with np.load(FOLDER / "eval.npz") as data:
        held_out, labels = data["image"], data["labels"]
    assert calibration.shape == (200, 1, 16, 16)
    assert held_out.shape == (360, 1, 16, 16)
    assert calibration.dtype == held_out.dtype == np.float32
    assert set(labels) == set(range(10))


def test_the_data_are_the_scripts_and_the_split_is_clean(training):
    pictures, _, held_out, labels = training.load_data()
    with np.load(FOLDER / "calib.npz") as data:
        np.testing.assert_array_equal(data["image"], pictures[:200])
    with np.load(FOLDER / "eval.npz") as data:
        np.testing.assert_array_equal(data["image"], held_out)
        np.testing.assert_array_equal(data["labels"], labels)
    assert len(pictures) + len(held_out) == 1797
    assert not {p.tobytes() for p in pictures} & {p.tobytes() for p in held_out}


def test_gradients_are_the_slopes_of_the_loss(training):
    """Backpropagation against central differences, in float64 so that rounding does not hide an error."""
    rng = np.random.default_rng(0)
    network = training.Network(width=3)
    for parameter in network.parameters:
        parameter.value = rng.normal(parameter.value, 0.1).astype(np.float64)
    pictures, labels = rng.random((4, 1, 6, 6)), np.array([1, 5, 0, 9])
    network.train_step(pictures, labels, 0.0)
    slopes = [parameter.gradient.copy() for parameter in network.parameters]
    step = 1e-5
    for parameter, slope in zip(network.parameters, slopes, strict=True):
        for place in rng.integers(0, parameter.value.size, 3):
            losses = []
            for sign in (1, -1):
                parameter.value.flat[place] += sign * step
                losses.append(network.train_step(pictures, labels, 0.0))
                parameter.value.flat[place] -= sign * step
            numeric = (losses[0] - losses[1]) / (2 * step)
            assert slope.flat[place] == pytest.approx(numeric, rel=2e-3, abs=2e-6)


def inference(network, image: np.ndarray) -> np.ndarray:
    """Logits in float64, convolutions as loops over the kernel's taps, BatchNorm with its running statistics."""

    def conv_norm(layer, x):
        weight = layer.weight.value.astype(np.float64).reshape(-1, 3, 3, layer.weight.value.shape[1])
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        size, stride = x.shape[1], layer.stride
        taps = (
            padded[:, i : i + size : stride, j : j + size : stride] @ weight[:, i, j]
            for i in range(3)
            for j in range(3)
        )
        y = (sum(taps) - layer.mean) / np.sqrt(layer.variance + 1e-5) * layer.scale.value + layer.bias.value
        return np.maximum(y, 0) if layer.relu else y

    stem = conv_norm(network.stem, image.astype(np.float64).transpose(0, 2, 3, 1))
    joined = np.maximum(stem + conv_norm(network.second, conv_norm(network.first, stem)), 0)
    return conv_norm(network.reduce, joined).mean(axis=(1, 2)) @ network.weight.value + network.bias.value


def test_training_learns_and_exports_what_it_has_learnt(training):
    pictures, labels, held_out, _ = training.load_data()
    network = training.Network(width=8)
    losses = [network.train_step(pictures[:64], labels[:64], 0.3) for _ in range(40)]
    assert losses[-1] < losses[0] / 2
    model = training.export(network)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString(deterministic=True)
    assert data == training.export(network).SerializeToString(deterministic=True)
    logits = OnnxRuntimeEngine(data, 1, optimize=False).run({"image": held_out})["logits"]
    expected = inference(network, held_out)
    # Each layer sums at most 9 * 8 + 1 products in float32; four layers and the head, normalised to size one.
    tolerance = 5 * 73 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
