"""Matrix products: shapes that no tile divides, every decision of the space, threads, AVX2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import batch_matmul, matmul_blocked
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import EPSILON, TARGET, agree, close, compiled, model, node, reference, sum_tolerance, uniform

CASES = settings(max_examples=12, deadline=None, derandomize=True)
LEADS = st.sampled_from([(2,), (7,), (13,), (31,), (2, 5), (197,), (3, 1, 4), (1, 2, 3, 5)])


def gemm_model(lead, depth, columns, chain=()):
    """x (lead, K) times a constant (K, N), a bias, and elementwise nodes."""
    x = uniform(1, *lead, depth)
    constants = {"w": uniform(2, depth, columns), "b": uniform(3, columns)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["s0"])]
    for i, op in enumerate(chain):
        nodes.append(node(op, [f"s{i}"], [f"s{i + 1}"]))
    return model(nodes, {"x": x}, [f"s{len(chain)}"], constants), {"x": x}


def kernels_of(made, target=TARGET):
    """The workloads of the model's kernels that blocked products match, by name, with their spaces."""
    lowered = target.lower(made)
    found = {}
    for name, func in pipeline.prim_funcs(lowered.module).items():
        workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
        space = matmul_blocked.match(workload)
        if space:
            found[name] = (workload, space)
    return found


@CASES
@given(lead=LEADS, depth=st.integers(1, 70), columns=st.integers(1, 150), relu=st.booleans())
def test_rows_times_a_constant(lead, depth, columns, relu):
    made, feeds = gemm_model(lead, depth, columns, ("Relu",) if relu else ())
    agree(made, feeds, sum_tolerance(depth + 1))


@pytest.mark.parametrize(("lead", "depth", "columns"), [((2, 23), 33, 50), ((40,), 1700, 100), ((600,), 900, 18)])
def test_every_decision_gives_the_same(lead, depth, columns):
    """Pieces of the common axis (K over 800), bands of rows, and all tile shapes."""
    made, feeds = gemm_model(lead, depth, columns, ("Relu",))
    wanted = reference(made, feeds)
    found = kernels_of(made)
    assert found
    for name, (_, space) in found.items():
        for decision in space:
            close(
                compiled(made, feeds, decisions={name: (matmul_blocked.NAME, decision)}),
                wanted,
                sum_tolerance(depth + 1),
            )


def test_two_threads():
    made, feeds = gemm_model((61,), 1000, 150, ("Sigmoid",))
    agree(made, feeds, sum_tolerance(1001), Cpu(threads=2))


@pytest.mark.skipif(
    not capabilities.host_features() >= Cpu(mcpu="x86-64-v3").features, reason="this processor lacks AVX2"
)
@CASES
@given(lead=LEADS, depth=st.integers(1, 70), columns=st.integers(1, 90))
def test_eight_lanes(lead, depth, columns):
    made, feeds = gemm_model(lead, depth, columns, ("Relu",))
    agree(made, feeds, sum_tolerance(depth + 1), Cpu(mcpu="x86-64-v3", threads=1))


def test_gemm_with_factors():
    x = uniform(1, 19, 21)
    constants = {"w": uniform(2, 37, 21), "b": uniform(3, 37)}
    gemm = node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0, transB=1)
    agree(model([gemm], {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(22))


def test_repacked_weight_keeps_every_element():
    matrix = np.arange(1.0, 1 + 1700 * 50, dtype=np.float32).reshape(1700, 50)
    from graphopt.targets.relax.products import pack_matrix

    nest = matmul_blocked.blocking(64, 50, 1700, {"rows": 8, "vectors": 3}, 16)
    stored = matmul_blocked.repack(pack_matrix(matrix, 64), 64, nest)
    assert stored.shape == (nest.chunks, nest.panels, nest.panel_elements)
    assert np.count_nonzero(stored) == matrix.size
    piece = stored[1, 1].reshape(nest.piece, nest.width)
    np.testing.assert_array_equal(piece[5, :2], matrix[nest.piece + 5, nest.width : nest.width + 2])


# ---- products of activations


@CASES
@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    rows=st.sampled_from([1, 2, 13, 37]),
    depth=st.sampled_from([1, 3, 16, 21]),
    columns=st.sampled_from([1, 5, 16, 33, 50]),
    transposed=st.booleans(),
    shared=st.booleans(),
)
def test_activations(batch, rows, depth, columns, transposed, shared):
    a = uniform(1, *batch, rows, depth)
    lead = () if shared else batch
    b = uniform(2, *lead, *((columns, depth) if transposed else (depth, columns)))
    nodes, right = [], "b"
    if transposed:
        rank = b.ndim
        perm = [*range(rank - 2), rank - 1, rank - 2]
        nodes, right = [node("Transpose", ["b"], ["t"], perm=perm)], "t"
    nodes.append(node("MatMul", ["a", right], ["y"]))
    agree(model(nodes, {"a": a, "b": b}, ["y"]), {"a": a, "b": b}, sum_tolerance(depth))


def attention(tokens=23, heads=3, width=8):
    """Attention as exporters write it: one product gives queries, keys and values, split by Reshape and Gather."""
    x = uniform(1, tokens, 1, heads * width)
    constants = {
        "w": uniform(2, heads * width, 3 * heads * width),
        "s5": np.array([tokens, 1, 3, heads * width]),
        "zero": np.array(0), "one": np.array(1), "two": np.array(-1),
        "s3": np.array([tokens, heads, width]), "s4": np.array([1, heads, tokens, width]),
        "scale": np.float32(width**-0.25), "back": np.array([tokens, heads * width]), "ax0": np.array([0]),
        "ax3": np.array([-2]),
    }  # fmt: skip
    nodes = [
        node("MatMul", ["x", "w"], ["p"]),
        node("Reshape", ["p", "s5"], ["r"]),
        node("Unsqueeze", ["r", "ax0"], ["u"]),
        node("Transpose", ["u"], ["t"], perm=[3, 1, 2, 0, 4]),
        node("Squeeze", ["t", "ax3"], ["v"]),
    ]
    for name, index in (("q", "zero"), ("k", "one"), ("o", "two")):
        nodes += [
            node("Gather", ["v", index], [f"{name}0"], axis=0),
            node("Reshape", [f"{name}0", "s3"], [f"{name}1"]),
            node("Transpose", [f"{name}1"], [f"{name}2"], perm=[1, 0, 2]),
            node("Reshape", [f"{name}2", "s4"], [f"{name}3"]),
        ]
    nodes += [
        node("Transpose", ["k3"], ["kt"], perm=[0, 1, 3, 2]),
        node("Mul", ["q3", "scale"], ["qs"]),
        node("Mul", ["kt", "scale"], ["ks"]),
        node("MatMul", ["qs", "ks"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "o3"], ["mixed"]),
        node("Transpose", ["mixed"], ["m"], perm=[2, 0, 1, 3]),
        node("Reshape", ["m", "back"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


@pytest.mark.parametrize("target", [TARGET, Cpu(threads=2)], ids=str)
def test_attention(target):
    made, feeds = attention()
    agree(made, feeds, sum_tolerance(24) * 8, target)


def test_attention_moves_only_its_result():
    """Queries, keys and values are read where the first product left them."""
    made, _ = attention()
    names = [name for name in pipeline.call_counts(TARGET.lower(made).module) if not name.startswith("reshape")]
    assert sorted(names) == ["batch_matmul", "batch_matmul1", "fused_reshape3_transpose_reshape4", "matmul", "softmax"]


def test_strided_values_with_other_readers():
    """A transposed value is copied once for whoever needs it in its own layout."""
    x = uniform(1, 5, 7, 6)
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[2, 0, 1]),
        node("Relu", ["t"], ["a"]),
        node("Transpose", ["t"], ["u"], perm=[1, 0, 2]),
        node("Gather", ["u", "i"], ["g"], axis=1),
        node("Mul", ["t", "c"], ["b"]),
        node("Reshape", ["t", "s"], ["r"]),
    ]
    constants = {"i": np.array(-2), "c": np.float32(1.5), "s": np.array([42, 5])}
    agree(model(nodes, {"x": x}, ["a", "u", "g", "b", "r", "t"], constants), {"x": x}, 2 * EPSILON)


def test_batched_products_are_exact_for_every_decision():
    a, b = uniform(1, 2, 29, 40), uniform(2, 2, 40, 51)
    made = model([node("MatMul", ["a", "b"], ["p"]), node("Relu", ["p"], ["y"])], {"a": a, "b": b}, ["y"])
    feeds = {"a": a, "b": b}
    ((name, func),) = [f for f in pipeline.prim_funcs(TARGET.lower(made).module).items() if "batch" in f[0]]
    space = batch_matmul.match(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))
    assert space
    for decision in space:
        found = compiled(made, feeds, decisions={name: (batch_matmul.NAME, decision)})
        close(found, reference(made, feeds), sum_tolerance(40))
