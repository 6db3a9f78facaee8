"""bfloat16 in tensor expressions against ml_dtypes, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphopt import capabilities
from graphopt.targets.relax import bfloat16

SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1.00390625, 1.01171875, 1.0039063, 65504.0, 1e-30],
    np.float32,
)
TARGETS = [
    pytest.param("sapphirerapids", id="avx512_bf16"),
    pytest.param("skylake-avx512", id="avx512 without bf16"),
    pytest.param("x86-64-v3", id="avx2"),
]


def _compile(func, mcpu: str):
    import tvm

    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mtriple": "x86_64-linux-gnu"})
    with target:
        return tvm.compile(func, target=target)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16)


def _values(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(count - 2 * SPECIAL.size).astype(np.float32)
    halfway = (rng.integers(0x3F80, 0x4000, SPECIAL.size).astype(np.uint32) << 16 | 0x8000).view(np.float32)
    return np.concatenate([SPECIAL, halfway, normal * np.float32(10.0) ** rng.integers(-30, 30, normal.size)])


@pytest.mark.parametrize("mcpu", TARGETS)
@pytest.mark.parametrize("lanes", [1, 4, 8, 16, 32, 64, 12])
def test_narrow_rounds_to_nearest_even(mcpu: str, lanes: int):
    from tvm import s_tir, te

    if not capabilities.X86_FEATURES[mcpu] <= capabilities.host_features():
        pytest.skip(f"this processor lacks instructions of {mcpu}")
    import tvm

    rows = 960 // lanes
    data = te.placeholder((rows, lanes), "float32", name="data")
    out: Any = te.compute(data.shape, lambda i, j: bfloat16.narrow(data[i, j] * np.float32(1)), name="out")
    schedule = s_tir.Schedule(te.create_prim_func([data, out]))
    if lanes > 1:
        schedule.vectorize(schedule.get_loops(schedule.get_sblock("out"))[-1])
    built = _compile(schedule.mod, mcpu)
    values = _values(960).astype(np.float32)
    found = tvm.runtime.tensor(np.zeros((rows, lanes), ml_dtypes.bfloat16))
    built.jit()["main"](tvm.runtime.tensor(values.reshape(rows, lanes)), found)
    got = found.numpy().reshape(-1)
    with np.errstate(invalid="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    known = ~np.isnan(values)
    np.testing.assert_array_equal(_bits(got)[known], _bits(wanted)[known])
    assert np.isnan(got[~known].astype(np.float32)).all()


def test_narrow_is_one_instruction_where_there_is_one():
    from tvm import s_tir, te

    data = te.placeholder((64, 32), "bfloat16", name="data")
    out: Any = te.compute(
        data.shape, lambda i, j: bfloat16.narrow(bfloat16.widen(data[i, j]) * np.float32(2)), name="out"
    )
    schedule = s_tir.Schedule(te.create_prim_func([data, out]))
    schedule.vectorize(schedule.get_loops(schedule.get_sblock("out"))[-1])
    code = _compile(schedule.mod, "sapphirerapids").mod.inspect_source("asm")
    assert "vcvtneps2bf16" in code or "vcvtne2ps2bf16" in code
    assert "graphopt_narrow" not in code  # inlined
    assert "vcvtneps2bf16" not in _compile(schedule.mod, "skylake-avx512").mod.inspect_source("asm")


def test_widen_is_exact_and_leaves_float32_alone():
    import tvm
    from tvm import te

    data = te.placeholder((7,), "bfloat16", name="data")
    wide = te.placeholder((7,), "float32", name="wide")
    assert "Cast" not in str(bfloat16.widen(wide[0] * np.float32(2)))
    out: Any = te.compute(data.shape, lambda i: bfloat16.widen(data[i]), name="out")
    built = _compile(te.create_prim_func([data, out]), "x86-64-v3")
    values = np.array([1.0, -2.5, 0.1, np.inf, -np.inf, 0.0, 3e38], ml_dtypes.bfloat16)
    found = tvm.runtime.tensor(np.zeros(7, np.float32))
    built.jit()["main"](tvm.runtime.tensor(values), found)
    np.testing.assert_array_equal(found.numpy(), values.astype(np.float32))


def test_narrow_array_rounds_to_nearest_even():
    got = bfloat16.narrow_array(np.array([1.00390625, 1.01171875, -1.00390625], np.float64))
    np.testing.assert_array_equal(got.astype(np.float32), np.array([1.0, 1.015625, -1.0], np.float32))


def test_the_operator_keeps_its_name_in_a_functions_text():
    """The schedule database keys kernels by meaning: text must tell a narrowing kernel from another."""
    from tvm import te

    data = te.placeholder((4,), "float32", name="data")
    out: Any = te.compute((4,), lambda i: bfloat16.narrow(data[i]), name="out")
    func = te.create_prim_func([data, out])
    assert "narrow_bfloat16" in func.script(show_meta=False)
