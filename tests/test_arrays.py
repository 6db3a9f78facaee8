"""Arrays of every dtype that models have come through a file as they were."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.arrays import load_arrays, save_arrays

DTYPES = [
    np.dtype(each)
    for each in ("float32", "float64", "float16", "int8", "uint8", "int64", "bool", "complex64", ml_dtypes.bfloat16,
                 ml_dtypes.float8_e4m3fn, ml_dtypes.int4)
]  # fmt: skip


@given(
    st.sampled_from(DTYPES),
    arrays(np.uint8, st.lists(st.integers(0, 3), max_size=3).map(tuple), elements=st.integers(0, 1)),
    st.text(),
)
def test_every_dtype_comes_back(tmp_path_factory, dtype, content, name):
    given_ = [{name: content.astype(dtype), name + "file": np.arange(3)}, {}]
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    save_arrays(given_, path)
    found = load_arrays(path)
    assert [list(each) for each in found] == [[name, name + "file"], []]
    array = next(iter(found[0].values()))
    assert array.dtype == dtype
    assert array.shape == content.shape
    assert array.tobytes() == content.astype(dtype).tobytes()


def test_texts_come_back_and_other_objects_do_not(tmp_path):
    texts = np.array([["a", "längere"]], dtype=object)
    save_arrays([{"t": texts}], tmp_path / "a.npz")
    (found,) = load_arrays(tmp_path / "a.npz")
    assert found["t"].dtype == object
    assert found["t"].tolist() == texts.tolist()


def test_no_pickle_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", count=np.array(1), **{"0": np.array([{}], dtype=object)}, allow_pickle=True)
    with pytest.raises(ValueError):
        load_arrays(tmp_path / "a.npz")
