"""OneHot, EyeLike, ReverseSequence and TensorScatter, to the element."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.oracle import agree, compiled, model, node, uniform


@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
def test_one_hot(axis, dtype):
    """Negative indices count from the end; those out of range are nowhere. The two values are known at run time."""
    indices = np.array([[0, 4, -1], [-5, 5, -6]], dtype)
    values = np.array([-2, 7], np.float32)
    feeds = {"i": indices, "v": values}
    made = model([node("OneHot", ["i", "d", "v"], ["y"], axis=axis)], feeds, ["y"], {"d": np.array(5, np.int64)})
    places = np.where(indices < 0, indices + 5, indices)
    wanted = np.where(np.expand_dims(places, axis) == np.arange(5).reshape([5] + [1] * (2 - axis % 3)), 7, -2)
    np.testing.assert_array_equal(compiled(made, feeds)["y"], wanted.astype(np.float32))


@pytest.mark.parametrize(("shape", "k"), [((4, 4), 0), ((3, 5), 1), ((5, 3), -2)])
def test_eye_like(shape, k):
    x = np.ones(shape, np.int32)
    for attributes in ({}, {"dtype": 1}, {"dtype": 11}):
        agree(model([node("EyeLike", ["x"], ["y"], k=k, **attributes)], {"x": x}, ["y"]), {"x": x}, 0)


@pytest.mark.parametrize("time", [0, 1])
def test_sequences_reversed_each_by_its_length(time):
    x, lengths = uniform(1, 5, 5, 3), np.array([1, 5, 2, 4, 3], np.int64)
    made = model(
        [node("ReverseSequence", ["x", "n"], ["y"], time_axis=time, batch_axis=1 - time)],
        {"x": x, "n": lengths},
        ["y"],
    )
    agree(made, {"x": x, "n": lengths}, 0)


@pytest.mark.parametrize("mode", ["linear", "circular"])
@pytest.mark.parametrize("axis", [1, -2])
def test_a_cache_is_written_from_a_place_a_row(mode, axis):
    cache, place = uniform(1, 3, 6, 6, 2), np.array([0, 4, 2 if mode == "linear" else 5], np.int64)
    update = uniform(2, *(2 if i == axis % 4 else n for i, n in enumerate(cache.shape)))
    feeds = {"cache": cache, "update": update, "place": place}
    made = model([node("TensorScatter", list(feeds), ["y"], mode=mode, axis=axis)], feeds, ["y"], opset=24)
    wanted = cache.copy()
    for row, start in enumerate(place):
        for step in range(2):
            target = np.moveaxis(wanted[row], axis % 4 - 1, 0)
            target[(start + step) % 6] = np.moveaxis(update[row], axis % 4 - 1, 0)[step]
    np.testing.assert_array_equal(compiled(made, feeds)["y"], wanted)
