"""Matrix products: shapes that no tile divides, every decision of the space, threads, AVX2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import matmul_blocked
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import TARGET, agree, close, compiled, model, node, reference, sum_tolerance, uniform

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
    from graphopt.targets.relax.operators import pack_matrix

    nest = matmul_blocked.blocking(64, 50, 1700, {"rows": 8, "vectors": 3}, 16)
    stored = matmul_blocked.repack(pack_matrix(matrix, 64), 64, nest)
    assert stored.shape == (nest.chunks, nest.panels, nest.panel_elements)
    assert np.count_nonzero(stored) == matrix.size
    piece = stored[1, 1].reshape(nest.piece, nest.width)
    np.testing.assert_array_equal(piece[5, :2], matrix[nest.piece + 5, nest.width : nest.width + 2])
