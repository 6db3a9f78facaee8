"""AMX kernels against float64 of the rounded operands.

Tolerance: float32 sums of K products differ by at most K * 2**-24 * sum|a b|, and the one rounding to bfloat16 adds
2**-8 of the value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.capabilities import host_features
from graphopt.errors import ArtifactError
from graphopt.runtime import amx_permission
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import computes
from graphopt.targets.relax.bfloat16 import narrow, narrow_array, widen
from graphopt.targets.schedules import amx, conv2d_amx, conv2d_image, matmul_amx, matmul_row
from graphopt.targets.schedules.workload import Machine, Workload

needs_amx = pytest.mark.skipif(
    "amx_bf16" not in host_features() or not amx_permission.granted(),
    reason="this machine has no AMX bfloat16 tile registers, or its kernel does not let processes use them",
)
ROUNDOFF = 2.0**-8
SINGLE = 2.0**-24
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def machine(threads: int = 1, without: frozenset[str] = frozenset()) -> Machine:
    return Machine(16, 32, threads, frozenset({"amx_tile", "amx_bf16", "avx512f", "avx512_bf16"}), without)


def run(template, workload: Workload, decision: dict[str, Any], arrays: list[np.ndarray], shape, dtype="bfloat16"):
    """Compile one decision and compute; the output buffer starts as NaN."""
    import tvm

    kernel = template.apply(workload, decision)
    module = tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")})
    target = Cpu(threads=workload.machine.threads).tvm_target()
    with target, tvm.transform.PassContext(opt_level=3):
        loaded = tvm.compile(module, target=target).jit()
    given_ = [np.ascontiguousarray(kernel.repack[i](a)) if i in kernel.repack else a for i, a in enumerate(arrays)]
    blank = np.full(shape, np.nan, np.float32)
    result = tvm.runtime.tensor(narrow_array(blank) if dtype == "bfloat16" else blank)
    loaded["main"](*map(tvm.runtime.tensor, given_), result)
    return result.numpy().astype(np.float64)


def conv_workload(case: dict[str, Any]) -> tuple[Workload, list[np.ndarray]]:
    """A fused convolution, bias, residual, relu, rounding; and random arguments."""
    from tvm import te, tirx

    rng = np.random.default_rng(case["seed"])
    n, (h, w), g = case["batch"], case["size"], case["groups"]
    icb, ocb = case["in_lanes"], case["out_lanes"]
    in_blocks, out_blocks = case["in_blocks"], case["out_blocks"] * g
    out = out_size(case)
    data: Any = te.placeholder((n, in_blocks * g, h * w, icb), case["dtype"], name="data")
    weight: Any = te.placeholder((out_blocks, in_blocks, *case["kernel"], icb, ocb), "bfloat16", name="weight")
    bias: Any = te.placeholder((1, out_blocks, 1, ocb), "float32", name="bias")
    residual: Any = te.placeholder((n, out_blocks, out[0] * out[1], ocb), "bfloat16", name="residual")
    sums: Any = computes.conv2d(
        data, weight, size=(h, w), strides=case["strides"], pads=case["pads"], dilations=case["dilations"],
        groups=g, out_size=out,
    )  # fmt: skip
    total: Any = te.compute(
        sums.shape, lambda i, o, p, v: sums[i, o, p, v] + bias[0, o, 0, v] + widen(residual[i, o, p, v]), name="added"
    )
    cut: Any = te.compute(sums.shape, lambda *i: tirx.max(total[i], tirx.const(0, "float32")), name="relu")
    stored: Any = te.compute(sums.shape, lambda *i: narrow(cut[i]), name="stored")
    tensors: Any = [data, weight, bias, residual, stored]
    func = te.create_prim_func(tensors)
    shapes = [[int(d) for d in t.shape] for t in (data, weight, bias, residual)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    arrays = [a if str(t.dtype) == "float32" else narrow_array(a)
              for a, t in zip(arrays, (data, weight, bias, residual), strict=True)]  # fmt: skip
    return Workload(func, machine(case["threads"])), arrays


def out_size(case: dict[str, Any]) -> tuple[int, int]:
    (h, w), (top, left, bottom, right) = case["size"], case["pads"]
    reach = [(k - 1) * d for k, d in zip(case["kernel"], case["dilations"], strict=True)]
    return (
        (h + top + bottom - reach[0] - 1) // case["strides"][0] + 1,
        (w + left + right - reach[1] - 1) // case["strides"][1] + 1,
    )


def conv_reference(case: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The result before rounding, and the bound on its error."""
    data, weight, bias, residual = (np.asarray(a) for a in arrays)
    data = narrow_array(data.astype(np.float32)).astype(np.float64)  # float32 planes are rounded as they are read
    weight, bias, residual = (a.astype(np.float64) for a in (weight, bias, residual))
    (h, w), (top, left, bottom, right), g = case["size"], case["pads"], case["groups"]
    out_h, out_w = out_size(case)
    (s_h, s_w), (d_h, d_w) = case["strides"], case["dilations"]
    picture = data.reshape(*data.shape[:2], h, w, -1)
    picture = np.pad(picture, ((0, 0), (0, 0), (top, bottom), (left, right), (0, 0)))
    sums, sizes = (np.zeros((*residual.shape[:2], out_h, out_w, residual.shape[3])) for _ in range(2))
    blocks, outs = weight.shape[1], weight.shape[0] // g
    for group in range(g):
        taken = slice(group * outs, (group + 1) * outs)
        for y in range(case["kernel"][0]):
            for x in range(case["kernel"][1]):
                part = picture[:, group * blocks : (group + 1) * blocks, y * d_h :, x * d_w :]
                part = part[:, :, : (out_h - 1) * s_h + 1 : s_h, : (out_w - 1) * s_w + 1 : s_w]
                sums[:, taken] += np.einsum("nbyxi,obiv->noyxv", part, weight[taken, :, y, x], optimize=True)
                filters = np.abs(weight[taken, :, y, x])
                sizes[:, taken] += np.einsum("nbyxi,obiv->noyxv", np.abs(part), filters, optimize=True)
    exact = sums.reshape(residual.shape) + bias + residual
    terms = blocks * weight.shape[4] * case["kernel"][0] * case["kernel"][1] + 2
    summing = terms * SINGLE * (sizes.reshape(residual.shape) + np.abs(bias) + np.abs(residual))
    exact = np.maximum(exact, 0)
    return exact, summing + ROUNDOFF * (np.abs(exact) + summing)


@st.composite
def conv_cases(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["wide", "wide", "narrow", "planes"]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 1), (2, 2)]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(draw(st.integers(0, min(reach[i % 2], 3))) for i in range(4))
    size = tuple(draw(st.integers(max(1, reach[i] + 1 - pads[i] - pads[i + 2]), 24 + reach[i])) for i in range(2))
    return {
        "batch": draw(st.integers(1, 4)),
        "size": size,
        "kernel": kernel,
        "strides": draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)])),
        "dilations": dilations,
        "pads": pads,
        "groups": draw(st.sampled_from([1, 1, 2])) if kind == "wide" else 1,
        "in_lanes": {"wide": 32, "narrow": 16, "planes": 1}[kind],
        "in_blocks": draw(st.integers(1, 8 if kind == "planes" else 3)) if kind != "narrow" else 1,
        "out_lanes": draw(st.sampled_from([32, 32, 16])),
        "out_blocks": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])) if kind == "planes" else "bfloat16",
        "threads": draw(st.sampled_from([1, 2])),
        "seed": draw(st.integers(0, 1 << 16)),
        "choice": draw(st.integers(0, 1 << 16)),
    }


def check_conv(case: dict[str, Any]) -> None:
    workload, arrays = conv_workload(case)
    space = conv2d_amx.match(workload)
    assert space, case
    decision = space[case["choice"] % len(space)]
    found = run(conv2d_amx, workload, decision, arrays, arrays[3].shape)
    exact, bound = conv_reference(case, arrays)
    assert np.all(np.abs(found - exact) <= bound), (decision, float(np.nanmax(np.abs(found - exact) - bound)))


@needs_amx
@settings(max_examples=12, deadline=None, suppress_health_check=SLOW)
@given(conv_cases())
def test_convolutions_agree_with_float64(case):
    check_conv(case)


@needs_amx
@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(conv_cases())
def test_many_convolutions_agree_with_float64(case):
    check_conv(case)


COMMON: dict[str, Any] = {
    "batch": 1, "strides": (1, 1), "dilations": (1, 1), "groups": 1, "in_lanes": 32, "out_lanes": 32,
    "dtype": "bfloat16", "threads": 1, "seed": 0,
}  # fmt: skip


@needs_amx
@pytest.mark.parametrize(
    "case",
    [
        {"size": (7, 7), "kernel": (3, 3), "pads": (1, 1, 1, 1), "in_blocks": 2, "out_blocks": 4},
        {"size": (14, 14), "kernel": (3, 3), "pads": (1, 1, 1, 1), "strides": (2, 2), "in_blocks": 2, "out_blocks": 2},
        {
            "size": (30, 33),
            "kernel": (7, 7),
            "pads": (3, 3, 3, 3),
            "strides": (2, 2),
            "in_blocks": 3,
            "out_blocks": 1,
            "in_lanes": 1,
            "dtype": "float32",
        },
    ],
)
def test_decisions_compute_the_same(case):
    case = {**COMMON, **case}
    workload, arrays = conv_workload(case)
    exact, bound = conv_reference(case, arrays)
    space = conv2d_amx.match(workload) or []
    for decision in space[:: max(len(space) // 6, 1)]:
        found = run(conv2d_amx, workload, decision, arrays, arrays[3].shape)
        assert np.all(np.abs(found - exact) <= bound), decision


@needs_amx
def test_a_picture_too_large_for_the_cache_is_copied_in_bands():
    case = {**COMMON, "size": (150, 131), "kernel": (3, 3), "pads": (1, 1, 1, 1), "in_blocks": 2, "out_blocks": 1}
    workload, arrays = conv_workload({**case, "threads": 2})
    window = conv2d_image.window_of(workload)
    assert window is not None and conv2d_image.image_of(window, True).bands > 1
    exact, bound = conv_reference(case, arrays)
    for decision in (conv2d_amx.match(workload) or [])[:2]:
        assert np.all(np.abs(run(conv2d_amx, workload, decision, arrays, arrays[3].shape) - exact) <= bound), decision


def test_nothing_matches_without_the_instructions():
    case = {**COMMON, "size": (7, 7), "kernel": (1, 1), "pads": (0, 0, 0, 0), "in_blocks": 1, "out_blocks": 1}
    workload, _ = conv_workload(case)
    assert conv2d_amx.match(workload)
    assert conv2d_amx.match(Workload(workload.func, Machine(16, 32, 1, frozenset({"avx512f"})))) is None
    product, _ = matmul_workload((4,), 32, 64, 64, "bfloat16", 0, 1)
    assert matmul_amx.match(product)
    assert matmul_amx.match(Workload(product.func, Machine(16, 32, 1, frozenset({"avx512f"})))) is None


def test_float32_convolutions_are_left_to_others():
    from tvm import te

    data: Any = te.placeholder((1, 1, 64, 16), "float32", name="data")
    weight: Any = te.placeholder((1, 1, 1, 1, 16, 16), "float32", name="weight")
    sums: Any = computes.conv2d(
        data, weight, size=(8, 8), strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), groups=1, out_size=(8, 8)
    )
    assert conv2d_amx.match(Workload(te.create_prim_func([data, weight, sums]), machine())) is None


def matmul_workload(lead: tuple[int, ...], depth: int, columns: int, block: int, dtype: str, seed: int, threads: int):
    from tvm import te

    data: Any = te.placeholder((*lead, depth), "bfloat16", name="data")
    weight: Any = te.placeholder((columns // block, depth, block), "bfloat16", name="weight")
    bias: Any = te.placeholder((columns,), "float32", name="bias")
    product: Any = computes.matmul(data, weight, columns=columns)
    total: Any = te.compute(product.shape, lambda *i: product[i] + bias[i[-1]], name="added")
    result: Any = total
    if dtype == "bfloat16":
        result = te.compute(product.shape, lambda *i: narrow(total[i]), name="stored")
    rng = np.random.default_rng(seed)
    arrays = [narrow_array(rng.standard_normal([int(d) for d in t.shape])) for t in (data, weight)]
    arrays.append(rng.standard_normal(columns).astype(np.float32))
    alone = machine(threads, frozenset({matmul_row.NAME}))  # which would take single rows
    return Workload(te.create_prim_func([data, weight, bias, result]), alone), arrays


@needs_amx
@settings(max_examples=10, deadline=None, suppress_health_check=SLOW)
@given(
    st.sampled_from([(1,), (1, 1), (7,), (16,), (33,), (1, 50), (3, 20), (40, 1), (2, 3, 5)]),
    st.sampled_from([32, 96, 160, 256]),
    st.sampled_from([(64, 64), (40, 40), (192, 64), (1000, 40), (96, 32), (16, 16)]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([1, 2]),
    st.integers(0, 1 << 16),
)
def test_products_agree_with_float64(lead, depth, width, dtype, threads, choice):
    columns, block = width
    workload, arrays = matmul_workload(lead, depth, columns, block, dtype, choice, threads)
    space = matmul_amx.match(workload)
    assert space
    decision = space[choice % len(space)]
    found = run(matmul_amx, workload, decision, arrays, (*lead, columns), dtype)
    data, bias = arrays[0].astype(np.float64), arrays[2].astype(np.float64)
    matrix = arrays[1].astype(np.float64).transpose(1, 0, 2).reshape(depth, columns)
    exact = data @ matrix + bias
    bound = (depth + 1) * SINGLE * (np.abs(data) @ np.abs(matrix) + np.abs(bias))
    if dtype == "bfloat16":
        bound = bound + ROUNDOFF * (np.abs(exact) + bound)
    assert np.all(np.abs(found - exact) <= bound), decision


def test_tiles_are_packed_in_pairs_of_inputs():
    matrix = np.arange(2 * 32 * 32).reshape(2, 32, 32)
    packed = amx.pack_tiles(matrix, 1)
    assert packed.shape == (2, 2, 1, 16, 16, 2)
    for block, step, row, column, half in [(0, 0, 0, 0, 1), (1, 1, 15, 3, 0), (1, 0, 7, 15, 1)]:
        assert packed[block, step, 0, row, column, half] == matrix[step, 2 * row + half, 16 * block + column]


@pytest.mark.parametrize("pixels,outs", [(2, 2), (4, 1), (1, 4), (3, 1), (1, 1)])
def test_registers_of_a_grid_do_not_overlap(pixels, outs):
    grid = amx.Grid(pixels, outs, 13)
    assert grid.fits
    config = np.array(grid.configuration(), np.uint64).view(np.uint8)
    assert config[0] == 1 and list(config[16:32].view(np.uint16)) == [64] * 8
    heights = list(config[48:56])
    assert heights.count(13) >= pixels * outs + 1 and heights[-1] == 16
    assert {grid.accumulator(p, o) for p in range(pixels) for o in range(outs)} == set(range(pixels * outs))


def test_too_large_a_grid_does_not_fit():
    assert not amx.Grid(3, 2, 16).fits
    assert all(amx.Grid(p, o, 16).fits for p, o in conv2d_amx.GRIDS)


def test_refused_permission_is_an_artifact_error(monkeypatch):
    monkeypatch.setattr(amx_permission, "granted", lambda: False)
    with pytest.raises(ArtifactError, match=r"model\.so uses AMX"):
        amx_permission.require("model.so")
