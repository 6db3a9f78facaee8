"""Convolutions of bytes on AMX tiles, bit for bit against plain numpy; tiles are emulated where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.capabilities import host_features
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import integer_computes
from graphopt.targets.schedules import conv2d_amx
from graphopt.targets.schedules.workload import Machine, Workload
from tests.targets import test_amx
from tests.targets.amx_emulator import TILES, emulated
from tests.targets.integer_models import integer_conv, network
from tests.targets.oracle import model, node

FEATURES = frozenset({"amx_tile", "amx_int8", "amx_bf16", "avx512f", "avx512_vnni", "avx512bw"})
MACHINE = Machine(16, 32, 1, FEATURES)
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def workload_of(case: dict[str, Any]) -> tuple[Workload, list[np.ndarray], np.ndarray]:
    """A convolution that keeps its sums; its arguments; and what they should be, blocked."""
    from tvm import te

    rng = np.random.default_rng(case["seed"])
    n, (h, w), icb, ocb, blocks, g = (
        1,
        case["size"],
        case["in_lanes"],
        case["out_lanes"],
        case["in_blocks"],
        case["groups"],
    )
    channels, outs = blocks * icb * g, case["out_blocks"] * ocb * g
    x = rng.integers(0, 256, (n, channels, h, w)).astype(np.uint8)
    kernel = rng.integers(-128, 128, (outs, blocks * icb, *case["kernel"])).astype(np.int8)
    first = rng.integers(-1000, 1000, outs).astype(np.int32)
    window = {"strides": case["strides"], "pads": case["pads"], "dilations": case["dilations"]}
    wanted = integer_conv(x, kernel, 0, group=g, **window) + first.reshape(1, -1, 1, 1)
    packed = integer_computes.pack_weight(kernel, icb, ocb)
    stored = x.reshape(n, blocks * g, icb, h * w).transpose(0, 1, 3, 2)
    data: Any = te.placeholder(stored.shape, "uint8", name="data")
    weight: Any = te.placeholder(packed.shape, "int8", name="weight")
    start: Any = te.placeholder((1, outs // ocb, 1, ocb), "int32", name="start")
    sums: Any = integer_computes.conv2d(
        data, weight, start, size=(h, w), groups=g, out_size=wanted.shape[2:], pairs=False, **window
    )
    func = te.create_prim_func([data, weight, start, sums])
    shaped = wanted.reshape(n, outs // ocb, ocb, -1).transpose(0, 1, 3, 2)
    arrays = [np.ascontiguousarray(stored), packed, first.reshape(1, -1, 1, ocb)]
    return Workload(func, MACHINE), arrays, shaped


def computed(workload: Workload, decision: dict[str, Any], arrays: list[np.ndarray], shape) -> np.ndarray:
    import tvm

    kernel = conv2d_amx.apply(workload, decision)
    target = Cpu(mcpu="x86-64-v3", threads=1).tvm_target()
    module = tvm.IRModule({"main": emulated(kernel.func).with_attr("global_symbol", "main")})
    with target, tvm.transform.PassContext(opt_level=3):
        loaded = tvm.compile(module, target=target).jit()
    given_ = [np.ascontiguousarray(kernel.repack[i](a)) if i in kernel.repack else a for i, a in enumerate(arrays)]
    result = tvm.runtime.tensor(np.full(shape, -77, np.int32))
    loaded["main"](*map(tvm.runtime.tensor, given_), result)
    return result.numpy()


@st.composite
def cases(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["wide", "wide", "narrow"]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (7, 7)]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 1)]))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(draw(st.integers(0, min(reach[i % 2], 3))) for i in range(4))
    size = tuple(draw(st.integers(max(1, reach[i] + 1 - pads[i] - pads[i + 2]), 9 + reach[i])) for i in range(2))
    return {
        "size": size, "kernel": kernel, "dilations": dilations, "pads": pads,
        "strides": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)])),
        "groups": draw(st.sampled_from([1, 1, 2])) if kind == "wide" else 1,
        "in_lanes": 64 if kind == "wide" else draw(st.sampled_from([4, 16, 32])),
        "in_blocks": draw(st.integers(1, 2)) if kind == "wide" else 1,
        "out_lanes": draw(st.sampled_from([64, 32, 16])),
        "out_blocks": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 1 << 16)),
        "choice": draw(st.integers(0, 1 << 16)),
    }  # fmt: skip


def check(case: dict[str, Any]) -> None:
    workload, arrays, wanted = workload_of(case)
    space = conv2d_amx.match(workload)
    assert space, case
    before = TILES.products
    decision = space[case["choice"] % len(space)]
    np.testing.assert_array_equal(computed(workload, decision, arrays, wanted.shape), wanted, err_msg=str(decision))
    assert TILES.products > before


@settings(max_examples=8, deadline=None, suppress_health_check=SLOW)
@given(cases())
def test_sums_are_exact(case):
    check(case)


@pytest.mark.long
@settings(max_examples=80, deadline=None, suppress_health_check=SLOW)
@given(cases())
def test_many_sums_are_exact(case):
    check(case)


@settings(max_examples=2, deadline=None, suppress_health_check=SLOW)
@given(test_amx.conv_cases())
def test_bfloat16_convolutions_compute_the_same_when_emulated(case):
    """The emulator is right where real tiles are: the tests of the bfloat16 kernels hold for it too."""
    case = {**case, "threads": 1, "batch": 1}
    workload, arrays = test_amx.conv_workload(case)
    space = conv2d_amx.match(workload)
    assert space
    import tvm

    from graphopt.targets.relax.bfloat16 import narrow_array

    kernel = conv2d_amx.apply(workload, space[case["choice"] % len(space)])
    target = Cpu(mcpu="x86-64-v3", threads=1).tvm_target()
    module = tvm.IRModule({"main": emulated(kernel.func).with_attr("global_symbol", "main")})
    with target, tvm.transform.PassContext(opt_level=3):
        loaded = tvm.compile(module, target=target).jit()
    given_ = [np.ascontiguousarray(kernel.repack[i](a)) if i in kernel.repack else a for i, a in enumerate(arrays)]
    result = tvm.runtime.tensor(narrow_array(np.full(arrays[3].shape, np.nan, np.float32)))
    loaded["main"](*map(tvm.runtime.tensor, given_), result)
    exact, bound = test_amx.conv_reference(case, arrays)
    assert np.all(np.abs(result.numpy().astype(np.float64) - exact) <= bound)


def on_tiles(made: Any, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A model as it is lowered for a processor with tiles, these emulated, and the same with vectors."""
    from graphopt.targets.relax import pipeline
    from tests.targets import oracle

    tiled, vectors = Cpu(mcpu="sapphirerapids", threads=1), Cpu(mcpu="cascadelake", threads=1)
    if not vectors.features <= host_features():
        pytest.skip("this processor lacks the vectors that stand around the tiles (AVX-512)")
    lowered = tiled.lower(made)
    assert lowered.tiles and not vectors.lower(made).tiles
    templates = {
        schedules.choices(Workload(func.with_attr("global_symbol", "main"), tiled.machine()))[0].template
        for func in pipeline.prim_funcs(lowered.module).values()
    }
    assert "conv2d_amx" in templates, templates
    import tvm

    module = tiled.scheduled(lowered)
    for name, func in module.functions_items():
        if name.name_hint in pipeline.prim_funcs(module):
            module.update_func(name, emulated(func))
    before = TILES.products
    result: Any = oracle.loaded(module, vectors)["main"](tvm.runtime.tensor(feeds["x"]))
    assert TILES.products > before
    return result.numpy(), oracle.compiled(made, feeds, vectors)["y"]


def test_a_quantized_network_runs_on_tiles():
    """Byte for byte what vectors compute."""
    found, wanted = on_tiles(*network(2, np.uint8, 0, "Relu"))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [(16, 64), (2, 17, 128), (40, 100)])
def test_products_of_many_rows_run_on_tiles(shape):
    rng = np.random.default_rng(shape[0])
    x = rng.integers(0, 256, shape).astype(np.uint8)
    w = rng.integers(-127, 128, (shape[-1], 80)).astype(np.int8)
    constants = {"s": np.float32(1), "z": np.uint8(9), "w": w, "ws": np.ones(80, np.float32)}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        node("MatMul", ["xd", "wd"], ["y"]),
    ]
    found, vectors = on_tiles(model(nodes, {"x": x}, ["y"], constants), {"x": x})
    np.testing.assert_array_equal(found, (x.astype(np.int64) - 9) @ w.astype(np.int64))
    np.testing.assert_array_equal(vectors, found)


def test_vectors_where_the_system_refuses_tiles(monkeypatch):
    from graphopt import capabilities
    from graphopt.runtime import amx_permission

    monkeypatch.setattr(capabilities, "host_mcpu", lambda: "sapphirerapids")
    monkeypatch.setattr(amx_permission, "granted", lambda: False)
    assert Cpu().capabilities.dot_int8 == "avx512vnni"
    assert not Cpu().uses_tiles(True)
    monkeypatch.setattr(amx_permission, "granted", lambda: True)
    assert Cpu().capabilities.dot_int8 == "amx"
    assert Cpu().uses_tiles(True) and not Cpu().uses_tiles(False)
