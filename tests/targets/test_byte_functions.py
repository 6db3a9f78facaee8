"""Operators between bytes, and functions of a byte by a table of 256."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.remote.engine import RemoteEngine
from graphopt.targets.arm import Arm
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import new_schedule
from tests.targets.arm_folders import build
from tests.targets.integer_models import quantized, runnable
from tests.targets.oracle import TARGET, compiled, model, node, reference


@pytest.mark.parametrize("op", ["Add", "Mul", "LeakyRelu", "Sigmoid", "GlobalAveragePool", "AveragePool", "Clip"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_an_operator_between_bytes_is_within_a_quantum(op, dtype):
    rng = np.random.default_rng(5)
    x, other = (rng.uniform(-3, 3, (1, 20, 6, 7)).astype(np.float32) for _ in range(2))
    low = 0 if dtype == np.uint8 else -128
    nodes, constants = [], {}
    for name, scale, point in (("x", 0.024, 128 + low), ("o", 0.03, 99 + low)):
        made, held = quantized(name, scale, point, dtype)
        nodes += made
        constants |= held
    operands = ["xd", "od"] if op in ("Add", "Mul") else ["xd"]
    attributes = {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1]} if op == "AveragePool" else {}
    if op == "Clip":
        operands += ["least", "most"]
        constants |= {"least": np.float32(-1), "most": np.float32(1.3)}
    nodes.append(node(op, operands, ["y"], **attributes))
    made, held = quantized("y", 0.05, 70 + low, dtype)
    feeds = {"x": x, "o": other}
    built = model([*nodes, *made], feeds, ["yd"], constants | held)
    found, wanted = compiled(built, feeds)["yd"], reference(built, feeds)["yd"]
    assert np.abs(found - wanted).max() <= 0.05 + 1e-6
    assert np.mean(found != wanted) < 0.02  # ties only


def silu(shape, dtype):
    """x * Sigmoid(x) with a Q/DQ pair behind the Sigmoid."""
    rng = np.random.default_rng(6)
    x = (rng.standard_normal(shape) * 4).astype(np.float32)
    low = 0 if dtype == np.uint8 else -128
    nodes, constants = [], {}
    for name, scale, zero, made in (
        ("x", 0.07, 90, []),
        ("s", 1 / 255, 0, [node("Sigmoid", ["xd"], ["s"])]),
        ("y", 0.05, 6, [node("Mul", ["xd", "sd"], ["y"])]),
    ):
        pair, held = quantized(name, scale, zero + low, dtype)
        nodes += [*made, *pair]
        constants |= held
    return model(nodes, {"x": x}, ["yd"], constants), {"x": x}


def check_silu(target, built, feeds, found):
    """Equal to ONNX Runtime's but at ties, with no arithmetic."""
    names = list(pipeline.prim_funcs(target.lower(built).module))
    if target.form(True).tables:
        assert any("lookup" in name for name in names), names
        assert not any("sigmoid" in name or "multiply" in name for name in names), names
    wanted = reference(built, feeds)["yd"]
    assert np.abs(found - wanted).max() <= 0.05 + 1e-6
    assert np.mean(found != wanted) < 0.02


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (2, 20, 5, 3), (1, 256), (3, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_silu_of_bytes_is_one_table(shape, dtype):
    built, feeds = silu(shape, dtype)
    check_silu(TARGET, built, feeds, compiled(built, feeds)["yd"])


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (1, 4, 4, 4), (1, 6, 3, 3), (2, 20, 5, 3), (1, 256), (3, 7), (2, 12)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_silu_is_one_table_on_arm(shape, dtype, device, tmp_path):
    """Vectors of 16, 8 and 4 bytes, and single ones."""
    built, feeds = silu(shape, dtype)
    target = Arm(mcpu="cortex-a72", threads=1)
    found = RemoteEngine(build(built, target, tmp_path / "built"), device("cortex-a72")).run(feeds)["yd"]
    check_silu(target, built, feeds, found)


def test_a_decomposed_hard_swish_is_one_table():
    """x * clip(x + 3, 0, 6) / 6, as exporters write it."""
    x = (np.random.default_rng(7).standard_normal((1, 24, 6, 5)) * 3).astype(np.float32)
    first, held = quantized("x", 0.06, 60)
    last, more = quantized("y", 0.04, 10)
    nodes = [
        *first,
        node("Add", ["xd", "three"], ["a"]),
        node("Clip", ["a", "zero", "six"], ["c"]),
        node("Mul", ["xd", "c"], ["m"]),
        node("Div", ["m", "six"], ["y"]),
        *last,
    ]
    numbers = {"three": np.array(3, np.float32), "zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    built = model(nodes, {"x": x}, ["yd"], held | more | numbers)
    if TARGET.form(True).tables:
        assert any("lookup" in name for name in pipeline.prim_funcs(TARGET.lower(built).module))
    found, wanted = compiled(built, {"x": x})["yd"], reference(built, {"x": x})["yd"]
    assert np.abs(found - wanted).max() <= 0.04 + 1e-6
    assert np.mean(found != wanted) < 0.02


@pytest.mark.parametrize("mcpu", ["cascadelake", "x86-64-v3"])
@pytest.mark.parametrize("count", [1, 3, 16, 32, 48, 64, 256])
def test_lookup_reads_every_byte(mcpu, count):
    """The operator by itself, at every width that code is generated for."""
    import tvm
    from tvm import te

    from graphopt.targets.relax import lookup

    target = runnable(mcpu).tvm_target()
    table = np.random.default_rng(0).permutation(256).astype(np.uint8)
    data = te.placeholder((256 // count, count), "uint8", name="data")
    made: Any = te.compute(data.shape, lambda i, j: lookup.looked_up(table, "uint8")(data[i, j]), name="made")
    operands: Any = [data, made]
    schedule = new_schedule(te.create_prim_func(operands))
    if count > 1:
        schedule.vectorize(schedule.get_loops("made")[-1])
    with target, tvm.transform.PassContext(opt_level=3):
        run = tvm.compile(schedule.mod, target=target)
    source = np.arange(256 // count * count, dtype=np.uint8).reshape(-1, count)
    result = tvm.runtime.empty(source.shape, "uint8")
    run.jit()["main"](tvm.runtime.tensor(source), result)
    np.testing.assert_array_equal(result.numpy(), table[source])
