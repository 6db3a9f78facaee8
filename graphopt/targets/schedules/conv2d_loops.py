"""The loop nest of a direct convolution, written out in TIR.

The schedule language cuts an axis into equal tiles and keeps one body for all. Here each run of tiles has a body of its
own: borders, rests, and the requests for the next block's weights are where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.schedules import prefetch
from graphopt.targets.schedules.loops import choose, loop, loop_from, nest, sequence
from graphopt.targets.schedules.register_tiles import POINT, Axis, Run
from graphopt.targets.schedules.workload import Workload, extents, inline_epilogue, new_schedule, nodes


@dataclass(frozen=True)
class Window:
    """What a `conv2d` or `conv2d_int8` block computes: data (N, groups * in_blocks, rows * columns, in_lanes), and so
    on. Lanes of bytes are counted in quads: a quad of the input, like a quad of weights, is as large as a float32."""

    batch: int
    out_blocks: int
    """Of one group."""
    out_lanes: int
    in_blocks: int
    """Of one group."""
    in_lanes: int
    groups: int
    rows: Axis
    columns: Axis
    flipped: bool = False
    """True when rows and columns are swapped."""

    @classmethod
    def of(cls, block) -> Window:
        """The window of a `conv2d` block, in the form that is cut best.

        A 1x1 window without stride and padding sees one long row, which is cut along `rows`; so is the row of a
        picture of height 1.
        """
        batch, out_blocks, _, out_lanes, in_blocks, k_h, in_lanes, k_w = extents(block)[:8]
        described = (int(x) for x in block.annotations[WINDOW])
        height, width, out_h, out_w, s_h, s_w, top, left, d_h, d_w, groups = described
        rows, columns = Axis(out_h, height, k_h, s_h, d_h, top), Axis(out_w, width, k_w, s_w, d_w, left)
        found = cls(batch, out_blocks // groups, out_lanes, in_blocks, in_lanes, groups, rows, columns)
        if all((a.kernel, a.stride, a.pad, a.extent) == (1, 1, 0, a.length) for a in (rows, columns)):
            area = height * width
            return replace(found, rows=replace(rows, extent=area, length=area), columns=POINT)
        if rows == POINT:
            return replace(found, rows=columns, columns=rows, flipped=True)
        return found

    @property
    def taps(self) -> int:
        """Multiply-accumulates of one output; an output block has as many vectors of weights."""
        return self.in_blocks * self.in_lanes * self.rows.kernel * self.columns.kernel


@dataclass(frozen=True)
class _Place:
    """Where a tile is: loop variables, or numbers."""

    n: Any
    group: Any
    out: Any
    """First output block, counted within the group."""
    row: Any
    column: Any
    number: Any
    """How many tiles of the same output blocks come before this one."""
    panel: Any = 0
    """Which of the panels of input channels."""


@dataclass(frozen=True)
class _Plan:
    """What all tiles share."""

    panel: int
    """Input blocks of a panel."""
    panels: int
    tiles: int
    """Of the same output blocks."""
    ahead: bool
    level: int = prefetch.L1
    """The cache that weights are requested into."""


class ConvolutionLoops:
    """Writes the loops of a workload whose anchor is `ANCHOR` and whose only other producer is `pad`."""

    ANCHOR = "conv2d"
    SUM = ""
    """Element type of the sums, where it is not the workload's `number`."""
    START = ""
    """The block behind the anchor that adds what sums start from, if there is one: one number a channel."""
    at_once = 1
    """Input lanes of a step."""

    def __init__(self, workload: Workload):
        from tvm.ir.expr import TensorLoad

        self.func = workload.func
        self.sum_type = self.SUM or workload.number
        self.block = workload.blocks[self.ANCHOR]
        self.window = Window.of(self.block)
        out_lanes, lanes = self.window.out_lanes, workload.machine.lanes
        self.lanes = lanes if out_lanes % lanes == 0 else out_lanes
        self.vectors = out_lanes // self.lanes
        """Of one output block."""
        schedule = new_schedule(workload.func)
        last = self.START or self.ANCHOR
        self.start: Any = None
        if self.START:  # sums + start
            self.start = workload.blocks[self.START].body.value.b.source
        self.epilogue = schedule.get(inline_epilogue(schedule, last))
        self.sum = schedule.get(schedule.get_sblock(last)).body.buffer
        self.is_apart = extents(self.epilogue) != extents(self.block)[:4]
        """True when the epilogue broadcasts the convolution: then it is computed whole, and the epilogue follows."""
        self.product = self.block.body.value.b
        data, weight = nodes(self.product, TensorLoad)
        self.weight_bytes = _bytes(weight.source)
        """Of one step along the input's lanes, for one output."""
        self.data, self.weight = data.source, weight.source
        if "pad" in workload.blocks:  # the tiles skip what lies outside, so the padded copy is not needed
            (load,) = nodes(workload.blocks["pad"].body, TensorLoad)
            self.data = load.source

    def write(self, rows: int, columns: int, outs: int, *, panel: int, order: str, parallel: bool, ahead: bool) -> Any:
        """The function with tiles of at most rows x columns outputs x `outs` output blocks.

        `panel`: input blocks that are added before the next tile's turn; sums wait in memory where it is not all of
        them. `order`: which is outer, output blocks ("weights" stay in cache) or positions ("data" stays). `ahead`:
        request the next panel's weights while computing with this one.
        """
        from tvm import tirx

        window = self.window
        row_runs, column_runs = window.rows.runs(rows), window.columns.runs(columns, clip=False)
        out_runs = self.out_runs(outs)
        across = sum(run.count for run in column_runs)
        down = sum(run.count for run in row_runs)
        panels = window.in_blocks // panel
        sizes = {"n": window.batch, "group": window.groups, "out": sum(r.count for r in out_runs), "row": down}
        plan = _Plan(panel, panels, across * down, ahead and order == "weights")
        largest = max(r.size for r in row_runs) * max(c.size for c in column_runs) * out_runs[0].size * self.vectors

        def columns_of(n, group, row_run, row, before, body) -> Any:
            """All tiles of a row; `body` makes each from its place but for the output block, and its runs."""
            done, statements = 0, []
            for run in column_runs:

                def at(i, run=run, done=done):
                    place = _Place(n, group, 0, row, run.first + i * run.size, before * across + done + i)
                    return body(place, row_run, run)

                statements.append(loop("column", run.count, at))
                done += run.count
            return sequence(statements)

        def tiles_of(n, group, t, body) -> Any:
            return choose(
                t, row_runs, lambda run, i: columns_of(n, group, run, run.first + i * run.size, t, body)
            )  # fmt: skip

        def outs_of(place, row_run, column_run) -> Any:
            return sequence(
                loop(
                    "out",
                    run.count,
                    lambda k, run=run: self._tile(
                        replace(place, out=run.first + k * run.size), row_run, column_run, run.size, plan, None
                    ),
                )
                for run in out_runs
            )

        def out_first(n, group, k, t) -> Any:
            return choose(
                k,
                out_runs,
                lambda run, i: tiles_of(
                    n, group, t,
                    lambda place, r, c: self._tile(
                        replace(place, out=run.first + i * run.size), r, c, run.size, plan, None
                    ),
                ),
            )  # fmt: skip

        def in_panels(n, group, k) -> Any:
            waiting = tirx.decl_buffer((plan.tiles * largest * self.lanes,), self.sum_type, "waiting")

            def of_run(run, i) -> Any:
                def at(p, t) -> Any:
                    def tile(place, r, c) -> Any:
                        placed = replace(place, out=run.first + i * run.size, panel=p)
                        return self._tile(placed, r, c, run.size, plan, (waiting, largest))

                    return tiles_of(n, group, t, tile)

                return nest({"panel": panels, "row": down}, at, False)

            return sequence([tirx.AllocBuffer(waiting), choose(k, out_runs, of_run)])

        if order == "data":
            del sizes["out"]
            body = nest(sizes, lambda n, group, t: tiles_of(n, group, t, outs_of), parallel)
        elif panels == 1:
            body = nest(sizes, out_first, parallel)
        else:
            del sizes["row"]
            body = nest(sizes, in_panels, parallel)
        if self.is_apart:
            body = sequence([tirx.AllocBuffer(self.sum), body, self._epilogue_apart(parallel)])
        return self.func.with_body(body)

    def out_runs(self, outs: int) -> list[Run]:
        """How the output blocks of a group are cut into tiles of at most `outs`."""
        return replace(POINT, extent=self.window.out_blocks, length=self.window.out_blocks).runs(outs)

    def _epilogue_apart(self, parallel: bool) -> Any:
        batch, blocks, positions, _ = extents(self.epilogue)

        def at(n, block, position) -> Any:
            def stores(v):
                cells = ((n, block, position, vector * self.lanes + v) for vector in range(self.vectors))
                return [self._epilogue_at(place, None) for place in cells]

            return self._vector(stores)

        return nest({"n": batch, "block": blocks, "position": positions}, at, parallel)

    def _tile(self, place: _Place, rows: Run, columns: Run, outs: int, plan: _Plan, waiting) -> Any:
        """Start with zeros or with the sums that wait, add every product of the panel, store or let wait."""
        from tvm import tirx

        lanes = self.lanes
        per_out = rows.size * columns.size * self.vectors
        sums = tirx.decl_buffer((outs * per_out * lanes,), self.sum_type, "sums", scope="local")
        zero = tirx.const(0, self.sum_type)
        every = range(outs * per_out)

        def cell(out, row, column, vector, v):
            return (((out * rows.size + row) * columns.size + column) * self.vectors + vector) * lanes + v

        def results(v):
            return [
                self._result(place, row, column, out, first + v, sums[cell(out, row, column, 0, 0) + first + v])
                for out in range(outs)
                for row in range(rows.size)
                for column in range(columns.size)
                for first in range(0, self.vectors * lanes, self.result_lanes)
            ]

        def first(k, v) -> Any:
            if self.start is None:
                return zero
            out, vector = k // per_out, k % self.vectors
            row, column = divmod(k % per_out // self.vectors, columns.size)
            seen = self._class(place.row + row, place.column + column)
            return self.start[0, place.group * self.window.out_blocks + place.out + out, seen, vector * lanes + v]

        begin = self._vector(lambda v: [tirx.BufferStore(sums, first(k, v), [k * lanes + v]) for k in every])
        end = self._vector(results, self.result_lanes)
        if waiting is not None:
            memory, largest = waiting
            base = place.number * (largest * lanes)
            resume = self._vector(
                lambda v: [tirx.BufferStore(sums, memory[base + k * lanes + v], [k * lanes + v]) for k in every]
            )
            wait = self._vector(
                lambda v: [tirx.BufferStore(memory, sums[k * lanes + v], [base + k * lanes + v]) for k in every]
            )
            begin = tirx.IfThenElse(place.panel == 0, begin, resume)
            end = tirx.IfThenElse(place.panel == plan.panels - 1, end, wait)
        if not rows.taps or not columns.taps:
            return sequence([tirx.AllocBuffer(sums), begin, end])
        return sequence(
            [tirx.AllocBuffer(sums), self._summed(place, rows, columns, outs, plan, sums, cell, begin), end]
        )

    def _summed(
        self, place: _Place, rows: Run, columns: Run, outs: int, plan: _Plan, sums, cell: Callable[..., Any], begin: Any
    ) -> Any:
        """Begin, and add every product of the panel."""
        return sequence([begin, self._accumulation(place, rows, columns, outs, plan, sums, cell)])

    def _accumulation(
        self, place: _Place, rows: Run, columns: Run, outs: int, plan: _Plan, sums, cell: Callable[..., Any]
    ) -> Any:
        """Add every product of the panel to the tile's sums. `cell(out, row, column, vector, v)` is where lane `v` of a
        sum is."""
        steps = sum(a.count * b.count for a in rows.taps for b in columns.taps)

        def at_tap(ico, a: Tap, b: Tap, step):
            def accumulate(ici):
                step = Step(place, a, b, outs, place.panel * plan.panel + ico, ici)
                return self._products(step, sums, cell)

            turn = (place.number * plan.panel + ico) * steps + step
            requests = self._requests(place, outs, plan, turn, plan.tiles * plan.panel * steps)
            return sequence([*requests, loop("ici", self.window.in_lanes // self.at_once, accumulate)])

        def at_block(ico):
            done, statements = 0, []
            for a in rows.taps:
                for b in columns.taps:

                    def at_kh(i, a=a, b=b, done=done):
                        def at_kw(j):
                            step = done + i * b.count + j
                            return at_tap(ico, Tap(a.first + i, a.outputs), Tap(b.first + j, b.outputs), step)

                        return loop("kw", b.count, at_kw)

                    if rows.is_clipped:
                        first, count = self.window.rows.clipped(place.row)
                        statements.append(loop_from("kh", first, count, at_kh))
                    else:
                        statements.append(loop("kh", a.count, at_kh))
                    done += a.count * b.count
            return sequence(statements)

        return loop("ico", plan.panel, at_block)

    def _class(self, row, column) -> Any:
        """Which of the numbers that sums start from an output has; see `borders`."""
        if int(self.start.shape[2]) == 1:
            return 0
        down, across = self.window.rows.border, self.window.columns.border
        if self.window.flipped:
            return down.class_of(row)
        return down.class_of(row) * across.classes + across.class_of(column)

    def _products(self, step: Step, sums, cell: Callable[..., Any]) -> Any:
        """Add to every sum of a tile its products at one tap and one input lane."""
        from tvm import tirx

        def products(v):
            stores = []
            for row in step.rows.outputs:
                for column in step.columns.outputs:
                    for out in range(step.outs):
                        for vector in range(self.vectors):
                            at, lane = cell(out, row, column, vector, v), vector * self.lanes + v
                            data = self.data[self._read(step, row, column)]
                            term = self._term(data, self.weight[self._weighed(step, out, lane)])
                            stores.append(tirx.BufferStore(sums, sums[at] + term, [at]))
            return stores

        return self._vector(products)

    def _requests(self, place: _Place, outs: int, plan: _Plan, turn, turns: int) -> list[Any]:
        """Requests for this turn's share of the next panel's weights, of `turns` turns."""
        from tvm import tirx

        if not plan.ahead:
            return []
        window = self.window
        block = window.taps // window.in_blocks * window.out_lanes * self.weight_bytes
        lines = plan.panel * block // prefetch.LINE_BYTES
        """Of one output block's panel; they are contiguous."""
        count = -(-lines // turns)
        now = place.group * window.out_blocks + place.out
        first: Any = (now + outs) * window.in_blocks
        if plan.panels > 1:
            following = now * window.in_blocks + (place.panel + 1) * plan.panel
            first = tirx.Select(place.panel == plan.panels - 1, first, following)
        found = []
        for out in range(outs):
            start = (first + out * window.in_blocks) * (block // prefetch.LINE_BYTES) + turn * count
            found += prefetch.lines(self.weight, start, count, plan.level)
        if count * turns > 1.25 * lines:
            return [tirx.IfThenElse(turn * count < lines, sequence(found), None)]
        return found

    @property
    def result_lanes(self) -> int:
        """Neighbouring results that are stored together."""
        return self.lanes

    def _vector(self, statements: Callable[[Any], list[Any]], lanes: int = 0) -> Any:
        """Statements for every lane at once; `lanes`: of these, where not those of a vector."""
        from tvm import tirx

        v: Any = tirx.Var("v", "int32")
        zero, count = tirx.const(0, "int32"), tirx.const(lanes or self.lanes, "int32")
        return tirx.For(v, zero, count, tirx.ForKind.VECTORIZED, sequence(statements(v)))

    def _read(self, step: Step, row, column) -> tuple[Any, ...]:
        """Indices of the input that one output of a tile multiplies."""
        place, a, b = step.place, self.window.rows, self.window.columns
        y = (place.row + row) * a.stride + step.rows.tap * a.dilation - a.pad
        x = (place.column + column) * b.stride + step.columns.tap * b.dilation - b.pad
        return place.n, place.group * self.window.in_blocks + step.block, y * b.length + x, step.lane

    def _weighed(self, step: Step, out, lane) -> tuple[Any, ...]:
        """Indices of the weight it is multiplied by."""
        k_h, k_w = step.rows.tap, step.columns.tap
        if self.window.flipped:
            k_h, k_w = k_w, k_h
        block = step.place.group * self.window.out_blocks + step.place.out + out
        return block, step.block, k_h, k_w, step.lane, lane

    def _term(self, data, weight) -> Any:
        """The block's product, for one output and one tap."""
        from tvm.ir.expr import TensorLoad

        product = self.product
        if isinstance(product.a, TensorLoad) and isinstance(product.b, TensorLoad):
            return data * weight
        return _with_loads(product, lambda load: weight if load.source.same_as(self.weight) else data)

    def _result(self, place: _Place, row, column, out, lane, total) -> Any:
        """Store one output, through the epilogue."""
        from tvm import tirx

        block = place.group * self.window.out_blocks + place.out + out
        position = (place.row + row) * self.window.columns.extent + place.column + column
        at = (place.n, block, position, lane)
        return tirx.BufferStore(self.sum, total, list(at)) if self.is_apart else self._epilogue_at(at, total)

    def _epilogue_at(self, at: tuple[Any, ...], total) -> Any:
        """The epilogue's store for one output; `total` stands for the convolution's result, None for its buffer."""
        import tvm_ffi
        from tvm import tirx
        from tvm.ir import Var

        names = [v.var for v in self.epilogue.iter_vars]
        numbers = [tirx.const(x, "int32") if isinstance(x, int) else x for x in at]
        store = self.epilogue.body

        def value_of(var):
            return next((number for name, number in zip(names, numbers, strict=True) if name.same_as(var)), var)

        def substituted(expression):
            return tvm_ffi.structural_map(expression, [(Var, value_of)])

        value = store.value
        if total is not None:
            value = _with_loads(value, lambda load: total if load.source.same_as(self.sum) else load)
        return tirx.BufferStore(store.buffer, substituted(value), [substituted(i) for i in store.indices])


@dataclass(frozen=True)
class Tap:
    """One tap along an axis, and the outputs of a tile that read it."""

    tap: Any
    outputs: Sequence[int]


@dataclass(frozen=True)
class Step:
    """What a tile adds at a time: one tap of the window, one lane of one input block."""

    place: _Place
    rows: Tap
    columns: Tap
    outs: int
    """Output blocks of the tile."""
    block: Any
    """Of the input, counted within the group."""
    lane: Any


def _with_loads(expression, replacement: Callable[[Any], Any]) -> Any:
    import tvm_ffi
    from tvm.ir.expr import TensorLoad

    return tvm_ffi.structural_map(expression, [(TensorLoad, replacement)])


def _bytes(buffer) -> int:
    import tvm

    return tvm.DataType(str(buffer.dtype)).bits // 8
