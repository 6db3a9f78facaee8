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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from graphopt.targets.relax import half, stack_buffers
from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.conv2d_loops import ConvolutionLoops, Step, Tap, Window
from graphopt.targets.schedules.loops import loop, loop_from, ramp, sequence
from graphopt.targets.schedules.register_tiles import Run, Taps
from graphopt.targets.schedules.workload import Kernel, Machine, Workload, divisors


def applies(window: Window, machine: Machine) -> bool:
    """Whether this machine multiplies by an element, and there are vectors of numbers: blocks of channels, or rows of a
    plane."""
    lanes = machine.lanes
    whole = window.in_lanes % lanes == 0
    return by_element.has(machine) and (whole or in_planes(window)) and window.out_lanes % lanes == 0


def in_planes(window: Window) -> bool:
    """Whether the input is planes, as pictures come, and neighbouring outputs read neighbouring numbers."""
    return window.in_lanes == 1 and window.columns.dilation == 1 and window.columns.kernel > 1 and not window.flipped


def reads_constants(workload: Workload, block) -> bool:
    """Whether data and weight are what the function computes with, and the weight is a parameter: it must be stored in
    another order."""
    params = list(workload.func.params)
    sources = [r.source for r in block.reads]
    weight = next((each for each in sources if len(each.ty.shape) == 6), None)
    stored = weight is not None and any(weight.same_as(each) for each in params)
    return stored and all(str(each.ty.dtype) == workload.number for each in sources)


@dataclass(frozen=True)
class _Runs:
    """Sums of a tile in runs: of a row of the window each, or of some input blocks at one tap."""

    cut: int
    """Input blocks of a run."""
    of_row: int
    """Runs of a row of the window."""
    number: int
    by_tap: bool = False
    summed: Callable[[Any, Any], Any] = lambda _run, body: body
    """What makes the run of this number of the statements that add its products."""


class ByElementLoops(ConvolutionLoops):
    """`write` as its base does, then `kernel` for the function and the order of its weight."""

    def __init__(self, workload: Workload):
        super().__init__(workload)
        from tvm import tirx

        window = self.window
        self.given = self.weight
        self.place = next(i for i, p in enumerate(workload.func.params) if p.same_as(self.given))
        elements = window.groups * window.out_blocks * window.taps * window.out_lanes
        self.packed = tirx.decl_buffer((elements,), self.sum_type, "weight")

    def kernel(self, rows: int, columns: int, outs: int, *, panel: int, order: str, parallel: bool) -> Kernel:
        from tvm import tirx

        func = self.write(rows, columns, outs, panel=panel, order=order, parallel=parallel, ahead=False)
        params = list(func.params)
        params[self.place] = self.packed
        func = tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
        sizes = [run.size for run in self.out_runs(outs) for _ in range(run.count)]
        repack = partial(packed_weight, groups=self.window.groups, sizes=sizes, panel=panel)
        return Kernel(func, {self.place: repack})

    def _summed(self, place, rows: Run, columns: Run, outs: int, plan, sums, cell: Callable[..., Any], begin) -> Any:
        """Begin, and add every product of the panel. In float16 run by run: each run's sums are laid aside, and added
        up in the end."""
        from tvm import tirx

        runs = self._runs(rows, columns, outs, plan)
        if runs is None:
            return super()._summed(place, rows, columns, outs, plan, sums, cell, begin)
        count = outs * rows.size * columns.size * self.vectors
        aside = tirx.decl_buffer((runs.number, count * self.lanes), self.sum_type, "aside", scope="local")

        def each(statement: Callable[[Any], Any]) -> Any:
            return self._vector(lambda v: [statement(k * self.lanes + v) for k in range(count)])

        def add(run) -> Any:
            return each(lambda at: tirx.BufferStore(sums, sums[at] + aside[run, at], [at]))

        def summed(run: Any, body: Any) -> Any:
            clear = each(lambda at: tirx.BufferStore(sums, tirx.const(0, self.sum_type), [at]))
            return sequence([clear, body, each(lambda at: tirx.BufferStore(aside, sums[at], [run, at]))])

        products = self._accumulation(place, rows, columns, outs, plan, sums, cell, replace(runs, summed=summed))
        if rows.is_clipped:
            first, high = self.window.rows.clipped(place.row)
            end = loop_from("run", first * runs.of_row, high * runs.of_row, add)
        else:
            end = loop("run", runs.number, add)
        return sequence([tirx.AllocBuffer(aside), products, begin, end])

    def _runs(self, rows: Run, columns: Run, outs: int, plan) -> _Runs | None:
        """How a tile's sums are cut into runs; None where they are one."""
        window = self.window
        across = sum(b.count for b in columns.taps)
        high = window.rows.kernel if rows.is_clipped else sum(a.count for a in rows.taps)
        terms = plan.panel * window.in_lanes
        if self.sum_type != "float16" or terms * across * high <= half.TERMS:
            return None
        bytes_of_run = outs * rows.size * columns.size * window.out_lanes * 2
        most = max(half.TERMS, terms * across * high * bytes_of_run // stack_buffers.MOST_BYTES)
        if terms * max(b.count for b in columns.taps) <= most:
            return _Runs(plan.panel, len(columns.taps), high * len(columns.taps))
        cut = divisors(plan.panel, max(most // window.in_lanes, 1))[-1]
        of_row = across * (plan.panel // cut)
        return _Runs(cut, of_row, high * of_row, by_tap=True)

    def _accumulation(
        self, place, rows: Run, columns: Run, outs: int, plan, sums, cell: Callable[..., Any], runs: _Runs | None = None
    ) -> Any:
        window = self.window
        width = outs * window.out_lanes
        first = (place.group * window.out_blocks + place.out) * (window.taps * window.out_lanes)
        taps = window.rows.kernel * window.columns.kernel
        first = first + place.panel * (plan.panel * taps * window.in_lanes * width)
        if window.in_lanes == 1:
            return self._in_planes(place, rows, columns, outs, plan, first, sums, cell)

        def at_tap(a: Tap, b: Tap, turn: Any) -> Any:
            tap = a.tap * window.columns.kernel + b.tap

            def at_block(ico) -> Any:
                start = first + (tap * plan.panel + ico) * (window.in_lanes * width)
                step = Step(place, a, b, outs, place.panel * plan.panel + ico, 0)
                return self._step(step, start, width, sums, cell)

            if runs is None or not runs.by_tap:
                return loop("ico", plan.panel, at_block)
            summed, cut, parts = runs.summed, runs.cut, plan.panel // runs.cut

            def at_part(part) -> Any:
                return summed(turn * parts + part, loop("ico", cut, lambda i: at_block(part * cut + i)))

            return loop("part", parts, at_part)

        across = sum(b.count for b in columns.taps)

        def at_taps(a: Tap, b: Taps, row: Any) -> Any:
            number = columns.taps.index(b)
            first_turn = row * across + sum(each.count for each in columns.taps[:number])
            line = loop("kw", b.count, lambda j: at_tap(a, Tap(b.first + j, b.outputs), first_turn + j))
            if runs is None or runs.by_tap:
                return line
            return runs.summed(row * runs.of_row + number, line)

        return self._over_taps(place, rows, columns, at_taps)

    def _over_taps(self, place, rows: Run, columns: Run, at: Callable[[Tap, Taps, Any], Any]) -> Any:
        """Loops over the window's rows, and what is `at` each of them for each run of taps along the columns; `at` gets
        the number of the row, too: in the window, or, where it is known which rows are inside, among these."""
        statements, above = [], 0
        for a in rows.taps:
            for b in columns.taps:

                def at_kh(i, a=a, b=b, above=above) -> Any:
                    return at(Tap(a.first + i, a.outputs), b, above + i)

                if rows.is_clipped:
                    begin, count = self.window.rows.clipped(place.row)
                    statements.append(loop_from("kh", begin, count, at_kh))
                else:
                    statements.append(loop("kh", a.count, at_kh))
            above += a.count
        return sequence(statements)

    def _in_planes(self, place, rows: Run, columns: Run, outs: int, plan, first, sums, cell: Callable[..., Any]) -> Any:
        """The same for planes: all numbers that a tile reads of a row are loaded once for all taps along it."""
        window, width = self.window, outs * self.window.out_lanes
        axis = window.columns

        def at(a: Tap, b: Taps, _row: Any) -> Any:
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

        lanes = self.lanes
        *front, position, lane = self._read(step, row, step.columns.outputs[0])
        if count < lanes:
            wide: Any = lanes
            return [tirx.Broadcast(self.data[(*front, position + i, lane)], wide) for i in range(count)]
        starts = [*range(0, count - lanes + 1, lanes), *([count - lanes] if count % lanes else [])]
        held = [self._held(statements, self.data, (*front, position + start, 0)) for start in starts]
        return [by_element.spread(held[i // lanes], i - starts[i // lanes], lanes) for i in range(count)]

    def _step(self, step: Step, start: Any, width: int, sums, cell: Callable[..., Any]) -> Any:
        """Add the products of one tap and one block of input channels; `start`: the first weight."""
        statements: list[Any] = []
        positions = [(row, column) for row in step.rows.outputs for column in step.columns.outputs]
        for first in range(0, self.window.in_lanes, self.lanes):
            numbers = {at: self._held(statements, self.data, (*self._read(step, *at)[:-1], first)) for at in positions}
            for element in range(self.lanes):
                found = {at: by_element.spread(vector, element, self.lanes) for at, vector in numbers.items()}
                self._add(statements, found, step.outs, start + (first + element) * width, sums, cell)
        return sequence(statements)

    def _add(
        self, statements: list[Any], numbers: Mapping[tuple[int, int], Any], outs: int, start: Any, sums, cell: Any
    ) -> None:
        """Add the products of a number for each position with the weights from `start` on."""
        from tvm import tirx

        for out in range(outs):
            for vector in range(self.vectors):
                weight = self._held(statements, self.packed, [start + (out * self.vectors + vector) * self.lanes])
                for position, number in numbers.items():
                    to = ramp(cell(out, *position, vector, 0), self.lanes)
                    statements.append(tirx.BufferStore(sums, sums[to] + number * weight, [to]))

    def _held(self, statements: list[Any], buffer, at: Sequence[Any]) -> Any:
        """A variable with the vector of `buffer` that begins at `at`."""
        from tvm import tirx

        variable = tirx.Var("held", f"{self.sum_type}x{self.lanes}")
        statements.append(tirx.Bind(variable, tirx.BufferLoad(buffer, [*at[:-1], ramp(at[-1], self.lanes)])))
        return variable


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
