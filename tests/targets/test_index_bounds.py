"""Indices out of range reach nothing beyond what they index: the nearest one in range is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import TargetError
from graphopt.runtime.tvm_engine import TvmEngine
from tests.targets.oracle import TARGET, compiled, model, node, reference

WILD = np.array([-(2**40), -6, -5, -1, 0, 3, 4, 5, 2**40], np.int64)
"""Of five, of which ONNX Runtime takes -5 to 4."""
NEAREST = np.clip(WILD, -5, 4)


@pytest.fixture
def run(tmp_path: Path):
    def outputs(made, feeds):
        lowered = TARGET.lower(made)
        TARGET.build(lowered, tmp_path)
        return TvmEngine(tmp_path).run(feeds)

    return outputs


def cases():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((5, 4)).astype(np.float32)
    rows = np.stack([WILD] * 4, axis=1)
    pairs = np.stack([WILD, rng.integers(0, 4, 9)], axis=1)
    updates = rng.standard_normal((9, 4)).astype(np.float32)
    yield node("Gather", ["x", "i"], ["y"]), data, WILD, {}
    yield node("Gather", ["x", "i"], ["y"], axis=1), data.T.copy(), WILD, {}
    yield node("GatherElements", ["x", "i"], ["y"]), data, rows, {}
    yield node("GatherND", ["x", "i"], ["y"]), data, pairs, {}
    yield node("ScatterElements", ["x", "i", "u"], ["y"], reduction="add"), data, rows, {"u": updates}
    yield node("ScatterND", ["x", "i", "u"], ["y"], reduction="add"), data, WILD[:, None], {"u": updates}


@pytest.mark.parametrize(("made", "data", "indices", "more"), list(cases()), ids=lambda v: getattr(v, "op_type", ""))
def test_no_index_leaves_the_tensor(made, data, indices, more, run):
    """ONNX Runtime's answer to the nearest indices, as it refuses these."""
    feeds = {"x": data, "i": indices, **more}
    found = run(model([made], feeds, ["y"], opset=18), feeds)["y"]
    bounds = np.array([5, 4]) if made.op_type == "GatherND" else 5
    near = {**feeds, "i": np.clip(indices, -bounds, bounds - 1)}
    wanted = reference(model([made], near, ["y"], opset=18), near)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_constant_index_out_of_range_is_refused():
    x = np.zeros((5, 4), np.float32)
    made = model([node("Gather", ["x", "i"], ["y"])], {"x": x}, ["y"], {"i": np.array([1, 7])})
    with pytest.raises(TargetError, match="out of range"):
        TARGET.lower(made)


def test_constant_indices_from_the_end_are_as_they_were():
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    made = model([node("Gather", ["x", "i"], ["y"])], {"x": x}, ["y"], {"i": np.array([-1, 0, -5, 4])})
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])
