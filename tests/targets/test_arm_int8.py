"""Layers that multiply bytes on ARM, by SDOT, SMMLA and SMLAL, emulated: sums bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.remote.engine import RemoteEngine
from graphopt.targets.arm import Arm
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import dot
from graphopt.targets.schedules.workload import Workload
from tests.targets.arm_folders import build
from tests.targets.int4_models import int4_product
from tests.targets.integer_models import integer_conv, integer_reference, network, quantized_conv, residual_network
from tests.targets.oracle import compiled, model, node, reference

CORES = {"cortex-a72": "cortex-a72", "cortex-a76": "cortex-a76", "neoverse-n2": "max,sve-default-vector-length=16"}
"""One for each way to multiply, and QEMU's name of it."""
CASES = settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


def run(made, feeds, core: str, device, folder):
    return RemoteEngine(build(made, Arm(mcpu=core, threads=1), folder), device(CORES[core])).run(feeds)


@pytest.mark.parametrize("core", CORES)
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
    zero=st.sampled_from([-128, 0, 127, 7]),
    dtype=st.sampled_from([np.int8, np.int8, np.uint8]),
)
def test_sums_are_exact(
    core, device, tmp_path, seed, form, channels, outs, size, kernel, strides, dilations, pads, zero, dtype
):
    """Taps outside of the picture stand for the zero point, which differs from the byte 0."""
    assume(all(size[a] + pads[a] + pads[a + 2] > (kernel[a] - 1) * dilations[a] for a in range(2)))
    groups = {"depthwise": channels, "grouped": 4}.get(form, 1)
    channels = 4 * channels if form == "grouped" else channels
    outs = channels if form == "depthwise" else 4 * outs if form == "grouped" else outs
    window = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    zero = zero % 256 if dtype is np.uint8 else zero
    nodes, feeds, constants = quantized_conv(seed, (1, channels, *size), outs, kernel, zero=zero, dtype=dtype, **window)
    wanted = integer_conv(feeds["x"], constants["w"], zero, **window)
    assume(255 * np.abs(constants["w"].astype(int)).reshape(outs, -1).sum(axis=1).max() < 2**23)
    found = run(model(nodes, feeds, ["y"], constants), feeds, core, device, tmp_path)["y"]
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize("core", CORES)
def test_the_largest_products_do_not_overflow(core, device, tmp_path):
    """Twice -128 * -128 passes 16 bits."""
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0, dtype=np.int8)
    feeds["x"][:, :8], feeds["x"][:, 8:] = -128, 127
    constants["w"][:8], constants["w"][8:] = -128, 127
    found = run(model(nodes, feeds, ["y"], constants), feeds, core, device, tmp_path)["y"]
    np.testing.assert_array_equal(found, integer_conv(feeds["x"], constants["w"], 0).astype(np.float32))


@pytest.mark.parametrize("core", CORES)
@CASES
@given(
    seed=st.integers(0, 999),
    rows=st.sampled_from([1, 1, 3, 17]),
    depth=st.sampled_from([1, 3, 16, 50, 129]),
    columns=st.sampled_from([1, 4, 10, 33, 64]),
    zero=st.sampled_from([-128, 0, 9]),
)
def test_products_of_matrices(core, device, tmp_path, seed, rows, depth, columns, zero):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (rows, depth)).astype(np.int8)
    w = rng.integers(-127, 128, (depth, columns)).astype(np.int8)
    constants = {"s": np.float32(1), "z": np.int8(zero), "w": w, "ws": np.ones(columns, np.float32)}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        node("MatMul", ["xd", "wd"], ["y"]),
    ]
    found = run(model(nodes, {"x": x}, ["y"], constants), {"x": x}, core, device, tmp_path)["y"]
    np.testing.assert_array_equal(found, ((x.astype(np.int64) - zero) @ w.astype(np.int64)).astype(np.float32))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 0), (np.uint8, 20), (np.int8, 0)])
def test_a_network_stays_bytes_from_end_to_end(core, dtype, zero, device, tmp_path):
    made, feeds = network(1, dtype, zero, "Relu")
    names = list(pipeline.prim_funcs(Arm(mcpu=core).lower(made).module))
    assert not any("dequantize" in name or "matmul" in name for name in names), names
    found, wanted = run(made, feeds, core, device, tmp_path)["y"], reference(made, feeds)["y"]
    # A sum at a tie may round either way: a quantum of g1 (0.05) in some channels, times weights of at most 1.
    assert np.abs(found - wanted).max() <= 0.05 * 48 * 0.1


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_bytes_are_those_of_this_processor(core, activation, device, tmp_path):
    """Whose code, in unsigned bytes, is compared with ONNX Runtime's in `test_integer`. With int8 activations one byte
    in some thousands of ONNX Runtime's rounds the other way at a tie, so only a quantum is asked of those."""
    made, feeds = residual_network(1, activation, np.int8)
    found, here, wanted = (
        run(made, feeds, core, device, tmp_path), compiled(made, feeds), integer_reference(made, feeds)
    )  # fmt: skip
    for name in wanted:
        np.testing.assert_array_equal(found[name], here[name], err_msg=name)
    for name in ("xq", "r1q", "r2q"):
        assert np.abs(found[name].astype(int) - wanted[name]).max() <= 1, name


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("is_bytes", [True, False])
def test_weights_of_four_bits_are_unpacked_in_registers(core, symmetric, is_bytes, device, tmp_path):
    made, feeds, wanted, bound = int4_product(symmetric, is_bytes, 3, 96, 20, 16)
    assert any("int4" in name for name in pipeline.prim_funcs(Arm(mcpu=core).lower(made).module))
    np.testing.assert_allclose(run(made, feeds, core, device, tmp_path)["y"], wanted, atol=bound, rtol=0)


def test_which_way_is_taken():
    nodes, feeds, constants = quantized_conv(0, (1, 16, 4, 4), 16, (1, 1), zero=0, dtype=np.int8)
    made = model(nodes, feeds, ["y"], constants)
    for core, way in {"cortex-a53": "smlal", "cortex-a72": "smlal", "cortex-a76": "sdot"}.items():
        target = Arm(mcpu=core, threads=1)
        func = next(f for n, f in pipeline.prim_funcs(target.lower(made).module).items() if "conv2d" in n)
        workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
        assert dot.way(target.machine(), workload.blocks["conv2d_int8"]) == way
