"""Small local buffers are on the stack, others in TVM's workspace, and results stay right, in parallel loops too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.targets.relax import stack_buffers
from tests.targets.oracle import TARGET

CALL = "load ptr, ptr @__TVMBackendAllocWorkspace"


def _doubled_sum(vectors: int, scope: str, parallel: bool) -> Any:
    """out = 2 * (data + data), by way of a buffer of `vectors` * 16 float32."""
    from tvm import te

    from graphopt.targets.schedules.workload import new_schedule

    data: Any = te.placeholder((4, vectors, 16), name="data")
    held: Any = te.compute(data.shape, lambda r, i, j: data[r, i, j] + data[r, i, j], name="held")
    out: Any = te.compute(data.shape, lambda r, i, j: held[r, i, j] * np.float32(2), name="out")
    schedule = new_schedule(te.create_prim_func([data, out]))
    schedule.set_scope(schedule.get_sblock("held"), 0, scope)
    row = schedule.get_loops(schedule.get_sblock("out"))[0]
    schedule.compute_at(schedule.get_sblock("held"), row)
    if parallel:
        schedule.parallel(row)
    return schedule.mod


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("vectors", "scope", "on_stack"),
    [(4, "local", True), (32, "local", True), (256, "local", True), (512, "local", False), (64, "global", False)],
)
def test_where_a_buffer_is(vectors, scope, on_stack, parallel):
    import tvm

    stack_buffers.register()
    with TARGET.tvm_target():
        built: Any = tvm.compile(_doubled_sum(vectors, scope, parallel), target=TARGET.tvm_target())
    assert (CALL not in built.mod.inspect_source("ll")) == on_stack
    data = np.random.default_rng(0).uniform(-1, 1, (4, vectors, 16)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros_like(data))
    built.jit()["main"](tvm.runtime.tensor(data), out)
    np.testing.assert_array_equal(out.numpy(), 4 * data)
