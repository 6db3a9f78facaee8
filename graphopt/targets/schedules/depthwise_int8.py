"""Depthwise convolution of bytes on ARM: products in 16 bits, two at a time, sums in 32.

Idea: channels are lanes, so nothing is broadcast. SMULL makes 16-bit products of 8 channels, SMLAL adds those of a
second tap (two always fit, unless all four factors are -128; annotation PAIRS), SADDW adds both to the 32-bit sums.
Converting bytes to float32 first takes twice the instructions. A tile of neighbouring outputs loads each input of a
row once.

Loop order: n, channel block, row (parallel) / column tile / kh, input columns, taps; all but the loops over tiles
are unrolled. Borders skip the taps that lie outside; their outputs' sums start from numbers of their own (`borders`).

Register budget: columns * lanes / 4 sums + the weights of the window + an input + two products <= 32 registers;
weights beyond that are read where they are used.

Source: Zhang, Lo, Lu: High Performance Depthwise and Pointwise Convolutions on Mobile Devices, AAAI 2020, section 3;
Arm Architecture Reference Manual for A-profile, C7.2 (SMULL, SMLAL, SADDW).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax import own_operators
from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.relax.integer_computes import PAIRS, START
from graphopt.targets.schedules.epilogue import epilogue_of
from graphopt.targets.schedules.loops import choose, loop, nest, ramp, rooted, sequence
from graphopt.targets.schedules.register_tiles import Axis, Run, Taps
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, extents, nodes, work

NAME = "depthwise_int8"
VERSION = 1
ANCHOR = "depthwise_int8"
HALF = 8
"""Channels that a product instruction takes."""
MOST_TAPS = 49
"""Of a window: all are written out."""
SUMS = 16
"""Registers for sums at most."""
_ADD = """define <4 x i32> @graphopt_saddw(<4 x i32> %sums, <8 x i16> %words) {
  %r = call <4 x i32> asm sideeffect "saddw $0.4s, $1.4s, $2.4h", "=w,w,w"(<4 x i32> %sums, <8 x i16> %words)
  ret <4 x i32> %r
}
define <4 x i32> @graphopt_saddw2(<4 x i32> %sums, <8 x i16> %words) {
  %r = call <4 x i32> asm sideeffect "saddw2 $0.4s, $1.4s, $2.8h", "=w,w,w"(<4 x i32> %sums, <8 x i16> %words)
  ret <4 x i32> %r
}"""
"""In assembly for the reason that `dot.DEFINITIONS` gives."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {columns}: outputs of a tile."""
    block = workload.anchor(ANCHOR)
    if block is None or "asimd" not in workload.machine.features or epilogue_of(workload, START) is None:
        return None
    names = list(workload.blocks)
    if not set(names[: names.index(ANCHOR)]) <= {"pad"}:
        return None
    _, _, _, lanes, k_h, k_w = extents(block)
    if lanes % HALF or k_h * k_w > MOST_TAPS:
        return None
    _, columns = _axes(block)
    most = min(SUMS * 4 // lanes, columns.extent)
    return [{"columns": n} for n in range(most, 0, -1) if n == most or n * 2 > most]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew."""
    parallel = work(workload.blocks[ANCHOR]) >= PARALLEL_WORK and workload.machine.threads != 1
    body = _Loops(workload).write(decision["columns"], parallel)
    return Kernel(workload.func.with_body(rooted(own_operators.importing(body, [_ADD]))))


def _axes(block) -> tuple[Axis, Axis]:
    k_h, k_w = extents(block)[4:]
    height, width, out_h, out_w, s_h, s_w, top, left, d_h, d_w, _ = (int(x) for x in block.annotations[WINDOW])
    return Axis(out_h, height, k_h, s_h, d_h, top), Axis(out_w, width, k_w, s_w, d_w, left)


class _Loops:
    def __init__(self, workload: Workload):
        from tvm.ir.expr import TensorLoad

        block = workload.blocks[ANCHOR]
        epilogue = epilogue_of(workload, START)
        assert epilogue is not None
        self.epilogue = epilogue
        self.rows, self.columns = _axes(block)
        self.batch, self.blocks, _, self.lanes = extents(block)[:4]
        self.pairs = bool(int(block.annotations[PAIRS]))
        self.start: Any = workload.blocks[START].body.value.b.source
        data, weight = nodes(block.body.value.b, TensorLoad)
        self.data, self.weight = data.source, weight.source
        if "pad" in workload.blocks:
            (load,) = nodes(workload.blocks["pad"].body, TensorLoad)
            self.data = load.source

    def write(self, columns: int, parallel: bool) -> Any:
        """Tiles of at most `columns` outputs."""
        row_runs, column_runs = self.rows.runs(1, clip=False), self.columns.runs(columns, clip=False)

        def row_of(n, block, run: Run, row) -> Any:
            return sequence(
                loop("column", c.count, lambda i, c=c: self._tile((n, block, row, c.first + i * c.size), run, c))
                for c in column_runs
            )

        def at(n, block, t) -> Any:
            return choose(t, row_runs, lambda run, i: row_of(n, block, run, run.first + i))

        sizes = {"n": self.batch, "block": self.blocks, "row": sum(run.count for run in row_runs)}
        return nest(sizes, at, parallel)

    def _tile(self, place: tuple[Any, Any, Any, Any], rows: Run, columns: Run) -> Any:
        from tvm import tirx

        n, block, row, column = place
        sums = tirx.decl_buffer((columns.size * self.lanes,), "int32", "sums", scope="local")
        down, across = self.rows.border, self.columns.border
        varies = int(self.start.shape[2]) > 1

        def begin(v) -> list[Any]:
            found = []
            for i in range(columns.size):
                seen = down.class_of(row) * across.classes + across.class_of(column + i) if varies else 0
                found.append(tirx.BufferStore(sums, self.start[0, block, seen, v], [i * self.lanes + v]))
            return found

        def store(v) -> list[Any]:
            found = []
            for i in range(columns.size):
                at = [n, block, row * self.columns.extent + column + i, v]
                numbers = [tirx.const(x, "int32") if isinstance(x, int) else x for x in at]
                result = self.epilogue.at(numbers, sums[i * self.lanes + v], [])
                found.append(tirx.BufferStore(self.epilogue.output, result, numbers))
            return found

        return sequence([tirx.AllocBuffer(sums), self._vector(begin), *self._products(place, rows, columns, sums),
                         self._vector(store)])  # fmt: skip

    def _products(self, place: tuple[Any, Any, Any, Any], rows: Run, columns: Run, sums: Any) -> list[Any]:
        """All taps of a tile, row by row; products of a first tap wait for those of a second."""
        n, block, row, column = place
        statements: list[Any] = []
        waiting: dict[int, list[Any]] = {}
        for kh in _numbers(rows.taps):
            y = row * self.rows.stride + kh * self.rows.dilation - self.rows.pad
            for right, readers in self.columns.readers(columns).items():
                x = column * self.columns.stride - self.columns.pad + right
                data = self._bound(statements, self.data, [n, block, y * self.columns.length + x])
                for output, kw in readers:
                    weight = self._bound(statements, self.weight, [block, kh, kw])
                    products = [self._multiplied(data, weight, half) for half in range(self.lanes // HALF)]
                    if not self.pairs:
                        self._add(statements, sums, output, products)
                    elif output in waiting:
                        first = waiting.pop(output)
                        self._add(statements, sums, output, [a + b for a, b in zip(first, products, strict=True)])
                    else:
                        waiting[output] = products
        for output, products in waiting.items():
            self._add(statements, sums, output, products)
        return statements

    def _multiplied(self, data: Any, weight: Any, half: int) -> Any:
        """int16 x 8: the products of 8 channels."""
        from tvm import tirx

        def part(vector: Any) -> Any:
            if self.lanes == HALF:
                return vector
            return tirx.Shuffle([vector], [tirx.const(half * HALF + i, "int32") for i in range(HALF)])

        return tirx.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull.v8i16", part(data), part(weight))

    def _add(self, statements: list[Any], sums: Any, output: int, words: list[Any]) -> None:
        from tvm import tirx

        for half, each in enumerate(words):
            for name, quarter in (("graphopt_saddw", 0), ("graphopt_saddw2", 4)):
                place = ramp(output * self.lanes + half * HALF + quarter, 4)
                total = tirx.call_pure_extern("int32x4", name, sums[place], each)
                statements.append(tirx.BufferStore(sums, total, [place]))

    def _bound(self, statements: list[Any], buffer: Any, at: list[Any]) -> Any:
        """A vector of all lanes in a register."""
        from tvm import tirx

        numbers = [tirx.const(x, "int32") if isinstance(x, int) else x for x in at]
        load: Any = tirx.BufferLoad(buffer, [*numbers, ramp(0, self.lanes)])
        held = tirx.Var("held", str(load.ty.dtype))
        statements.append(tirx.Bind(held, load))
        return held

    def _vector(self, statements) -> Any:
        from tvm import tirx

        v: Any = tirx.Var("v", "int32")
        zero, lanes = tirx.const(0, "int32"), tirx.const(self.lanes, "int32")
        return tirx.For(v, zero, lanes, tirx.ForKind.VECTORIZED, sequence(statements(v)))


def _numbers(taps: tuple[Taps, ...]) -> list[int]:
    return [tap for each in taps for tap in range(each.first, each.first + each.count)]
