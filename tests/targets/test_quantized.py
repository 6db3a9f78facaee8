"""QDQ models: weights fold to floats, activations round half to even and saturate, islands fuse into epilogues."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.targets.relax import pipeline
from tests.targets.oracle import TARGET, agree, compiled, model, node, reference, uniform


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 128), (np.int8, 0), (np.int8, -3), (np.uint8, 0)])
def test_quantize_rounds_half_to_even_and_saturates(dtype, zero):
    halves = np.arange(-300, 300, dtype=np.float32) + 0.5
    x = np.concatenate([halves * 0.25, uniform(1, 101) * 100]).astype(np.float32)
    constants = {"s": np.float32(0.25), "z": np.array(zero, dtype)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    agree(model(nodes, {"x": x}, ["q", "y"], constants), {"x": x}, 0)


def _island(activation: type, zero: int):
    """Q -> DQ -> Conv (per-channel int8 weight, int32 bias) -> Relu -> Q -> DQ -> Conv -> Q -> DQ."""
    rng = np.random.default_rng(5)
    x = uniform(1, 1, 3, 10, 10)
    constants = {
        "xs": np.float32(1 / 100), "xz": np.array(zero, activation),
        "w": rng.integers(-127, 128, (20, 3, 3, 3)).astype(np.int8), "ws": (uniform(2, 20) + 2) / 200,
        "wz": np.zeros(20, np.int8), "b": rng.integers(-500, 500, 20).astype(np.int32), "bz": np.zeros(20, np.int32),
        "as": np.float32(1 / 16), "az": np.array(zero, activation),
        "v": rng.integers(-127, 128, (8, 20, 1, 1)).astype(np.int8), "vs": (uniform(3, 8) + 2) / 400,
        "vz": np.zeros(8, np.int8), "ys": np.float32(1 / 4), "yz": np.array(zero, activation),
    }  # fmt: skip
    constants["bs"] = (constants["ws"] * constants["xs"]).astype(np.float32)
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        node("Conv", ["xd", "wd", "bd"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "as", "az"], ["rq"]),
        node("DequantizeLinear", ["rq", "as", "az"], ["rd"]),
        node("DequantizeLinear", ["v", "vs", "vz"], ["vd"], axis=0),
        node("Conv", ["rd", "vd"], ["e"]),
        node("QuantizeLinear", ["e", "ys", "yz"], ["yq"]),
        node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


@pytest.mark.parametrize(("activation", "zero"), [(np.uint8, 120), (np.int8, 0), (np.int8, 7)])
def test_island(activation, zero):
    """Both sides sum in another order, so a value that falls between two levels may take either: one level apart."""
    made, feeds = _island(activation, zero)
    found, wanted = compiled(made, feeds)["y"], reference(made, feeds)["y"]
    levels = np.abs(found - wanted) / np.float32(1 / 4)
    assert levels.max() <= 1.001
    assert np.mean(levels > 0.5) <= 0.01


def test_island_leaves_no_kernels_between_convolutions():
    made, _ = _island(np.uint8, 120)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert len([n for n in names if "conv2d" in n]) == 2
    first = next(n for n in names if "conv2d" in n and "relu" in n)
    assert "quantize" in first
    assert "dequantize" in first
