"""The loop nest of a convolution of bytes, whose products are dot products of quads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from graphopt.targets.relax import own_operators
from graphopt.targets.relax.integer_computes import START
from graphopt.targets.schedules import dot
from graphopt.targets.schedules.conv2d_loops import ConvolutionLoops, Step
from graphopt.targets.schedules.loops import sequence
from graphopt.targets.schedules.workload import Kernel, Repack, Workload

ANCHOR = "conv2d_int8"
HALVED = {"words": "int16", "smlal": "int8", "smull": "int8"}
"""Ways that read the two halves of a quad's weights apart, and their type."""


class IntegerLoops(ConvolutionLoops):
    """The nest of a convolution whose products are dot products of quads."""

    ANCHOR = ANCHOR
    SUM = "int32"
    START = START

    def __init__(self, workload: Workload):
        super().__init__(workload)
        way = dot.way(workload.machine, self.block)
        assert way is not None
        self.way: dot.Way = way
        self.weight_bytes = dot.QUAD * (2 if way == "words" else 1)
        if way in dot.ARM_WAYS:
            self.at_once = next(n for n in (4, 2, 1) if self.window.in_lanes % n == 0)

    @property
    def result_lanes(self) -> int:
        """On ARM a whole block: bytes of four lanes would be stored four at a time."""
        return self.lanes * self.vectors if self.way in dot.ARM_WAYS else self.lanes

    def kernel(self, rows: int, columns: int, outs: int, **how: Any) -> Kernel:
        """The function that `write` writes, with the weight in the form that its products want."""
        from tvm import tirx

        index = next(i for i, param in enumerate(self.func.params) if param.same_as(self.weight))
        rewritten = self.rewritten_weight()
        if rewritten is not None:
            self.weight = rewritten[0]
        func = self.write(rows, columns, outs, **how)
        if self.way in dot.DEFINITIONS:
            func = func.with_body(own_operators.importing(func.body, [dot.DEFINITIONS[self.way]]))
        if rewritten is None:
            return Kernel(func)
        params = list(func.params)
        params[index], repack = rewritten
        return Kernel(tirx.PrimFunc(params, func.body, attrs=func.attrs), {index: repack})

    def rewritten_weight(self) -> tuple[Any, Repack] | None:
        """For ways of HALVED: the parameter that takes the weight's place, and how its content is made."""
        from tvm import tirx

        if self.way not in HALVED:
            return None
        *lead, quads = (int(d) for d in self.weight.shape)
        halves = tirx.decl_buffer((*lead, 2, quads // 2), HALVED[self.way], "weight")
        return halves, dot.as_words if self.way == "words" else dot.as_pairs

    def _products(self, step: Step, sums: Any, cell: Callable[..., Any]) -> Any:
        from tvm import tirx

        if self.way in dot.ARM_WAYS:
            return self._several(step, sums, cell)
        one = tirx.const(1, "int32")
        wide: Any = self.lanes
        stores = []
        for row in step.rows.outputs:
            for column in step.columns.outputs:
                *at, quad = self._read(step, row, column)
                spread = dot.quad_at(self.data, tuple(at), quad)
                for out in range(step.outs):
                    for vector in range(self.vectors):
                        place = tirx.Ramp(tirx.const(cell(out, row, column, vector, 0), "int32"), one, wide)
                        weights = self._weights(step, out, vector)
                        total = dot.products(self.way, self.lanes, sums[place], spread, weights)
                        stores.append(tirx.BufferStore(sums, total, [place]))
        return sequence(stores)

    def _several(self, step: Step, sums: Any, cell: Callable[..., Any]) -> Any:
        """`at_once` quads: they are loaded together, and each is a lane of its register."""
        from tvm import tirx

        one = tirx.const(1, "int32")
        wide: Any = self.lanes
        first = step.lane * self.at_once
        statements, loaded = [], {}
        for row in step.rows.outputs:
            for column in step.columns.outputs:
                *at, _ = self._read(step, row, column)
                quads = dot.quads_at(self.data, tuple(at), first, self.at_once)
                loaded[row, column] = tirx.Var(f"quads{len(loaded)}", f"{quads.ty.dtype}")
                statements.append(tirx.Bind(loaded[row, column], quads))
        for lane in range(self.at_once):
            now = replace(step, lane=first + lane)
            for out in range(step.outs):
                for vector in range(self.vectors):
                    weights = self._weights(now, out, vector)
                    for (row, column), quads in loaded.items():
                        place = tirx.Ramp(tirx.const(cell(out, row, column, vector, 0), "int32"), one, wide)
                        quad = dot.quad_of(self.way, quads, lane)
                        total = dot.products(self.way, self.lanes, sums[place], quad, weights)
                        statements.append(tirx.BufferStore(sums, total, [place]))
        return sequence(statements)

    def _weights(self, step: Step, out: int, vector: int) -> list[Any]:
        """The weights of one vector of outputs: one vector, or one of each half of the quads."""
        from tvm import tirx

        halves = 2 if self.way in HALVED else 1
        each = dot.QUAD // halves
        width: Any = each * self.lanes
        *at, first = self._weighed(step, out, vector * self.lanes)
        place = tirx.Ramp(tirx.const(first * each, "int32"), tirx.const(1, "int32"), width)
        parts = [[]] if halves == 1 else [[tirx.const(half, "int32")] for half in range(halves)]
        return [tirx.BufferLoad(self.weight, [*at, *part, place]) for part in parts]
