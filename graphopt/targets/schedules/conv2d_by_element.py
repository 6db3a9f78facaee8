"""The loops of a direct convolution on a machine that multiplies by one element of a vector (`by_element`).

`conv2d_loops` with another inside: four input channels of a pixel are loaded as one vector, and the weight is stored in
the order in which tiles read it, [tile of outputs][panel][kh][kw][in-block][in-lane][output], so that a step reads one
stretch of memory, in pairs of vectors. Since weights of one tile follow those of another in a single stream, which
hardware sees by itself, nothing is requested ahead.

A picture comes in planes: there the numbers that a tile reads of a row are loaded four at a time, once for all taps.

Loop order of a tile: kh, kw, in-block / in-lane, outputs, positions; the last three are unrolled. In-blocks are
innermost because there are many: a short loop would be unrolled, and its loads kept over it and spilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.conv2d_loops import ConvolutionLoops, Step, Tap, Window
from graphopt.targets.schedules.loops import loop, loop_from, sequence
from graphopt.targets.schedules.register_tiles import Run, Taps
from graphopt.targets.schedules.workload import Kernel, Machine, Workload


def applies(window: Window, machine: Machine) -> bool:
    """Whether this machine multiplies by an element, and there are vectors of numbers: blocks of channels, or rows of a
    plane."""
    lanes = by_element.LANES
    whole = window.in_lanes % lanes == 0
    return by_element.has(machine) and (whole or in_planes(window)) and window.out_lanes % lanes == 0


def in_planes(window: Window) -> bool:
    """Whether the input is planes, as pictures come, and neighbouring outputs read neighbouring numbers."""
    return window.in_lanes == 1 and window.columns.dilation == 1 and window.columns.kernel > 1 and not window.flipped


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
        if window.in_lanes == 1:
            return self._in_planes(place, rows, columns, outs, plan, first, sums, cell)

        def at_tap(a: Tap, b: Tap) -> Any:
            tap = a.tap * window.columns.kernel + b.tap

            def at_block(ico) -> Any:
                start = first + (tap * plan.panel + ico) * (window.in_lanes * width)
                step = Step(place, a, b, outs, place.panel * plan.panel + ico, 0)
                return self._step(step, start, width, sums, cell)

            return loop("ico", plan.panel, at_block)

        def at_taps(a: Tap, b: Taps) -> Any:
            return loop("kw", b.count, lambda j: at_tap(a, Tap(b.first + j, b.outputs)))

        return self._over_taps(place, rows, columns, at_taps)

    def _over_taps(self, place, rows: Run, columns: Run, at: Callable[[Tap, Taps], Any]) -> Any:
        """Loops over the window's rows, and what is `at` each of them for each run of taps along the columns."""
        statements = []
        for a in rows.taps:
            for b in columns.taps:

                def at_kh(i, a=a, b=b) -> Any:
                    return at(Tap(a.first + i, a.outputs), b)

                if rows.is_clipped:
                    begin, count = self.window.rows.clipped(place.row)
                    statements.append(loop_from("kh", begin, count, at_kh))
                else:
                    statements.append(loop("kh", a.count, at_kh))
        return sequence(statements)

    def _in_planes(self, place, rows: Run, columns: Run, outs: int, plan, first, sums, cell: Callable[..., Any]) -> Any:
        """The same for planes: all numbers that a tile reads of a row are loaded once for all taps along it."""
        window, width = self.window, outs * self.window.out_lanes
        axis = window.columns

        def at(a: Tap, b: Taps) -> Any:
            count = (b.outputs[-1] - b.outputs[0]) * axis.stride + b.count

            def at_plane(ico) -> Any:
                statements: list[Any] = []
                step = Step(place, a, Tap(b.first, b.outputs), outs, place.panel * plan.panel + ico, 0)
                numbers = {row: self._numbers(statements, step, row, count) for row in a.outputs}
                for k in range(b.count):
                    tap = a.tap * axis.kernel + b.first + k
                    start = first + (tap * plan.panel + ico) * width
                    found = {
                        (row, column): numbers[row][(column - b.outputs[0]) * axis.stride + k]
                        for row in a.outputs
                        for column in b.outputs
                    }
                    self._add(statements, found, outs, start, sums, cell)
                return sequence(statements)

            return loop("ico", plan.panel, at_plane)

        return self._over_taps(place, rows, columns, at)

    def _numbers(self, statements: list[Any], step: Step, row: int, count: int) -> list[Any]:
        """`count` neighbouring numbers of a plane, each in all lanes, from the first that a tile's row reads on. None
        beyond is read: the last vector overlaps the one before it."""
        from tvm import tirx

        lanes = by_element.LANES
        *front, position, lane = self._read(step, row, step.columns.outputs[0])
        if count < lanes:
            wide: Any = lanes
            return [tirx.Broadcast(self.data[(*front, position + i, lane)], wide) for i in range(count)]
        starts = [*range(0, count - lanes + 1, lanes), *([count - lanes] if count % lanes else [])]
        held = [_held(statements, self.data, (*front, position + start, 0)) for start in starts]
        return [by_element.spread(held[i // lanes], i - starts[i // lanes]) for i in range(count)]

    def _step(self, step: Step, start: Any, width: int, sums, cell: Callable[..., Any]) -> Any:
        """Add the products of one tap and one block of input channels; `start`: the first weight."""
        statements: list[Any] = []
        positions = [(row, column) for row in step.rows.outputs for column in step.columns.outputs]
        for first in range(0, self.window.in_lanes, by_element.LANES):
            numbers = {at: _held(statements, self.data, (*self._read(step, *at)[:-1], first)) for at in positions}
            for element in range(by_element.LANES):
                found = {at: by_element.spread(vector, element) for at, vector in numbers.items()}
                self._add(statements, found, step.outs, start + (first + element) * width, sums, cell)
        return sequence(statements)

    def _add(
        self, statements: list[Any], numbers: Mapping[tuple[int, int], Any], outs: int, start: Any, sums, cell: Any
    ) -> None:
        """Add the products of a number for each position with the weights from `start` on."""
        from tvm import tirx

        for out in range(outs):
            for vector in range(self.vectors):
                weight = _held(statements, self.packed, [start + (out * self.vectors + vector) * by_element.LANES])
                for position, number in numbers.items():
                    to = _ramp(cell(out, *position, vector, 0))
                    statements.append(tirx.BufferStore(sums, sums[to] + number * weight, [to]))


def _held(statements: list[Any], buffer, at: Sequence[Any]) -> Any:
    """A variable with the vector of `buffer` that begins at `at`."""
    from tvm import tirx

    variable = tirx.Var("held", f"float32x{by_element.LANES}")
    statements.append(tirx.Bind(variable, tirx.BufferLoad(buffer, [*at[:-1], _ramp(at[-1])])))
    return variable


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
