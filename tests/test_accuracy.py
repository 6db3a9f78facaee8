"""Top-1, agreement and signal-to-noise against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphopt.accuracy import Accuracy, drop_in_points, evaluate
from graphopt.calibration import Dataset, load_dataset
from graphopt.errors import DataError
from graphopt.model import Signature, TensorSpec
from tests.models import small_cnn

F32 = np.dtype(np.float32)


def classifier(batch: int | str = "N", classes: int = 4) -> Signature:
    return Signature((TensorSpec("x", F32, (batch, classes)),), (TensorSpec("y", F32, (batch, classes)),))


@pytest.fixture
def make(tmp_path):
    def write(signature: Signature, count: int = 37, labelled: bool = True) -> tuple[Dataset, np.ndarray]:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((count, 4)).astype(np.float32)
        if labelled:
            np.savez(tmp_path / "data.npz", x=x, labels=rng.integers(0, 4, count))
        else:
            np.savez(tmp_path / "data.npz", x=x)
        return load_dataset(tmp_path / "data.npz", signature), x

    return write


def identity(feeds):
    return {"y": feeds["x"]}


@pytest.mark.parametrize("batch", ["N", 1, 5])
def test_top1_counts_every_sample_once(make, batch):
    signature = classifier(batch)
    data, x = make(signature)
    found = evaluate(identity, data, signature=signature)
    assert found.metric == "top1" and found.count == 37
    assert found.value == pytest.approx(100 * np.mean(x.argmax(1) == data.labels))


@pytest.mark.parametrize("batch", ["N", 1, 5])
def test_agreement_without_labels(make, batch):
    signature = classifier(batch)
    data, x = make(signature, labelled=False)
    other = lambda feeds: {"y": feeds["x"] * np.array([1, 1, 1, -1], np.float32)}  # noqa: E731
    found = evaluate(other, data, signature=signature, reference=identity)
    expected = 100 * np.mean(x.argmax(1) == (x * [1, 1, 1, -1]).argmax(1))
    assert found.metric == "agreement" and found.count == 37 and found.value == pytest.approx(expected)
    assert drop_in_points(None, found) == pytest.approx(100 - expected)


def test_signal_to_noise_of_the_worst_output(make):
    signature = Signature(
        (TensorSpec("x", F32, ("N", 4)),), (TensorSpec("a", F32, ("N", 4)), TensorSpec("b", F32, ("N", 4)))
    )
    data, _ = make(signature, labelled=False)
    wanted = lambda feeds: {"a": feeds["x"], "b": feeds["x"]}  # noqa: E731
    got = lambda feeds: {"a": feeds["x"] * np.float32(1.001), "b": feeds["x"] * np.float32(1.1)}  # noqa: E731
    found = evaluate(got, data, signature=signature, reference=wanted)
    assert found.metric == "snr" and found.value == pytest.approx(20, abs=1e-3)  # 0.1 of the amplitude is 20 dB
    assert evaluate(wanted, data, signature=signature, reference=wanted).value == math.inf
    with pytest.raises(ValueError, match="points"):
        drop_in_points(None, found)


def test_neither_labels_nor_reference_is_refused(make):
    data, _ = make(classifier(), labelled=False)
    with pytest.raises(DataError, match="without labels"):
        evaluate(identity, data, signature=classifier())


def test_points_lost():
    assert drop_in_points(Accuracy("top1", 80.0, 10), Accuracy("top1", 77.5, 10)) == 2.5


def test_a_model_file_and_its_bytes_give_what_onnxruntime_gives(tmp_path):
    import onnxruntime

    proto = small_cnn()
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((50, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, 50)
    np.savez(tmp_path / "d.npz", x=x, labels=labels)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    from graphopt import model as models

    signature = models.signature(models.load(tmp_path / "m.onnx"))
    data = load_dataset(tmp_path / "d.npz", signature)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    expected = 100 * np.mean(np.asarray(y).argmax(1) == labels)
    for source in (tmp_path / "m.onnx", proto.SerializeToString()):
        assert evaluate(source, data, signature=signature).value == pytest.approx(expected)


def test_an_embedding_is_no_class(make):
    """Another element is the largest, though hardly anything changed."""
    data, x = make(classifier(), labelled=False)
    signal, noise = float(np.square(x, dtype=np.float64).sum()), 1e-4 * x.size

    def moved(feeds):
        return {"y": feeds["x"] + np.float32(0.01)}

    found = evaluate(moved, data, signature=classifier(), reference=identity, classes=False)
    assert (found.metric, found.count) == ("snr", 37)
    assert found.value == pytest.approx(10 * math.log10(signal / noise), abs=0.1)
