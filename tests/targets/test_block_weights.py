"""Weights quantized in blocks: ONNX's DequantizeLinear with a block size, and ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import UnsupportedOperatorError
from graphopt.targets import schedules
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import Workload
from tests.targets.int4_models import built, int4_product
from tests.targets.integer_models import runnable
from tests.targets.oracle import EPSILON, TARGET, compiled, reference, uniform


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8])
@pytest.mark.parametrize(("depth", "block", "axis"), [(64, 32, 0), (48, 16, 0), (64, 64, 0), (40, 8, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_dequantize_linear_with_a_block_size(kind, depth, block, axis, shifted):
    rng = np.random.default_rng(1)
    columns = 24
    low, high = {TensorProto.INT4: (-8, 8), TensorProto.UINT4: (0, 16), TensorProto.INT8: (-128, 128)}[kind]
    shape = [depth, columns]
    blocks = list(shape)
    blocks[axis] //= block
    constants = {
        "w": helper.make_tensor("w", kind, shape, rng.integers(low, high, shape).ravel()),
        "s": numpy_helper.from_array(rng.uniform(0.01, 0.1, blocks).astype(np.float32), "s"),
    }
    if shifted:
        constants["z"] = helper.make_tensor("z", kind, blocks, rng.integers(low, high, blocks).ravel())
    x = uniform(2, 3, depth)
    dequantize = helper.make_node("DequantizeLinear", list(constants), ["wd"], axis=axis, block_size=block)
    made = built([dequantize, helper.make_node("MatMul", ["x", "wd"], ["y"])], x, columns, constants)
    found, wanted = compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"]
    np.testing.assert_allclose(found, wanted, atol=depth * EPSILON * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("depth", "block"), [(64, 32), (96, 32), (80, 16)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_nbits(bits, depth, block, shifted, biased):
    rng = np.random.default_rng(3)
    columns, blocks = 20, depth // block
    x = uniform(4, 2, 5, depth)
    arrays = {
        "w": rng.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8),
        "s": rng.uniform(0.01, 0.1, columns * blocks).astype(np.float32),
    }
    if shifted:
        arrays["z"] = rng.integers(0, 256, columns * -(-blocks * bits // 8)).astype(np.uint8)
    names = ["x", "w", "s", "z" if shifted else "", "", "b" if biased else ""]
    if biased:
        arrays["b"] = rng.standard_normal(columns).astype(np.float32)
    constants = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    product = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=depth, N=columns, bits=bits, block_size=block
    )
    made = built([product], x, columns, constants)
    found, wanted = compiled(made, {"x": x})["y"], reference(made, {"x": x})["y"]
    np.testing.assert_allclose(found, wanted, atol=2 * depth * EPSILON * np.abs(wanted).max(), rtol=0)


def test_groups_by_index_are_refused_by_name():
    x = uniform(4, 2, 32)
    arrays = {"w": np.zeros((4, 1, 16), np.uint8), "s": np.ones(4, np.float32), "g": np.zeros(32, np.int32)}
    constants = {name: numpy_helper.from_array(array, name) for name, array in arrays.items()}
    product = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "", "g"], ["y"], domain="com.microsoft", K=32, N=4, bits=4, block_size=32
    )
    with pytest.raises(UnsupportedOperatorError, match="MatMulNBits"):
        TARGET.lower(built([product], x, 4, constants))


@pytest.mark.parametrize("mcpu", ["cascadelake", "x86-64-v4", "alderlake", "x86-64-v3", "x86-64-v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("is_bytes", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns", "block"), [(1, 64, 48, 32), (3, 96, 20, 16), (1, 256, 128, 128)])
def test_weights_are_unpacked_in_registers(mcpu, symmetric, is_bytes, rows, depth, columns, block):
    """Nibbles times bytes, and times floats: every way to multiply, against float64."""
    target = runnable(mcpu)
    made, feeds, wanted, bound = int4_product(symmetric, is_bytes, rows, depth, columns, block)
    func = next(f for n, f in pipeline.prim_funcs(target.lower(made).module).items() if "int4" in n)
    choices = schedules.choices(Workload(func.with_attr("global_symbol", "main"), target.machine()))
    assert {choice.template for choice in choices} == {"matmul_int4"}
    np.testing.assert_allclose(compiled(made, feeds, target)["y"], wanted, atol=bound, rtol=0)
