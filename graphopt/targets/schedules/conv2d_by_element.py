"""The loops of a direct convolution on a machine that multiplies by one element of a vector (`by_element`).

`conv2d_loops` with another inside: four input channels of a pixel are loaded as one vector, and the weight is stored in
the order in which tiles read it, [tile of outputs][panel][kh][kw][in-block][in-lane][output], so that a step reads one
stretch of memory, in pairs of vectors. Since weights of one tile follow those of another in a single stream, which
hardware sees by itself, nothing is requested ahead.

Loop order of a tile: kh, kw, in-block / in-lane, outputs, positions; the last three are unrolled. In-blocks are
innermost because there are many: a short loop would be unrolled, and its loads kept over it and spilled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.conv2d_loops import ConvolutionLoops, Step, Tap, Window
from graphopt.targets.schedules.loops import loop, loop_from, sequence
from graphopt.targets.schedules.register_tiles import Run
from graphopt.targets.schedules.workload import Kernel, Machine, Workload


def applies(window: Window, machine: Machine) -> bool:
    """Whether this machine multiplies by an element, and blocks of channels are such vectors."""
    lanes = by_element.LANES
    return by_element.has(machine) and window.in_lanes % lanes == 0 and window.out_lanes % lanes == 0


def reads_constants(workload: Workload, block) -> bool:
    """Whether data and weight are float32, and the weight is a parameter: it must be stored in another order."""
    params = list(workload.func.params)
    sources = [r.source for r in block.reads]
    weight = next((each for each in sources if len(each.ty.shape) == 6), None)
    stored = weight is not None and any(weight.same_as(each) for each in params)
    return stored and all(str(each.ty.dtype) == "float32" for each in sources)


class ByElementLoops(ConvolutionLoops):
    """`write` as its base does, then `kernel` for the function and the order of its weight."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        from tvm import tirx

        window = self.window
        self.given = self.weight
        self.place = next(i for i, p in enumerate(workload.func.params) if p.same_as(self.given))
        elements = window.groups * window.out_blocks * window.taps * window.out_lanes
        self.packed = tirx.decl_buffer((elements,), "float32", "weight")

    def kernel(self, rows: int, columns: int, outs: int, *, panel: int, order: str, parallel: bool) -> Kernel:
        from tvm import tirx

        func = self.write(rows, columns, outs, panel=panel, order=order, parallel=parallel, ahead=False)
        params = list(func.params)
        params[self.place] = self.packed
        func = tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
        sizes = [run.size for run in self.out_runs(outs) for _ in range(run.count)]
        repack = partial(packed_weight, groups=self.window.groups, sizes=sizes, panel=panel)
        return Kernel(func, {self.place: repack})

    def _accumulation(self, place, rows: Run, columns: Run, outs: int, plan, sums, cell: Callable[..., Any]) -> Any:
        window = self.window
        width = outs * window.out_lanes
        first = (place.group * window.out_blocks + place.out) * (window.taps * window.out_lanes)
        taps = window.rows.kernel * window.columns.kernel
        first = first + place.panel * (plan.panel * taps * window.in_lanes * width)

        def at_tap(a: Tap, b: Tap) -> Any:
            tap = a.tap * window.columns.kernel + b.tap

            def at_block(ico) -> Any:
                start = first + (tap * plan.panel + ico) * (window.in_lanes * width)
                step = Step(place, a, b, outs, place.panel * plan.panel + ico, 0)
                return self._step(step, start, width, sums, cell)

            return loop("ico", plan.panel, at_block)

        statements = []
        for a in rows.taps:
            for b in columns.taps:

                def at_kh(i, a=a, b=b) -> Any:
                    return loop(
                        "kw", b.count, lambda j: at_tap(Tap(a.first + i, a.outputs), Tap(b.first + j, b.outputs))
                    )

                if rows.is_clipped:
                    begin, count = window.rows.clipped(place.row)
                    statements.append(loop_from("kh", begin, count, at_kh))
                else:
                    statements.append(loop("kh", a.count, at_kh))
        return sequence(statements)

    def _step(self, step: Step, start: Any, width: int, sums, cell: Callable[..., Any]) -> Any:
        """Add the products of one tap and one block of input channels; `start`: the first weight."""
        from tvm import tirx

        lanes = by_element.LANES
        statements: list[Any] = []

        def held(buffer, at: Sequence[Any]) -> Any:
            variable = tirx.Var("held", f"float32x{lanes}")
            statements.append(tirx.Bind(variable, tirx.BufferLoad(buffer, [*at[:-1], _ramp(at[-1])])))
            return variable

        for part in range(self.window.in_lanes // lanes):
            numbers = {
                (row, column): held(self.data, (*self._read(step, row, column)[:-1], part * lanes))
                for row in step.rows.outputs
                for column in step.columns.outputs
            }
            for element in range(lanes):
                for out in range(step.outs):
                    for vector in range(self.vectors):
                        at = ((part * lanes + element) * step.outs + out) * self.vectors + vector
                        weight = held(self.packed, [start + at * lanes])
                        for (row, column), number in numbers.items():
                            place = _ramp(cell(out, row, column, vector, 0))
                            term = by_element.spread(number, element) * weight
                            statements.append(tirx.BufferStore(sums, sums[place] + term, [place]))
        return sequence(statements)


def _ramp(first: Any) -> Any:
    from tvm import tirx

    start = tirx.const(first, "int32") if isinstance(first, int) else first
    lanes: Any = by_element.LANES
    return tirx.Ramp(start, tirx.const(1, "int32"), lanes)


def packed_weight(weight: np.ndarray, groups: int, sizes: list[int], panel: int) -> np.ndarray:
    """(O, I, kh, kw, in-lane, out-lane) -> flat [group][tile][panel][kh][kw][in-block][in-lane][output][out-lane];
    `sizes`: output blocks of each tile of a group."""
    out_blocks, in_blocks, k_h, k_w, in_lanes, out_lanes = weight.shape
    tiles = []
    for group in range(groups):
        first = group * (out_blocks // groups)
        for size in sizes:
            part = weight[first : first + size]
            part = part.reshape(size, in_blocks // panel, panel, k_h, k_w, in_lanes, out_lanes)
            tiles.append(part.transpose(1, 3, 4, 2, 5, 0, 6).reshape(-1))
            first += size
    return np.ascontiguousarray(np.concatenate(tiles))
