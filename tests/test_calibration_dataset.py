"""Data in: what is read, in which form, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from graphopt.calibration import load_dataset, random_dataset
from graphopt.calibration.preprocess import PRESETS, PictureFormat, Preprocess, load_preprocess
from graphopt.errors import DataError
from graphopt.model import Signature, TensorSpec

F32 = np.dtype(np.float32)


def signature(*inputs: TensorSpec, classes: int | None = 10) -> Signature:
    return Signature(inputs, (TensorSpec("y", F32, ("N", classes)),))


VECTOR = signature(TensorSpec("x", F32, ("N", 4)))
PICTURE = signature(TensorSpec("image", F32, ("N", 3, 8, 8)))


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    rows = "\n".join(f"{i}.png,{i % 3}" for i in range(6))
    (tmp_path / "labels.csv").write_text("file,class_index\n" + rows + "\n")
    return tmp_path


def test_arrays_come_back_in_batches_with_their_labels(npz):
    x = np.arange(20, dtype=np.float32).reshape(5, 4)
    data = load_dataset(npz(x=x, labels=[0, 1, 2, 3, 4]), VECTOR)
    assert len(data) == 5 and data.names == ("x",) and not data.is_random
    assert data.labels is not None and data.labels.dtype == np.int64
    batches = [feeds["x"] for feeds in data.batches(2)]
    assert [len(b) for b in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), x)


def test_a_draw_partitions_and_repeats(npz):
    data = load_dataset(npz(x=np.arange(400, dtype=np.float32).reshape(100, 4), labels=np.arange(100) % 10), VECTOR)
    drawn, rest = data.draw(30, seed=7)
    again, _ = data.draw(30, seed=7)
    other, _ = data.draw(30, seed=8)
    first = [float(f["x"][0, 0]) for f in drawn.batches(1)]
    left = [float(f["x"][0, 0]) for f in rest.batches(1)]
    assert len(drawn) == 30 and sorted(first + left) == [4.0 * i for i in range(100)]
    assert first == [float(f["x"][0, 0]) for f in again.batches(1)]
    assert first != [float(f["x"][0, 0]) for f in other.batches(1)]
    assert drawn.labels is not None
    np.testing.assert_array_equal(drawn.labels, [int(v / 4) % 10 for v in first])
    with pytest.raises(DataError, match="cannot draw 101"):
        data.draw(101, 0)


def test_a_fixed_batch_is_kept_and_filled_up(npz):
    fixed = signature(TensorSpec("x", F32, (4, 2)))
    data = load_dataset(npz(x=np.arange(12, dtype=np.float32).reshape(6, 2)), fixed)
    batches = [feeds["x"] for feeds in data.batches(100)]
    assert [b.shape for b in batches] == [(4, 2), (4, 2)]
    np.testing.assert_array_equal(batches[1][1:], np.repeat(batches[1][1:2], 3, axis=0))


def test_inputs_whose_batch_is_not_axis_0_are_given_whole(npz):
    recurrent = signature(TensorSpec("x", F32, (1, 4)), TensorSpec("state", F32, (2, 1, 3)))
    data = load_dataset(npz(x=np.zeros((5, 1, 4), np.float32), state=np.ones((5, 2, 1, 3), np.float32)), recurrent)
    feeds = list(data.batches(3))
    assert len(feeds) == 5
    assert feeds[0]["x"].shape == (1, 4) and feeds[0]["state"].shape == (2, 1, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((2, 4), np.float32)}, "no input of the model"),
        ({"z": np.zeros((2, 4), np.float32)}, "no input of the model"),
        ({"x": np.zeros((2, 5), np.float32)}, "has shape"),
        ({"x": np.zeros((4,), np.float32)}, "has shape"),
        ({"x": np.zeros((0, 4), np.float32)}, "no samples"),
        ({"x": np.full((2, 4), np.nan, np.float32)}, "NaN or infinity, first in sample 0"),
        ({"x": np.array([[0, 0, 0, 0], [0, 0, np.inf, 0]])}, "first in sample 1"),
        ({"x": np.full((2, 4), 1e300)}, "outside the input's float32"),
        ({"x": np.zeros((2, 4), np.complex64)}, "is complex64"),
        ({"x": np.zeros((2, 4), np.float32), "labels": [0]}, "1 labels for 2 samples"),
        ({"x": np.zeros((2, 4), np.float32), "labels": [0.5, 1.0]}, "class indices"),
        ({"x": np.zeros((2, 4), np.float32), "labels": [0, 10]}, "label 10 of sample 1 is out of range"),
        ({"x": np.zeros((2, 4), np.float32), "labels": [-1, 0]}, "label -1 of sample 0"),
    ],
)
def test_bad_arrays_are_refused(npz, arrays, message):
    with pytest.raises(DataError, match=message):
        load_dataset(npz(**arrays), VECTOR)


def test_a_near_name_is_suggested(npz):
    images = signature(TensorSpec("image", F32, ("N", 4)))
    with pytest.raises(DataError, match="did you mean 'image'"):
        load_dataset(npz(imag=np.zeros((2, 4), np.float32)), images)


def test_pickles_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("objects.npz", "text.npz", "array.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            load_dataset(tmp_path / name, VECTOR)


def test_labels_are_checked_against_a_known_number_of_classes(npz):
    unknown = signature(TensorSpec("x", F32, ("N", 4)), classes=None)
    data = load_dataset(npz(x=np.zeros((2, 4), np.float32), labels=[0, 12]), unknown)
    data.check_labels(13)
    with pytest.raises(DataError, match="12 of sample 1"):
        data.check_labels(12)


def test_pictures_are_preprocessed_as_the_preset_says(folder):
    data = load_dataset(folder, PICTURE, "imagenet")
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    (feeds,) = data.batches(10)
    assert feeds["image"].shape == (6, 3, 8, 8) and feeds["image"].dtype == np.float32
    # 8x8 pictures go to a short side of round(8 * 256 / 224) = 9, then to the centre 8x8
    picture = Image.open(folder / "2.png").resize((9, 9), Image.Resampling.BILINEAR).crop((0, 0, 8, 8))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((np.asarray(picture) / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(feeds["image"][2], expected, atol=1e-5)  # float32 steps on values below 3


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_makes_the_input(folder, preset):
    gray = PRESETS[preset].channels == "gray"
    for shape in ((1, 1, 8, 8), (1, 8, 8, 1)) if gray else ((1, 3, 8, 8), (1, 8, 8, 3)):
        data = load_dataset(folder, signature(TensorSpec("image", F32, shape)), preset)
        feeds = next(data.batches(4))
        assert feeds["image"].shape == shape and np.isfinite(feeds["image"]).all()


def test_channel_order_and_uint8(folder):
    rgb = load_dataset(folder, signature(TensorSpec("image", np.dtype(np.uint8), ("N", 8, 8, 3))), "raw")
    bgr = load_dataset(folder, signature(TensorSpec("image", np.dtype(np.uint8), ("N", 8, 8, 3))), "raw-bgr")
    a, b = next(rgb.batches(6))["image"], next(bgr.batches(6))["image"]
    assert a.dtype == np.uint8
    np.testing.assert_array_equal(a, b[..., ::-1])


def test_a_toml_file_says_the_same_as_a_preset(folder, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("scale = 0.00784313725490196\nmean = 1.0\nfit = 'crop'\n")
    mine = next(load_dataset(folder, PICTURE, file).batches(6))["image"]
    preset = next(load_dataset(folder, PICTURE, "imagenet-inception").batches(6))["image"]
    np.testing.assert_allclose(mine, preset, atol=1e-6)


def test_letterbox_keeps_the_ratio(tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "wide.png")
    spec = TensorSpec("image", F32, (1, 3, 8, 8))
    array = PictureFormat.fitting(Preprocess(fit="pad", fill=114), spec).decode(tmp_path / "wide.png")
    assert (array[:4] == (255, 0, 0)).all() and (array[4:] == 114).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resiz = 3", "did you mean 'resize'"),
        ("fit = 'squash'", "fit must be one of"),
        ("std = 0.0", "std must not be 0"),
        ("mean = [1, 2]", "mean must be 1 or 3"),
        ("mean = nan", "finite"),
        ("size = [1, 2, 3]", "height, width"),
        ("resize = true", "integer"),
        ("= 3", "not valid TOML"),
    ],
)
def test_bad_toml_is_refused(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_preprocess(tmp_path / "bad.toml")


def test_bad_folders_are_refused(folder, tmp_path_factory):
    with pytest.raises(DataError, match="--preprocess"):
        load_dataset(folder, PICTURE)
    with pytest.raises(DataError, match="did you mean 'imagenet'"):
        load_dataset(folder, PICTURE, "imagnet")
    with pytest.raises(DataError, match="rank 4"):
        load_dataset(folder, VECTOR, "imagenet")
    with pytest.raises(DataError, match="dynamic height or width"):
        load_dataset(folder, signature(TensorSpec("image", F32, ("N", 3, "H", "W"))), "imagenet")
    with pytest.raises(DataError, match="no axis of 1"):
        load_dataset(folder, PICTURE, "mnist")
    with pytest.raises(DataError, match="label 2 of sample 2"):
        load_dataset(folder, signature(TensorSpec("image", F32, ("N", 3, 8, 8)), classes=2), "unit")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="no pictures"):
        load_dataset(empty, PICTURE, "unit")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    broken = load_dataset(folder, PICTURE, "unit")
    with pytest.raises(DataError, match=r"3\.png"):
        list(broken.batches(2))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("picture,class_index\n0.png,1\n", "it needs: file, class_index"),
        ("file,name\n0.png,cat\n", "it needs: file, class_index"),
        ("file,label\n0.png,cat\n", "'cat' is not a class index"),
        ("file,label\nabsent.png,1\n", "line 2: no such file"),
        ("", "it needs: file"),
    ],
)
def test_bad_tables_are_refused(folder, table, message):
    (folder / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        load_dataset(folder, PICTURE, "unit")


def test_without_a_table_all_pictures_count_and_there_are_no_labels(folder):
    (folder / "labels.csv").unlink()
    data = load_dataset(folder, PICTURE, "unit")
    assert len(data) == 6 and data.labels is None


def test_random_data_repeats_and_fits(folder):
    wide = signature(
        TensorSpec("x", F32, ("N", 3, 4)),
        TensorSpec("u", np.dtype(np.uint8), ("N", 2)),
        TensorSpec("ids", np.dtype(np.int64), ("N", 5)),
        TensorSpec("mask", np.dtype(bool), ("N", 5)),
    )
    a, b, c = (next(random_dataset(wide, 8, seed).batches(8)) for seed in (1, 1, 2))
    assert random_dataset(wide, 8, 1).is_random
    assert {n: (v.shape, v.dtype) for n, v in a.items()} == {
        "x": ((8, 3, 4), np.float32), "u": ((8, 2), np.uint8), "ids": ((8, 5), np.int64), "mask": ((8, 5), np.bool_),
    }  # fmt: skip
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(a["x"], c["x"])
    with pytest.raises(DataError, match="--input"):
        random_dataset(signature(TensorSpec("x", F32, ("N", "length"))), 2, 0)
    states = signature(TensorSpec("x", F32, ("batch", 4)), TensorSpec("h", F32, (2, "batch", 3)))
    feeds = next(random_dataset(states, 3, 0).batches(2))
    assert feeds["x"].shape == (1, 4) and feeds["h"].shape == (2, 1, 3)
