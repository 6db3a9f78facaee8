"""What a fused function does to its anchor's result, as one expression that a template can place where it wants.

A template that writes its own loops takes the elementwise blocks after the anchor (bias, activation, residual, the
rounding to a narrower type) from here, inlined into one value of the output's indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.targets.schedules.workload import Workload, new_schedule, nodes


@dataclass(frozen=True)
class Epilogue:
    """`output[indices] = value`, where `value` loads the anchor's result at the same indices."""

    output: Any
    """The function's output parameter."""
    variables: tuple[Any, ...]
    value: Any
    anchor: Any
    """The buffer the anchor writes; the output itself where nothing follows the anchor."""

    @property
    def index_dtype(self) -> str:
        return str(self.variables[0].ty.dtype)

    def at(self, indices: Sequence[Any], result: Any, renamed: Sequence[tuple[Any, Any]]) -> Any:
        """The value at `indices`, with `result` for the anchor's and buffers replaced pairwise."""
        import tvm_ffi
        from tvm.ir import Var
        from tvm.ir.expr import TensorLoad

        places = [*zip(self.variables, indices, strict=True), *renamed]

        def place(variable):
            return next((new for old, new in places if variable.same_as(old)), variable)

        def load(value):
            return result if value.source.same_as(self.anchor) else value

        with_result = tvm_ffi.structural_map(self.value, (TensorLoad, load))
        return tvm_ffi.structural_map(with_result, (Var, place))


def epilogue_of(workload: Workload, anchor: str) -> Epilogue | None:
    """The chain after the block `anchor`; None where it is not elementwise over the anchor's shape."""
    from tvm import tirx
    from tvm.ir.expr import TensorLoad
    from tvm.s_tir.schedule import ScheduleError

    names = list(workload.blocks)
    after = names[names.index(anchor) + 1 :]
    block = workload.blocks[anchor]
    source: Any = block.writes[0].source
    if not after:
        variables = tuple(v.var for v in block.iter_vars if int(v.iter_type) == 0)
        return Epilogue(source, variables, tirx.BufferLoad(source, list(variables)), source)
    schedule = new_schedule(workload.func)
    try:
        for name in after[:-1]:
            schedule.compute_inline(schedule.get_sblock(name))
    except ScheduleError:
        return None  # a reduction, or something read in a way that inlining does not know
    last = schedule.get(schedule.get_sblock(after[-1]))
    store: Any = last.body
    variables = tuple(v.var for v in last.iter_vars)
    if not isinstance(store, tirx.BufferStore) or last.init is not None or not _are(store.indices, variables):
        return None
    loads = [load for load in nodes(store.value, TensorLoad) if load.source.same_as(source)]
    output: Any = store.buffer
    shape = [int(d) for d in output.ty.shape]
    if not loads or shape != [int(d) for d in source.ty.shape] or not all(_are(x.indices, variables) for x in loads):
        return None
    return Epilogue(output, variables, store.value, source)


def _are(indices: Sequence[Any], variables: Sequence[Any]) -> bool:
    return len(indices) == len(variables) and all(i.same_as(v) for i, v in zip(indices, variables, strict=True))
