"""One row times a constant weight: every decision, both element types, against ONNX Runtime.

bfloat16 operands are numbers that bfloat16 holds, so what differs is the order of float32 sums alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import bfloat16, pipeline
from graphopt.targets.schedules import matmul_row
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import close, compiled, model, node, reference, sum_tolerance, uniform

CASES = settings(max_examples=12, deadline=None, derandomize=True)
needs_bfloat16 = pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & capabilities.host_features(), reason="this processor has no bfloat16 instructions"
)
NARROWEST = matmul_row.COLUMNS
PRECISIONS = [pytest.param("float32"), pytest.param("bfloat16", marks=needs_bfloat16)]


def product(lead, depth: int, columns: int, activation: str):
    """x (lead, K) times a constant and an addend, both exact in bfloat16."""

    def exact(array):
        return bfloat16.narrow_array(array).astype(np.float32)

    x = exact(uniform(1, *lead, depth))
    constants = {"w": exact(uniform(2, depth, columns)), "b": uniform(3, columns)}
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["s"]), node(activation, ["s"], ["y"])]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


def spaces(made, target: Cpu):
    """This template's decisions, by kernel."""
    found = {}
    for name, func in pipeline.prim_funcs(target.lower(made).module).items():
        workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
        decisions = [c.decision for c in schedules.choices(workload) if c.template == matmul_row.NAME]
        if decisions:
            found[name] = decisions
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@CASES
@given(
    lead=st.sampled_from([(1,), (1, 1), (1, 1, 1)]),
    depth=st.integers(1, 90),
    columns=st.sampled_from([16, 32, 48, 64, 80, 112, 128, 160, 208, 272, 1000]),
    activation=st.sampled_from(["Relu", "Sigmoid", "Identity"]),
    threads=st.sampled_from([1, 2]),
    choice=st.integers(0, 3),
)
def test_rows(precision, lead, depth, columns, activation, threads, choice):
    target = Cpu(threads=threads, precision=precision)
    made, feeds = product(lead, depth, columns, activation)
    found = spaces(made, target)
    assert len(found) == 1
    ((name, decisions),) = found.items()
    decision = decisions[choice % len(decisions)]
    got = compiled(made, feeds, target, {name: (matmul_row.NAME, decision)})
    close(got, reference(made, feeds), sum_tolerance(depth + 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_decision_where_threads_share_the_columns(precision, threads):
    """300 x 1000 is enough work for two threads; the last group of columns overlaps the one before."""
    target = Cpu(threads=threads, precision=precision)
    made, feeds = product((1,), 301, 1000, "Relu")
    wanted = reference(made, feeds)
    ((name, decisions),) = spaces(made, target).items()
    for decision in decisions:
        close(compiled(made, feeds, target, {name: (matmul_row.NAME, decision)}), wanted, sum_tolerance(302))


def test_packed_pairs_hold_the_first_input_in_the_lower_half():
    weight = bfloat16.narrow_array(np.arange(3 * 48, dtype=np.float32).reshape(1, 3, 48))
    packed = matmul_row.pack_weight(weight, 2, 1)
    assert packed.shape == (2, 2, 2, 1, NARROWEST) and packed.dtype == np.uint32
    low, high = (packed << np.uint32(16)).view(np.float32), (packed & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(low[0, 0, 0, 0], np.arange(16))
    np.testing.assert_array_equal(high[0, 1, 0, 0], 48 + np.arange(16, 32))
    np.testing.assert_array_equal(high[1, 1, 1, 0], 0)  # an odd number of inputs ends with a zero
    np.testing.assert_array_equal(low[1, 0, 1, 0], 96 + np.arange(16, 32))  # the last group ends with the columns


def test_several_rows_and_narrow_weights_are_others():
    for lead, columns in (((2,), 64), ((1,), 8)):
        made, _ = product(lead, 40, columns, "Relu")
        assert not spaces(made, Cpu(threads=1))
