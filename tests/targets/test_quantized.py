"""QDQ models: activations round half to even and saturate, islands fuse into epilogues, constants fold."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.targets import schedules
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import TARGET, agree, compiled, model, node, reference, uniform


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 128), (np.int8, 0), (np.int8, -3), (np.uint8, 0)])
def test_quantize_rounds_half_to_even_and_saturates(dtype, zero):
    halves = np.arange(-300, 300, dtype=np.float32) + 0.5
    x = np.concatenate([halves * 0.25, uniform(1, 101) * 100]).astype(np.float32)
    constants = {"s": np.float32(0.25), "z": np.array(zero, dtype)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    agree(model(nodes, {"x": x}, ["q", "y"], constants), {"x": x}, 0)


def _island(activation: type, zero: int, opset: int = 13):
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
    return model(nodes, {"x": x}, ["y"], constants, opset), {"x": x}


@pytest.mark.parametrize(("activation", "zero"), [(np.uint8, 120), (np.int8, 0), (np.int8, 7)])
def test_island(activation, zero):
    """Both sides sum in another order, so a value that falls between two levels may take either: one level apart."""
    made, feeds = _island(activation, zero)
    found, wanted = compiled(made, feeds)["y"], reference(made, feeds)["y"]
    levels = np.abs(found - wanted) / np.float32(1 / 4)
    assert levels.max() <= 1.001
    assert np.mean(levels > 0.5) <= 0.01


@pytest.mark.parametrize("opset", [13, 17, 19, 21])
def test_island_leaves_no_kernels_between_convolutions(opset):
    """Both convolutions multiply bytes at every opset, and what is between them is in their epilogues."""
    made, feeds = _island(np.uint8, 120, opset)
    kernels = pipeline.prim_funcs(TARGET.lower(made).module)
    chosen = {
        name: schedules.choices(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))[0].template
        for name, func in kernels.items()
    }
    convolutions = [name for name, template in chosen.items() if template == "conv2d_int8"]
    assert len(convolutions) == 2
    assert all("quantize" in name for name in convolutions)
    others = set(chosen) - set(convolutions)  # the input's own Q and its frame, and the way back to NCHW
    assert len(others) == 2, others
    assert np.isfinite(compiled(made, feeds)["y"]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_constants_fold_as_onnx_runtime_computes(axis):
    rng = np.random.default_rng(3)
    data = rng.integers(-128, 128, (4, 4)).astype(np.int8)
    scale, zero = (uniform(1, 4) + 2).astype(np.float32), rng.integers(-9, 9, 4).astype(np.int8)
    floats = 90 * uniform(2, 4, 4)
    x = uniform(4, 4, 4)
    nodes = [
        node("DequantizeLinear", ["d", "s", "z"], ["w"], axis=axis),
        node("QuantizeLinear", ["f", "s", "z"], ["q"], axis=axis),
        node("Add", ["x", "w"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y", "q"], {"d": data, "s": scale, "z": zero, "f": floats}, 13)
    agree(made, {"x": x}, 0)


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.1, 1 / 3])
def test_what_a_kernel_computed_is_another_level_only_near_ties(scale):
    """It is multiplied by the reciprocal of the scale: a unit in the last place of the quotient."""
    x = uniform(2, 1, 4, 16, 16)
    constants = {"w": np.diag([0.5, 2.0, -1.0, 0.25]).astype(np.float32).reshape(4, 4, 1, 1),
                 "s": np.float32(scale), "z": np.array(100, np.uint8)}  # fmt: skip
    nodes = [node("Conv", ["x", "w"], ["v"]), node("QuantizeLinear", ["v", "s", "z"], ["q"])]
    made = model(nodes, {"x": x}, ["q"], constants)
    found, wanted = compiled(made, {"x": x})["q"].astype(int), reference(made, {"x": x})["q"].astype(int)
    quotient = x.astype(np.float64) * np.array([0.5, 2.0, -1.0, 0.25]).reshape(1, 4, 1, 1) / np.float32(scale)
    near = np.abs(np.abs(quotient % 1) - 0.5) <= 4 * np.finfo(np.float32).eps * np.maximum(np.abs(quotient), 1)
    np.testing.assert_array_equal(found[~near], wanted[~near])
    assert np.abs(found - wanted).max() <= 1
