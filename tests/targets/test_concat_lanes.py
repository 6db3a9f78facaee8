"""Concatenations whose parts end within a channel block, in both precisions; elements only move, so all is exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import bfloat16, pipeline
from tests.targets.oracle import compiled, model, node, reference, uniform

PRECISIONS = [
    pytest.param("float32"),
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(
            not {"avx512_bf16", "amx_bf16"} & capabilities.host_features(),
            reason="this processor has no bfloat16 instructions",
        ),
    ),
]


def joined(batch: int, channels, size):
    """Each part is max(x_i, 0), blocked by a pooling of one position; then they are put one behind the other."""
    feeds = {
        f"x{i}": bfloat16.narrow_array(uniform(i, batch, c, *size)).astype(np.float32) for i, c in enumerate(channels)
    }
    nodes = [node("MaxPool", [name], [f"m{name}"], kernel_shape=[1, 1]) for name in feeds]
    nodes.append(node("Concat", [f"m{name}" for name in feeds], ["c"], axis=1))
    nodes.append(node("MaxPool", ["c"], ["y"], kernel_shape=[1, 1]))
    return model(nodes, feeds, ["y"]), feeds


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.lists(st.sampled_from([4, 8, 12, 16, 20, 24, 32, 48, 64, 112]), min_size=2, max_size=4),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_parts_keep_their_elements(precision, batch, channels, size):
    made, feeds = joined(batch, channels, size)
    found = compiled(made, feeds, Cpu(threads=1, precision=precision))
    np.testing.assert_array_equal(found["y"], reference(made, feeds)["y"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pieces_move_without_leaving_blocked_form(precision):
    made, _ = joined(1, [12, 20, 8], (5, 5))  # the first part ends within a block of 8 as of 16
    names = list(pipeline.prim_funcs(Cpu(threads=1, precision=precision).lower(made).module))
    assert any("concat_lanes" in name for name in names)
    assert sum("unblock_channels" in name for name in names) == 1  # the model's output


def test_a_part_may_come_twice():
    feeds = {"x": uniform(1, 1, 24, 3, 3)}
    nodes = [node("MaxPool", ["x"], ["m"], kernel_shape=[2, 2]), node("Concat", ["m", "m"], ["y"], axis=1)]
    made = model(nodes, feeds, ["y"])
    np.testing.assert_array_equal(compiled(made, feeds)["y"], reference(made, feeds)["y"])
