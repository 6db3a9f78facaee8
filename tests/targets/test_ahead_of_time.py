"""Runs without the virtual machine: which memory each kernel reads and writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import TargetError
from graphopt.packaging import package
from graphopt.targets.relax import ahead_of_time
from graphopt.targets.relax.ahead_of_time import ALIGNMENT, Plan, Tensor
from tests.packaging.artifacts import artifact
from tests.targets.oracle import TARGET, model, node, uniform


@st.composite
def plans(draw) -> Plan:
    """Random calls on random storages; every storage is used at least once, and some are outputs."""
    sizes = draw(st.lists(st.integers(1, 500), min_size=1, max_size=12))
    inputs = draw(st.integers(0, min(2, len(sizes))))
    tensors = [Tensor(storage, 0, "uint8", (size,)) for storage, size in enumerate(sizes)]
    numbers = st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=4)
    calls = [("kernel", each) for each in draw(st.lists(numbers, min_size=1, max_size=15))]
    calls.append(("kernel", list(range(len(sizes)))) if draw(st.booleans()) else ("kernel", [0]))
    used = sorted({number for _, each in calls for number in each})
    outputs = draw(st.lists(st.sampled_from(used), max_size=3))
    return Plan(tensors[:inputs], tensors, calls, outputs, sizes)


@given(plans())
def test_storages_that_live_at_once_do_not_overlap(plan):
    ahead_of_time._place(plan)
    inputs = set(range(len(plan.inputs)))
    used = {}
    for time, (_, numbers) in enumerate(plan.calls):
        for storage in numbers:
            used.setdefault(storage, []).append(time)
    lives = {storage: (min(times), max(times)) for storage, times in used.items()}
    for storage in inputs:
        lives[storage] = (0, len(plan.calls))
    for storage in set(plan.outputs):
        lives[storage] = (lives[storage][0], len(plan.calls))
    for one, (begin, end) in lives.items():
        assert plan.places[one] % ALIGNMENT == 0
        assert plan.places[one] + plan.sizes[one] <= plan.arena_bytes
        for other, (other_begin, other_end) in lives.items():
            if one < other and begin <= other_end and other_begin <= end:
                first, second = sorted((one, other), key=lambda each: plan.places[each])
                assert plan.places[first] + plan.sizes[first] <= plan.places[second]
    assert plan.arena_bytes <= sum(-(-size // ALIGNMENT) * ALIGNMENT for size in plan.sizes)


def test_memory_is_used_again(tmp_path):
    """Of a chain of ten equal layers three values live at once: the input, and what a layer reads and writes."""
    feeds = {"x": uniform(1, 1, 16, 20, 20)}
    nodes = [node("Conv", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"], pads=[1, 1, 1, 1]) for i in range(10)]
    net = model(nodes, feeds, ["h10"], {"w": uniform(2, 16, 16, 3, 3)})
    plan = TARGET.build_objects(TARGET.lower(net), tmp_path)
    assert len(plan.calls) >= 10 and plan.arena_bytes <= 4 * feeds["x"].nbytes
    # Ten layers share one weight; Winograd keeps 36 numbers for each 9.
    assert (tmp_path / "constants.o").stat().st_size < 16 * 16 * 36 * 4 + 4096


def test_types_of_tensors():
    assert ahead_of_time.dtype_code("bfloat16") == (4, 16) and ahead_of_time.dtype_code("bool") == (6, 8)
    assert Tensor(0, 0, "float32", (2, 3)).nbytes == 24 and Tensor(0, 0, "int8", ()).nbytes == 1
    with pytest.raises(TargetError, match="no tensors of float8"):
        ahead_of_time.dtype_code("float8_e4m3fn")


def test_what_needs_the_virtual_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_CHECKS", ())
    feeds = {"x": np.ones((2, 3), np.float32)}
    folder = artifact(tmp_path / "artifact", model([node("Relu", ["x"], ["y"])], feeds, ["y"]), "cpu")
    with pytest.raises(TargetError, match=r"a static executable has no \S+, which this model calls"):
        package(folder, tmp_path / "package", "c-static")
    assert not (tmp_path / "package").exists()
