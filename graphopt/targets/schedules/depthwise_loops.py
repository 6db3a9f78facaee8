"""The loop nest of a sliding window over single channels, written out in TIR.

Each run of tiles (the left border, the middle, the right border; top, middle, bottom) has a body of its own, so that
what lies outside of the picture is neither read nor computed with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.targets.relax.bfloat16 import DTYPE
from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.loops import choose, loop, loop_from, nest, rooted, sequence
from graphopt.targets.schedules.register_tiles import Axis, Run
from graphopt.targets.schedules.workload import Workload, extents, nodes

ANCHORS = ("depthwise", "window_max", "window_sum")


@dataclass(frozen=True)
class Window:
    """What an anchor computes: data (N, blocks, rows * columns, lanes) -> (N, blocks, rows * columns, lanes)."""

    batch: int
    blocks: int
    lanes: int
    """Channels of a block."""
    rows: Axis
    columns: Axis
    load_instructions: int
    """To have a vector of the input in registers."""

    @classmethod
    def of(cls, workload: Workload) -> Window | None:
        """The geometry; None where something other than padding comes before the anchor, or its type is an integer."""
        block = workload.anchor(*ANCHORS)
        if block is None or WINDOW not in block.annotations:
            return None
        names = list(workload.blocks)
        if (
            set(names[: names.index(str(block.name_hint))]) - {"pad"}
            or str(block.writes[0].source.dtype) != workload.number
        ):
            return None
        if "pad" in workload.blocks and len(_loads(workload.blocks["pad"].body)) != 1:
            return None
        if epilogue_of(workload, str(block.name_hint)) is None:
            return None
        batch, blocks, _, lanes, k_h, k_w = extents(block)
        height, width, out_h, out_w, s_h, s_w, top, left, d_h, d_w, _ = (int(x) for x in block.annotations[WINDOW])
        if min(batch, blocks, height, width, out_h, out_w) < 1:
            return None
        narrow = any(str(region.source.dtype) == DTYPE for region in block.reads)
        rows, columns = Axis(out_h, height, k_h, s_h, d_h, top), Axis(out_w, width, k_w, s_w, d_w, left)
        return cls(batch, blocks, lanes, rows, columns, 3 if narrow else 1)

    def terms(self, rows: int, columns: int) -> int:
        """Products that are written out for tiles of at most rows x columns outputs."""
        return sum(
            sum(tap.count * len(tap.outputs) for tap in row.taps)
            * sum(tap.count * len(tap.outputs) for tap in column.taps)
            for row in self.rows.runs(rows)
            for column in self.columns.runs(columns, clip=False)
        )


@dataclass(frozen=True)
class _Place:
    """Where a tile is: loop variables, or numbers."""

    n: Any
    block: Any
    row: Any
    column: Any
    vector: Any
    """First lane."""


@dataclass(frozen=True)
class _Held:
    """What a tile has in registers: vectors, one behind the other."""

    sums: Any
    inputs: Any
    """Of one input row."""
    weights: Any
    """Of the whole window, or of one of its rows; None for pooling."""


class DepthwiseLoops:
    """Writes the loops of a workload that `Window.of` describes."""

    def __init__(self, workload: Workload):
        from tvm import tirx

        window = Window.of(workload)
        assert window is not None
        self.window = window
        self.func, self.number = workload.func, workload.number
        block: Any = workload.anchor(*ANCHORS)
        epilogue = epilogue_of(workload, str(block.name_hint))
        assert epilogue is not None
        self.epilogue: Epilogue = epilogue
        self.update = block.body.value
        """The running value and one term: a sum, or a maximum."""
        self.start = block.init.value
        self.variables = [v.var for v in block.iter_vars]
        self.lanes = workload.machine.lanes if window.lanes % workload.machine.lanes == 0 else window.lanes
        term = self.update.b
        self.input, self.weight = (term.a, term.b) if isinstance(term, tirx.Mul) else (term, None)
        self.read = _loads(self.input)[0].source
        self.data = _loads(workload.blocks["pad"].body)[0].source if "pad" in workload.blocks else self.read

    def write(self, rows: int, columns: int, *, parallel: bool) -> Any:
        """The function with tiles of at most rows x columns outputs."""
        window = self.window
        row_runs, column_runs = window.rows.runs(rows), window.columns.runs(columns, clip=False)
        vectors = window.lanes // self.lanes

        def row_tile(n, block, run: Run, row) -> Any:
            def of_vector(vector) -> Any:
                return sequence(
                    loop(
                        "column",
                        columns_run.count,
                        lambda i, c=columns_run: self._tile(
                            _Place(n, block, row, c.first + i * c.size, vector * self.lanes), run, c
                        ),
                    )
                    for columns_run in column_runs
                )

            return loop("vector", vectors, of_vector)

        def at(n, block, t) -> Any:
            return choose(t, row_runs, lambda run, i: row_tile(n, block, run, run.first + i * run.size))

        sizes = {"n": window.batch, "block": window.blocks, "row": sum(run.count for run in row_runs)}
        return self.func.with_body(rooted(nest(sizes, at, parallel)))

    def _tile(self, place: _Place, rows: Run, columns: Run) -> Any:
        """Start, add every term, store through the epilogue."""
        from tvm import tirx

        count = rows.size * columns.size
        sums = self._registers(count, "sums")

        def store(v) -> list[Any]:
            found = []
            for row in range(rows.size):
                for column in range(columns.size):
                    value = sums[(row * columns.size + column) * self.lanes + v]
                    at = [place.n, place.block, self._output(place, row, column), place.vector + v]
                    numbers = [tirx.const(x, "int32") if isinstance(x, int) else x for x in at]
                    result = self.epilogue.at(numbers, value, [])
                    found.append(tirx.BufferStore(self.epilogue.output, result, numbers))
            return found

        begin = self._vector(lambda v: [tirx.BufferStore(sums, self.start, [k * self.lanes + v]) for k in range(count)])
        end = self._vector(store)
        held = _Held(sums, self._registers(len(self.window.columns.readers(columns)), "inputs"), None)
        if self.weight is not None:
            held = replace(
                held, weights=self._registers(self._static_rows(rows) * self.window.columns.kernel, "weights")
            )
        buffers = [tirx.AllocBuffer(x) for x in (held.sums, held.inputs, held.weights) if x is not None]
        return sequence([*buffers, begin, *self._steps(place, rows, columns, held), end])

    def _static_rows(self, rows: Run) -> int:
        """Rows of the window whose weights are held at a time."""
        return self.window.rows.kernel if rows.size > 1 else 1

    def _registers(self, count: int, name: str) -> Any:
        from tvm import tirx

        return tirx.decl_buffer((max(count, 1) * self.lanes,), self.number, name, scope="local")

    def _output(self, place: _Place, row: int, column: int) -> Any:
        return (place.row + row) * self.window.columns.extent + place.column + column

    def _steps(self, place: _Place, rows: Run, columns: Run, held: _Held) -> list[Any]:
        """The tile's input rows, one after the other."""
        if not columns.taps or not rows.taps:  # the windows lie in the padding
            return []
        axis = self.window.rows
        if rows.size > 1:
            weights = self._hold_weights(place, range(axis.kernel), held)
            patch = axis.readers(rows)
            return [*weights, *(self._input_row(place, down, taps, columns, held) for down, taps in patch.items())]

        def at(kh) -> Any:
            weights = self._hold_weights(place, [kh], held)
            return sequence([*weights, self._input_row(place, kh * axis.dilation, [(0, 0)], columns, held)])

        if rows.is_clipped:
            first, count = axis.clipped(place.row)
            return [loop_from("kh", first, count, at)]
        return [loop("kh", tap.count, lambda i, first=tap.first: at(first + i)) for tap in rows.taps]

    def _hold_weights(self, place: _Place, rows: Iterable[Any], held: _Held) -> list[Any]:
        """Load rows of the window's weights."""
        from tvm import tirx

        if self.weight is None:
            return []
        width = self.window.columns.kernel

        def loads(v) -> list[Any]:
            return [
                tirx.BufferStore(
                    held.weights,
                    self._placed(self.weight, place, 0, kh, kw, place.vector + v),
                    [(k * width + kw) * self.lanes + v],
                )
                for k, kh in enumerate(rows)
                for kw in range(width)
            ]

        return [self._vector(loads)]

    def _input_row(self, place: _Place, down: Any, taps: Sequence[tuple[int, int]], columns: Run, held: _Held) -> Any:
        """Add what the input row `down` below the first gives to the outputs (row, held row of weights) in `taps`."""
        from tvm import tirx

        rows, across, lanes = self.window.rows, self.window.columns, self.lanes
        y = place.row * rows.stride + (down - rows.pad)
        first = y * across.length + place.column * across.stride - across.pad

        def terms(v) -> list[Any]:
            found = []
            for k, (right, column_taps) in enumerate(across.readers(columns).items()):
                value = self._placed(self.input, place, first + right, 0, 0, place.vector + v)
                found.append(tirx.BufferStore(held.inputs, value, [k * lanes + v]))
                for row, kh in taps:
                    for column, kw in column_taps:
                        at = (row * columns.size + column) * lanes + v
                        term: Any = held.inputs[k * lanes + v]
                        if self.weight is not None:
                            term = term * held.weights[(kh * across.kernel + kw) * lanes + v]
                        found.append(tirx.BufferStore(held.sums, self._updated(held.sums[at], term), [at]))
            return found

        return self._vector(terms)

    def _updated(self, value, term) -> Any:
        from tvm import tirx

        return tirx.max(value, term) if isinstance(self.update, tirx.Max) else value + term

    def _placed(self, expression, place: _Place, position, kh, kw, lane) -> Any:
        """The anchor's input, or its weight, at one position of the input or of the window."""
        import tvm_ffi
        from tvm import tirx
        from tvm.ir import Var
        from tvm.ir.expr import TensorLoad

        values = [tirx.const(x, "int32") if isinstance(x, int) else x for x in (place.n, place.block, 0, lane, kh, kw)]

        def load(value):
            if value.source.same_as(self.read):
                return self.data[place.n, place.block, position, lane]
            return value.source[tuple(tvm_ffi.structural_map(i, (Var, named)) for i in value.indices)]

        def named(variable):
            return next((x for v, x in zip(self.variables, values, strict=True) if variable.same_as(v)), variable)

        return tvm_ffi.structural_map(expression, (TensorLoad, load))

    def _vector(self, statements) -> Any:
        """Statements for every lane at once."""
        from tvm import tirx

        v: Any = tirx.Var("v", "int32")
        zero, lanes = tirx.const(0, "int32"), tirx.const(self.lanes, "int32")
        return tirx.For(v, zero, lanes, tirx.ForKind.VECTORIZED, sequence(statements(v)))


def _loads(tree) -> list[Any]:
    from tvm.ir.expr import TensorLoad

    return nodes(tree, TensorLoad)
