"""Attention in one kernel, on rows in blocks and not, against ONNX Runtime; q, k and v as one product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import attention
from graphopt.targets.schedules.workload import Workload
from tests.targets.integer_models import integer_weight, quantized
from tests.targets.oracle import (
    EPSILON,
    TARGET,
    agree,
    close,
    compiled,
    model,
    node,
    reference,
    sum_tolerance,
    uniform,
)

CASES = settings(max_examples=14, deadline=None)
AVX2 = Cpu(mcpu="x86-64-v3", threads=1)
MASKED = float(np.finfo(np.float32).min)


def mask_of(kind: str, batch: int, heads: int, rows: int, columns: int) -> np.ndarray | None:
    """No key is masked for all queries."""
    rng = np.random.default_rng(7)
    if kind == "none":
        return None
    if kind == "padded":
        mask = np.zeros((batch, 1, 1, columns), np.float32)
        mask[:, :, :, max(1, columns // 2) :] = MASKED
        return mask
    if kind == "of two axes":
        return rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    mask = rng.uniform(-1, 1, (batch, heads, rows, columns)).astype(np.float32)
    mask[:, :, :, 1:][rng.random((batch, heads, rows, columns - 1)) < 0.3] = -np.inf
    return mask


def written(
    batch: int, heads: int, rows: int, columns: int, sizes: tuple[int, int], mask: str, form: str, scale: float = 0.0
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """`three`: Attention on three axes; `four`: between Reshapes and Transposes. sizes: of a head of q and of v."""
    size, width = sizes
    feeds = {
        "q": uniform(1, batch, rows, heads * size) * 3,
        "k": uniform(2, batch, columns, heads * size) * 3,
        "v": uniform(3, batch, columns, heads * width),
    }
    array = mask_of(mask, batch, heads, rows, columns)
    masks = [] if array is None else ["m"]
    if array is not None:
        feeds["m"] = array
    how = {"scale": scale} if scale else {}
    nodes, constants = [], {}
    if mask == "padded":  # ONNX Runtime does not broadcast over queries
        nodes, constants = [node("Expand", ["m", "e"], ["me"])], {"e": np.array([batch, 1, rows, columns])}
        masks = ["me"]
    if form == "three":
        made = [*nodes, node("Attention", ["q", "k", "v", *masks], ["y"], q_num_heads=heads, kv_num_heads=heads, **how)]
        return model(made, feeds, ["y"], constants, opset=23), feeds
    constants |= {"s": np.array([0, 0, heads, -1]), "j": np.array([0, 0, -1])}
    for name in ("q", "k", "v"):
        nodes += [node("Reshape", [name, "s"], [name + "r"]),
                  node("Transpose", [name + "r"], [name + "t"], perm=[0, 2, 1, 3])]  # fmt: skip
    nodes += [node("Attention", ["qt", "kt", "vt", *masks], ["a"], **how),
              node("Transpose", ["a"], ["t"], perm=[0, 2, 1, 3]), node("Reshape", ["t", "j"], ["y"])]  # fmt: skip
    return model(nodes, feeds, ["y"], constants, opset=23), feeds


def tolerance(size: int, columns: int) -> float:
    """An error of a score is a relative one of all shares; scores are sums of `size` products of up to 9."""
    return 9 * size * sum_tolerance(size) / 8 + sum_tolerance(columns) + 8 * EPSILON


@CASES
@given(
    batch=st.sampled_from([1, 1, 2]),
    heads=st.integers(1, 3),
    rows=st.sampled_from([1, 3, 4, 15, 16, 17, 31, 33, 50]),
    columns=st.sampled_from([1, 2, 5, 13, 16, 29, 64]),
    sizes=st.sampled_from([(16, 16), (32, 32), (48, 16), (16, 80), (64, 64)]),
    mask=st.sampled_from(["none", "padded", "of two axes", "whole"]),
    form=st.sampled_from(["three", "four"]),
    scale=st.sampled_from([0.0, 0.3]),
)
def test_float32(batch, heads, rows, columns, sizes, mask, form, scale):
    made, feeds = written(batch, heads, rows, columns, sizes, mask, form, scale)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert any("attention" in name for name in names) == (TARGET.machine().lanes in (8, 16)), names
    agree(made, feeds, tolerance(sizes[0], columns))


@pytest.mark.skipif(not capabilities.host_features() >= AVX2.features, reason="this processor lacks AVX2")
@pytest.mark.parametrize("rows,columns", [(5, 9), (40, 23)])
def test_eight_lanes_and_two_threads(rows, columns):
    made, feeds = written(2, 2, rows, columns, (24, 8), "padded", "three")
    agree(made, feeds, tolerance(24, columns), AVX2)
    agree(made, feeds, tolerance(24, columns), Cpu(mcpu="x86-64-v3", threads=2))


@pytest.mark.parametrize("rows,columns", [(20, 37), (70, 70)])
def test_every_decision_computes_the_same(rows, columns):
    made, feeds = written(1, 2, rows, columns, (32, 32), "padded", "four")
    lowered = TARGET.lower(made)
    (name,) = (n for n in pipeline.prim_funcs(lowered.module) if "attention" in n)
    workload = Workload(pipeline.prim_funcs(lowered.module)[name].with_attr("global_symbol", "main"), TARGET.machine())
    choices = [c for c in schedules.choices(workload) if c.template == attention.NAME]
    assert len(choices) >= 3
    wanted = reference(made, feeds)
    for choice in choices:
        found = compiled(made, feeds, decisions={name: (choice.template, choice.decision)})
        close(found, wanted, tolerance(32, columns))


def test_forms_that_the_kernel_does_not_have_are_written_out():
    for made, feeds in (written(1, 2, 5, 7, (12, 12), "none", "three"), written(1, 2, 5, 7, (16, 5), "padded", "four")):
        names = list(pipeline.prim_funcs(TARGET.lower(made).module))
        assert not any("attention" in name for name in names), names
        agree(made, feeds, tolerance(16, 7))


@pytest.mark.parametrize("stored", ["bytes", "float32"])
@pytest.mark.parametrize("rows", [3, 16, 21])
def test_products_of_the_same_rows_become_one(stored, rows):
    heads, size, depth = 2, 32, 48
    rng = np.random.default_rng(rows)
    feeds = {"x": uniform(5, 1, rows, depth), "m": mask_of("padded", 1, heads, rows, rows)}
    nodes, constants = [], {}
    source = "x"
    if stored == "bytes":
        nodes, constants = quantized("x", 2 / 255, 128)
        source = "xd"
    for name in ("q", "k", "v"):
        weight = rng.uniform(-1, 1, (depth, heads * size)).astype(np.float32) / 4
        constants[f"{name}b"] = rng.uniform(-1, 1, heads * size).astype(np.float32)
        if stored == "bytes":
            made, held = integer_weight(name + "w", weight, 1)
            nodes.append(made)
            constants.update(held)
        else:
            constants[name + "wd"] = weight
        nodes += [node("MatMul", [source, name + "wd"], [name + "p"]),
                  node("Add", [name + "p", name + "b"], [name])]  # fmt: skip
    constants["e"] = np.array([1, 1, rows, rows])
    nodes += [node("Expand", ["m", "e"], ["me"]),
              node("Attention", ["q", "k", "v", "me"], ["y"], q_num_heads=heads, kv_num_heads=heads)]  # fmt: skip
    whole = model(nodes, feeds, ["y"], constants, opset=23)
    lowered = TARGET.lower(whole)
    products = [n for n in pipeline.prim_funcs(lowered.module) if "conv2d" in n or "matmul" in n]
    assert len(products) == 1, products
    assert "MatMul_qp" in [layer for _, layer in lowered.layers]
    agree(whole, feeds, tolerance(size, rows) + 4 * sum_tolerance(depth))


def test_bytes_go_in_and_bytes_come_out():
    """The quantized output is stored by the attention's own kernel, and read by the product behind it."""
    heads, size, rows = 2, 16, 19
    feeds = {name: uniform(i, 1, rows, heads * size) for i, name in enumerate("qkv")}
    pair, constants = quantized("a", 2 / 255, 128)
    weight, held = integer_weight("w", uniform(9, heads * size, 24), 1)
    nodes = [node("Attention", ["q", "k", "v"], ["a"], q_num_heads=heads, kv_num_heads=heads), *pair, weight,
             node("MatMul", ["ad", "wd"], ["y"])]  # fmt: skip
    made = model(nodes, feeds, ["y"], {**constants, **held}, opset=23)
    lowered = TARGET.lower(made)
    names = list(pipeline.prim_funcs(lowered.module))
    assert any("attention" in name and "quantize" in name for name in names), names
    assert not any("dequantize" in name or "block_rows" in name.replace("unblock", "") for name in names), names
    (wanted,), (found,) = reference(made, feeds).values(), compiled(made, feeds).values()
    assert np.abs(found - wanted).max() <= 3 * 2 / 255  # a few numbers at ties
    assert np.median(np.abs(found - wanted)) <= 1e-5


def test_a_row_that_may_look_at_nothing_looks_at_all_alike():
    made, feeds = written(1, 1, 3, 4, (16, 16), "padded", "three")
    feeds["m"][:] = MASKED
    found = compiled(made, feeds)["y"]
    assert np.abs(found - feeds["v"].mean(axis=1, keepdims=True)).max() <= 1e-5


@pytest.mark.parametrize("sizes", [(16, 16), (12, 12)])
@pytest.mark.parametrize("columns", [4, 7])
def test_a_row_that_is_masked_by_infinity_is_zero(sizes, columns):
    """In the kernel and written out, as in ONNX Runtime."""
    made, feeds = written(2, 2, 3, columns, sizes, "padded", "three")
    feeds["m"][0] = -np.inf
    feeds["m"][1, ..., 1:] = -np.inf
    agree(made, feeds, tolerance(sizes[0], columns))
    assert (compiled(made, feeds)["y"][0] == 0).all()
