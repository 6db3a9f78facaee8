"""The engine: outputs belong to the caller, wrong feeds are named, damaged artifacts are refused before they load."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from graphopt.errors import ArtifactError, DataError
from graphopt.runtime import entry_point, tvm_engine
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.cpu import Cpu
from tests.targets.oracle import TARGET, model, node, uniform


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with y = relu(x + z), same = x; inputs x: f32[2,3] and z: f32[3]."""
    folder = tmp_path_factory.mktemp("artifact")
    nodes = [node("Add", ["x", "z"], ["a"]), node("Relu", ["a"], ["y"]), node("Identity", ["x"], ["same"])]
    feeds = {"x": uniform(1, 2, 3), "z": uniform(2, 3)}
    TARGET.build(TARGET.lower(model(nodes, feeds, ["y", "same"])), folder)
    return folder


def _feeds(seed: int = 1):
    return {"x": uniform(seed, 2, 3), "z": uniform(seed + 1, 3)}


def test_run(built):
    engine = TvmEngine(built, 1)
    feeds = _feeds()
    found = engine.run(feeds)
    assert engine.input_shapes == {"x": (2, 3), "z": (3,)}
    assert list(found) == ["y", "same"]
    np.testing.assert_array_equal(found["y"], np.maximum(feeds["x"] + feeds["z"], 0))
    np.testing.assert_array_equal(found["same"], feeds["x"])


def test_outputs_outlive_later_calls_and_the_engine(built):
    engine = TvmEngine(built, 1)
    first = engine.run(_feeds(1))
    kept = {k: v.copy() for k, v in first.items()}
    for seed in range(2, 12):
        engine.run(_feeds(seed))
    del engine
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)
        assert first[name].flags.writeable


def test_feeds_may_be_strided_or_narrower(built):
    engine = TvmEngine(built, 1)
    wide = uniform(3, 3, 4)
    found = engine.run({"x": wide.T[:2, :], "z": np.arange(3, dtype=np.float64)})
    np.testing.assert_array_equal(found["same"], wide.T[:2, :])


def _aligned(array):
    found = entry_point.aligned_empty(array.shape, array.dtype)
    found[...] = array
    return found


@pytest.mark.parametrize("place", [_aligned, lambda a: a, lambda a: np.concatenate([a, a])[1:3]])
def test_feeds_are_left_alone_wherever_they_lie(built, place):
    engine = TvmEngine(built, 1)
    for seed in (1, 2, 3):
        feeds = {name: place(array) for name, array in _feeds(seed).items() if name == "x"} | {"z": uniform(9, 3)}
        kept = {name: array.copy() for name, array in feeds.items()}
        found = engine.run(feeds)
        np.testing.assert_array_equal(found["y"], np.maximum(feeds["x"] + feeds["z"], 0))
        found["same"][...] = -1  # an output that is a copy of an input is not the input
        found["y"][...] = -1
        for name, array in kept.items():
            np.testing.assert_array_equal(feeds[name], array)


def test_an_aligned_feed_is_read_where_it_lies(built):
    slot = TvmEngine(built, 1)._entry.slots[0]
    aligned = _aligned(uniform(1, 2, 3))
    assert slot.tensor_of({"x": aligned}).data_ptr() == aligned.ctypes.data
    locked = _aligned(uniform(1, 2, 3))
    locked.flags.writeable = False
    reversed_ = _aligned(uniform(1, 2, 3))[:, ::-1]
    for array in (locked, reversed_, aligned.astype(">f4")):
        tensor = slot.tensor_of({"x": array})
        assert tensor.data_ptr() == slot.copy.ctypes.data
        np.testing.assert_array_equal(np.from_dlpack(tensor), array)


def test_outputs_that_share_memory_are_told_apart(tmp_path):
    """y and its reshaped view, the input itself, and a constant: each output may be written to by its owner."""
    feeds = {"x": uniform(1, 4, 4)}
    nodes = [
        node("Relu", ["x"], ["y"]),
        node("Reshape", ["y", "shape"], ["row"]),
        node("Identity", ["x"], ["x_again"]),
        node("Reshape", ["x", "shape"], ["x_row"]),
        node("Identity", ["c"], ["constant"]),
    ]
    names = ["y", "row", "x_again", "x_row", "constant"]
    constants = {"shape": np.array([16], np.int64), "c": uniform(2, 3)}
    TARGET.build(TARGET.lower(model(nodes, feeds, names, constants)), tmp_path)
    engine = TvmEngine(tmp_path, 1)
    for seed in (1, 2, 3):
        x = _aligned(uniform(seed, 4, 4))
        kept = x.copy()
        found = engine.run({"x": x})
        wanted = {"y": np.maximum(kept, 0), "x_again": kept, "constant": uniform(2, 3)}
        wanted |= {"row": wanted["y"].reshape(16), "x_row": kept.reshape(16)}
        for name in names:
            np.testing.assert_array_equal(found[name], wanted[name])
            found[name][...] = 7  # would show in the outputs still to come, in x, or in the next call
        np.testing.assert_array_equal(x, kept)


def test_engines_with_different_threads_take_turns(built):
    """The pool belongs to the calling thread, not to the engine."""
    import tvm_ffi

    if tvm_engine.available_processors() < 2:
        pytest.skip("not so many processors")
    engines = {threads: TvmEngine(built, threads) for threads in (1, 2)}
    for threads in (1, 2, 1, 2, 2, 1):
        engines[threads].run(_feeds())
        assert tvm_ffi.get_global_func("runtime.NumThreads")() == threads


def test_workers_sleep_soon_after_a_call(tmp_path):
    """In a process of its own: how long TVM's workers spin is read once."""
    if tvm_engine.available_processors() < 2:
        pytest.skip("not so many processors")
    feeds = {"x": uniform(1, 64, 4096)}
    Cpu(threads=2).build(Cpu(threads=2).lower(model([node("Relu", ["x"], ["y"])], feeds, ["y"])), tmp_path)
    code = f"""
import resource, time
import numpy as np
from graphopt.runtime.tvm_engine import TvmEngine
engine = TvmEngine({str(tmp_path)!r}, 2)
feeds = {{"x": np.ones((64, 4096), np.float32)}}
for _ in range(3):
    engine.run(feeds)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": None}, "'x' is missing"),
        ({"x": np.zeros((3, 2), np.float32)}, "has shape"),
        ({"x": np.array([["a"] * 3] * 2)}, "is <U1"),
        ({"q": np.zeros(1)}, "no input 'q'"),
    ],
)
def test_wrong_feeds_are_named(built, change, said):
    feeds = {k: v for k, v in (_feeds() | change).items() if v is not None}
    with pytest.raises(DataError, match=said):
        TvmEngine(built, 1).run(feeds)


def test_two_engines_and_threads(built):
    one, two = TvmEngine(built, 1), TvmEngine(built, 2)
    np.testing.assert_array_equal(one.run(_feeds())["y"], two.run(_feeds())["y"])
    found = []
    worker = threading.Thread(target=lambda: found.append(one.run(_feeds())["y"]))
    worker.start()
    worker.join()
    np.testing.assert_array_equal(found[0], two.run(_feeds())["y"])


@pytest.mark.parametrize("threads", [1, 2])
def test_pool_gives_as_many_threads_as_asked(threads):
    import tvm_ffi

    if tvm_engine.available_processors() < threads:
        pytest.skip("not so many processors")
    tvm_engine.set_threads(threads)
    assert tvm_ffi.get_global_func("runtime.NumThreads")() == threads


def test_rebuilt_in_place_is_loaded_anew(tmp_path):
    """The dynamic linker remembers paths: a second model at the same path must not be the first."""
    feeds = {"x": uniform(1, 4)}
    for op, expected in (("Relu", np.maximum(feeds["x"], 0)), ("Neg", -feeds["x"])):
        TARGET.build(TARGET.lower(model([node(op, ["x"], ["y"])], feeds, ["y"])), tmp_path)
        np.testing.assert_array_equal(TvmEngine(tmp_path, 1).run(feeds)["y"], expected)


def _copy(built, folder):
    for name in ("model.so", "engine.json"):
        (folder / name).write_bytes((built / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", ["model.so", "engine.json"])
def test_missing_file(built, tmp_path, name):
    _copy(built, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        TvmEngine(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_library(built, tmp_path, keep):
    library = _copy(built, tmp_path) / "model.so"
    library.write_bytes(library.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        TvmEngine(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\udcff"])
def test_damaged_description(built, tmp_path, text):
    (_copy(built, tmp_path) / "engine.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        TvmEngine(tmp_path)


def test_library_that_is_no_library(built, tmp_path):
    library = _copy(built, tmp_path) / "model.so"
    library.write_bytes(b"nothing to load")
    described = json.loads((tmp_path / "engine.json").read_text())
    described["library_sha256"] = tvm_engine.library_digest(library)
    (tmp_path / "engine.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        TvmEngine(tmp_path)


def test_a_processor_without_the_instructions_is_told(built, monkeypatch):
    monkeypatch.setattr(tvm_engine, "host_features", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match=r"which this one lacks.*x86-64-v3"):
        TvmEngine(built)


def test_another_architecture_is_told(built, monkeypatch):
    monkeypatch.setattr(tvm_engine, "host_arch", lambda: "riscv64")
    with pytest.raises(ArtifactError, match="riscv64"):
        TvmEngine(built)


def test_threads_zero_means_all(built):
    assert TvmEngine(built).threads == tvm_engine.available_processors()
    assert Cpu().thread_count == tvm_engine.available_processors()
