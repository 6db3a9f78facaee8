"""Layers that multiply bytes: sums bit for bit, results against ONNX Runtime, on every way to multiply."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import dot
from graphopt.targets.schedules.workload import Workload
from tests.targets.integer_models import (
    integer_conv,
    integer_reference,
    integer_weight,
    network,
    quantized,
    quantized_conv,
    residual_network,
    runnable,
)
from tests.targets.oracle import TARGET, compiled, model, node, reference

CASES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROCESSORS = ["cascadelake", "x86-64-v4", "alderlake", "x86-64-v3", "x86-64-v2"]
"""One for each way to multiply: VPDPBUSD of 64 and of 32 bytes, pairs and words of 64, of 32 and of 16 bytes."""


@pytest.mark.parametrize("mcpu", PROCESSORS)
@CASES
@given(
    seed=st.integers(0, 999),
    form=st.sampled_from(["dense", "dense", "depthwise", "grouped"]),
    channels=st.sampled_from([1, 3, 4, 7, 16, 20, 33]),
    outs=st.sampled_from([1, 5, 16, 24, 40]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 2)]),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.sampled_from([(1, 1), (1, 1), (2, 1)]),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    zero=st.sampled_from([0, 0, 128, 255, 7]),
    weights=st.sampled_from([64, 127]),
)
def test_sums_are_exact(mcpu, seed, form, channels, outs, size, kernel, strides, dilations, pads, zero, weights):
    """float32 holds sums below 2^24 exactly: with scales of 1 what comes out are the integers."""
    assume(all(size[a] + pads[a] + pads[a + 2] > (kernel[a] - 1) * dilations[a] for a in range(2)))
    groups = {"depthwise": channels, "grouped": 4}.get(form, 1)
    channels = 4 * channels if form == "grouped" else channels
    outs = channels if form == "depthwise" else 4 * outs if form == "grouped" else outs
    window = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    nodes, feeds, constants = quantized_conv(
        seed, (1, channels, *size), outs, kernel, zero=zero, weights=weights, **window
    )
    wanted = integer_conv(feeds["x"], constants["w"], zero, **window)
    assume(255 * np.abs(constants["w"].astype(int)).reshape(outs, -1).sum(axis=1).max() < 2**23)
    found = compiled(model(nodes, feeds, ["y"], constants), feeds, runnable(mcpu))["y"]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("mcpu", PROCESSORS)
def test_the_largest_products_do_not_saturate(mcpu):
    """255 * 127 + 255 * 127 passes 16 bits: weights so large must not be multiplied in pairs."""
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0)
    feeds["x"][:] = 255
    constants["w"][:8], constants["w"][8:] = 127, -128
    found = compiled(model(nodes, feeds, ["y"], constants), feeds, runnable(mcpu))["y"]
    np.testing.assert_array_equal(found, integer_conv(feeds["x"], constants["w"], 0).astype(np.float32))


def test_which_way_is_taken():
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0, weights=64)
    small = model(nodes, feeds, ["y"], constants)
    constants["w"][:] = 127
    large = model(nodes, feeds, ["y"], constants)
    expected = {"cascadelake": ("vnni", "vnni"), "x86-64-v4": ("pairs", "words"), "alderlake": ("vnni", "vnni"),
                "x86-64-v3": ("pairs", "words"), "x86-64-v2": ("pairs", "words")}  # fmt: skip
    for mcpu, ways in expected.items():
        target = Cpu(mcpu=mcpu, threads=1)
        assert tuple(way_of(made, target) for made in (small, large)) == ways, mcpu


def way_of(made: ir.Model, target: Cpu) -> str | None:
    func = next(f for n, f in pipeline.prim_funcs(target.lower(made).module).items() if "conv2d" in n)
    workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
    return dot.way(target.machine(), workload.blocks["conv2d_int8"])


def test_every_decision_computes_the_same():
    nodes, feeds, constants = quantized_conv(3, (1, 48, 9, 10), 72, (3, 3), zero=5, pads=(1, 1, 1, 1), strides=(2, 1))
    made = model(nodes, feeds, ["y"], constants)
    wanted = integer_conv(feeds["x"], constants["w"], 5, pads=(1, 1, 1, 1), strides=(2, 1)).astype(np.float32)
    name, func = next(
        (n, f) for n, f in pipeline.prim_funcs(TARGET.lower(made).module).items() if n.startswith("fused_conv2d")
    )
    choices = schedules.choices(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))
    assert {choice.template for choice in choices} == {"conv2d_int8"}
    for choice in choices[::3]:
        found = compiled(made, feeds, decisions={name: (choice.template, choice.decision)})["y"]
        np.testing.assert_array_equal(found, wanted)


@CASES
@given(
    seed=st.integers(0, 999),
    rows=st.sampled_from([1, 1, 3, 17]),
    depth=st.sampled_from([1, 3, 16, 50, 129]),
    columns=st.sampled_from([1, 4, 10, 33, 64]),
    zero=st.sampled_from([0, 128, 9]),
    op=st.sampled_from(["MatMul", "Gemm", "Gemm transposed"]),
)
def test_products_of_matrices(seed, rows, depth, columns, zero, op):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    w = rng.integers(-127, 128, (columns, depth) if "transposed" in op else (depth, columns)).astype(np.int8)
    axis = 0 if "transposed" in op else 1
    constants = {"s": np.float32(1), "z": np.uint8(zero), "w": w, "ws": np.ones(columns, np.float32)}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=axis),
        node(op.split()[0], ["xd", "wd"], ["y"], **({"transB": 1} if "transposed" in op else {})),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    assert any("conv2d" in name for name in pipeline.prim_funcs(TARGET.lower(made).module))
    matrix = w.T if "transposed" in op else w
    wanted = (x.astype(np.int64) - zero) @ matrix.astype(np.int64)
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], wanted.astype(np.float32))


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "HardSwish"])
@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.uint8, 20), (np.int8, 0)])
def test_a_network_stays_bytes_from_end_to_end(dtype, zero, activation):
    made, feeds = network(1, dtype, zero, activation)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert not any("dequantize" in name or "matmul" in name for name in names), names
    found, wanted = compiled(made, feeds)["y"], reference(made, feeds)["y"]
    # A sum at a tie may round either way: a quantum of g1 (0.05) in some channels, times weights of at most 1.
    assert np.abs(found - wanted).max() <= 0.05 * 48 * 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "pads"), [((5, 40), (0, 0, 0, 0)), ((6, 23), (1, 2, 1, 0)), ((4, 16), (3, 3, 3, 3))])
@pytest.mark.parametrize("zero", [0, 114, 255])
def test_a_picture_is_quantized_into_pixels(channels, size, pads, zero):
    """The first layer: a wide picture takes the template, a frame of its zero point with it."""
    rng = np.random.default_rng(channels)
    x = (rng.standard_normal((2, channels, *size)) * 2).astype(np.float32)
    made, held = quantized("x", 0.02, zero)
    weight, constants = integer_weight("w", rng.uniform(-1, 1, (8, channels, 3, 3)).astype(np.float32))
    built = model([*made, weight, node("Conv", ["xd", "wd"], ["y"], pads=pads)], {"x": x}, ["y"], held | constants)
    funcs = pipeline.prim_funcs(TARGET.lower(built).module)
    templates = [
        schedules.choices(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))[0].template
        for name, func in funcs.items()
    ]
    assert "pixels" in templates, list(funcs)
    found, wanted = compiled(built, {"x": x})["y"], reference(built, {"x": x})["y"]
    # where a quotient is within rounding of a tie, a byte may differ by one: a quantum times a weight
    assert np.abs(found - wanted).max() <= 2 * 0.02 + 1e-4
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.01


def test_bytes_in_and_out():
    """The graph's own inputs and outputs keep their types."""
    rng = np.random.default_rng(2)
    x = rng.integers(-128, 128, (1, 16, 5, 5)).astype(np.int8)
    weight, held = integer_weight("w", rng.uniform(-1, 1, (16, 16, 1, 1)).astype(np.float32))
    constants = {"s": np.float32(0.05), "z": np.int8(3), "t": np.float32(0.2), **held}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        weight,
        node("Conv", ["xd", "wd"], ["c"]),
        node("QuantizeLinear", ["c", "t", "z"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    found, wanted = compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"]
    assert found.dtype == np.int8
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_onnx_runtime(seed, activation):
    made, feeds = residual_network(seed, activation)
    found = compiled(made, feeds)
    for name, wanted in integer_reference(made, feeds).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize(("group", "stride", "zero"), [(1, 2, 0), (1, 2, 77), (1, 1, 9), (2, 2, 5), (1, 3, 128)])
def test_transposed_convolution_of_bytes(group, stride, zero):
    """One integer convolution a phase: scales of 1, so that what comes out are the sums."""
    rng = np.random.default_rng(12)
    x = rng.integers(0, 256, (1, 8, 6, 5)).astype(np.uint8)
    w = rng.integers(-127, 128, (8, 12 // group, 4, 4)).astype(np.int8)
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, np.uint8), "w": w, "one": np.array(1, np.float32),
                 "nought": np.array(0, np.int8), "b": rng.integers(-99, 99, 12).astype(np.float32)}  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "one", "nought"], ["wd"]),
        node("ConvTranspose", ["xd", "wd", "b"], ["y"], strides=[stride, stride], pads=[1, 1, 1, 1], group=group),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert any("rescale" in name for name in names), names
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])


@pytest.mark.parametrize("zero", [0, 40])
def test_one_dimensional_convolution_of_bytes(zero):
    rng = np.random.default_rng(13)
    x = rng.integers(0, 256, (2, 12, 30)).astype(np.uint8)
    w = rng.integers(-127, 128, (20, 12, 5)).astype(np.int8)
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, np.uint8), "w": w,
                 "ws": np.ones(20, np.float32), "wz": np.zeros(20, np.int8)}  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        node("Conv", ["xd", "wd"], ["y"], pads=[2, 1], strides=[2]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    assert any("rescale" in name for name in pipeline.prim_funcs(TARGET.lower(made).module))
    np.testing.assert_array_equal(compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"])


@pytest.mark.parametrize("behind", ["", "Relu"])
@pytest.mark.parametrize("shape", [(20, 1, 1), (1, 20, 1, 1), (1,)])
def test_a_constant_added_behind_a_layer_joins_its_offsets(shape, behind):
    """Behind a Relu it cannot."""
    nodes, feeds, constants = quantized_conv(3, (1, 8, 5, 6), 20, (3, 3), zero=7, bias=True)
    constants["c"] = np.random.default_rng(0).uniform(-900, 900, shape).astype(np.float32)
    if behind:
        nodes.append(node("Relu", ["y"], ["r"]))
    nodes.append(node("Add", ["c", "r"] if behind else ["y", "c"], ["t"]))
    made = model(nodes, feeds, ["t"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert any("conv2d" in name and "add" in name for name in names) == bool(behind), names
    wanted = reference(made, feeds)["t"]
    assert np.abs(compiled(made, feeds)["t"] - wanted).max() <= 4 * np.finfo(np.float32).eps * np.abs(wanted).max()
