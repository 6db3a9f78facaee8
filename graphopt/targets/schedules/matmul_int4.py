"""A few rows times weights of 4 bits in blocks, unpacked in registers.

Idea: the weights arrive as packed nibbles, 128 to a cache line, and are read once. With activations of bytes a line is
cut into two vectors of quads (a mask; a shift and a mask), each of which a dot product multiplies with a broadcast quad
of the row; a block's 32-bit sum starts from minus the zero point times the sum of the row's block, computed once a row,
and is scaled into a float32 sum at the block's end. With float32 activations each of the eight nibbles of a lane is
shifted out, converted, and multiplied by a broadcast number; the zero point is taken away from a block's sum likewise.
Lines are requested `ahead` of their use: hardware stops at the end of every page.

Loop order: row / tile of `outs` vectors of columns (parallel) / block / eight inputs / outs.

Register budget: 2 * outs sums + outs * 2 unpacked vectors + constants and broadcasts <= registers.

Source: Frantar et al., GPTQ, ICLR 2023, section 4; Gerganov et al., llama.cpp (products of blocks of 4 and 8 bits).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax import own_operators
from graphopt.targets.relax.block_weights import BLOCK, NAME, STEP, ZERO
from graphopt.targets.relax.computes import BYTES
from graphopt.targets.relax.integer_computes import QUAD
from graphopt.targets.schedules import dot, prefetch
from graphopt.targets.schedules.epilogue import epilogue_of
from graphopt.targets.schedules.loops import loop, nest, rooted, sequence
from graphopt.targets.schedules.workload import (
    PARALLEL_ELEMENTS,
    Decision,
    Kernel,
    Workload,
    divisors,
    extents,
    work,
)

VERSION = 1
AHEAD = (4096, 0, 1024)
"""Bytes between a line that is read and the one that is requested; 0: none is."""

__all__ = ["NAME", "VERSION", "apply", "match"]


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {outs, ahead}."""
    block = workload.anchor(NAME)
    if block is None or next(iter(workload.blocks)) != NAME or epilogue_of(workload, NAME) is None:
        return None
    _, tiles, _, lanes, *_ = extents(block)
    if dot.best_way(workload.machine) is None or lanes != workload.machine.lanes:
        return None
    most = 4 if workload.machine.registers > 16 else 2
    outs = divisors(tiles, most)[::-1]
    return [{"outs": n, "ahead": ahead} for ahead in AHEAD for n in outs]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew."""
    writer = _Writer(workload, decision)
    body = rooted(writer.body())
    if writer.is_bytes and writer.way in dot.DEFINITIONS:
        body = own_operators.importing(body, [dot.DEFINITIONS[writer.way]])
    return Kernel(workload.func.with_body(body))


class _Writer:
    def __init__(self, workload: Workload, decision: Decision):
        block = workload.blocks[NAME]
        epilogue = epilogue_of(workload, NAME)
        assert epilogue is not None
        self.epilogue = epilogue
        _, self.tiles, self.rows, self.lanes, self.blocks, self.steps, _ = extents(block)
        self.zero = int(block.annotations[ZERO])
        self.inputs = int(block.annotations[BLOCK])
        self.outs, self.ahead = decision["outs"], decision["ahead"]
        self.data, self.weight, self.scales, self.points = list(workload.func.params)[:4]
        self.is_bytes = str(self.data.ty.dtype) in BYTES
        way = dot.best_way(workload.machine)
        assert way is not None
        self.way: dot.Way = way
        self.parallel = work(block) >= PARALLEL_ELEMENTS and workload.machine.threads != 1

    def body(self) -> Any:
        from tvm import tirx

        kind = "int32" if self.is_bytes else "float32"
        self.totals = tirx.decl_buffer((self.rows * self.blocks,), kind, "totals")
        sums = nest({"m": self.rows, "b": self.blocks}, self._total, False)
        products = nest({"m": self.rows, "o": self.tiles // self.outs}, self._tile, self.parallel)
        return sequence([tirx.AllocBuffer(self.totals), sums, products])

    def _total(self, m: Any, b: Any) -> Any:
        """The sum of one row's block."""
        from tvm import tirx

        kind = "int32" if self.is_bytes else "float32"
        m, b = _number(m), _number(b)
        place = m * self.blocks + b
        zero = tirx.BufferStore(self.totals, tirx.const(0, kind), [place])

        def add(k: Any) -> Any:
            number = tirx.BufferLoad(self.data, [m, b * self.inputs + k])
            return tirx.BufferStore(self.totals, self.totals[place] + number.astype(kind), [place])

        return sequence([zero, loop("k", self.inputs, add)])

    def _tile(self, m: Any, o: Any) -> Any:
        """One row times `outs` vectors of columns."""
        from tvm import tirx

        m, first = _number(m), _number(o) * self.outs
        self.floats = self._registers("float32", "floats")
        self.parts = self._registers("int32" if self.is_bytes else "float32", "parts")
        clear = [tirx.BufferStore(self.floats, self._spread(0.0), [self._at(i)]) for i in range(self.outs)]
        buffers = [tirx.AllocBuffer(self.floats), tirx.AllocBuffer(self.parts)]
        blocks = loop("b", self.blocks, lambda b: self._block(m, first, _number(b)))
        return sequence([*buffers, *clear, blocks, self._store(m, first)])

    def _block(self, m: Any, first: Any, b: Any) -> Any:
        from tvm import tirx

        total = tirx.Broadcast(self.totals[m * self.blocks + b], self._lanes)
        begin, end = [], []
        for i in range(self.outs):
            at = self._at(i)
            if self.zero >= 0:
                point = self._spread(self.zero, "int32" if self.is_bytes else "float32")
            else:
                stored: Any = tirx.BufferLoad(self.points, [first + i, b, self._ramp(0, self.lanes)])
                point = stored.astype(f"int32x{self.lanes}")
                point = point if self.is_bytes else point.astype(f"float32x{self.lanes}")
            begin.append(tirx.BufferStore(self.parts, self._nought() - point * total, [at]))
            scale = tirx.BufferLoad(self.scales, [first + i, b, self._ramp(0, self.lanes)])
            part = self.parts[at] if not self.is_bytes else self.parts[at].astype(f"float32x{self.lanes}")
            end.append(tirx.BufferStore(self.floats, self.floats[at] + part * scale, [at]))
        steps = loop("j", self.steps, lambda j: self._step(m, first, b, _number(j)))
        return sequence([*begin, steps, *end])

    def _step(self, m: Any, first: Any, b: Any, j: Any) -> Any:
        """Eight inputs times the lanes of each vector."""
        place = (b * self.steps + j) * STEP
        stores = []
        for i in range(self.outs):
            indices = [first + i, b, j]
            if self.ahead:
                stores.append(prefetch.element(self.weight[(*indices, _number(self.ahead))], prefetch.L1))
            make = self._dot if self.is_bytes else self._multiply
            stores += make(m, place, indices, self._at(i))
        return sequence(stores)

    def _dot(self, m: Any, place: Any, indices: list[Any], at: Any) -> list[Any]:
        from tvm import tirx

        width = QUAD * self.lanes
        line = tirx.BufferLoad(self.weight, [*indices, self._ramp(0, width)])
        words = tirx.reinterpret(f"int32x{self.lanes}", line)
        low, four = self._spread(0x0F0F0F0F, "int32"), self._spread(4, "int32")
        found = []
        for half, nibbles in enumerate((words & low, (words >> four) & low)):
            quad = dot.quad_at(self.data, (m,), tirx.floordiv(place, QUAD) + half)
            vector = tirx.reinterpret(f"int8x{width}", nibbles)
            total = dot.small_products(self.way, self.lanes, self.parts[at], quad, vector)
            found.append(tirx.BufferStore(self.parts, total, [at]))
        return found

    def _multiply(self, m: Any, place: Any, indices: list[Any], at: Any) -> list[Any]:
        from tvm import tirx

        line = tirx.BufferLoad(self.weight, [*indices, self._ramp(0, QUAD * self.lanes)])
        words = tirx.reinterpret(f"int32x{self.lanes}", line)
        found = []
        for k in range(STEP):
            shift = 8 * (k % QUAD) + 4 * (k // QUAD)
            moved = words >> self._spread(shift, "int32") if shift else words
            nibble = (moved & self._spread(15, "int32")).astype(f"float32x{self.lanes}")
            number = tirx.Broadcast(tirx.BufferLoad(self.data, [m, place + k]), self._lanes)
            found.append(tirx.BufferStore(self.parts, self.parts[at] + nibble * number, [at]))
        return found

    def _store(self, m: Any, first: Any) -> Any:
        """Every column of the tile, through the epilogue."""
        from tvm import tirx

        v: Any = tirx.Var("v", "int32")
        stores = []
        for i in range(self.outs):
            place = [tirx.const(0, "int32"), first + i, m, v]
            result = self.epilogue.at(place, self.floats[i * self.lanes + v], [])
            stores.append(tirx.BufferStore(self.epilogue.output, result, place))
        zero, many = tirx.const(0, "int32"), tirx.const(self.lanes, "int32")
        return tirx.For(v, zero, many, tirx.ForKind.VECTORIZED, sequence(stores))

    @property
    def _lanes(self) -> Any:
        return self.lanes

    def _registers(self, kind: str, name: str) -> Any:
        from tvm import tirx

        return tirx.decl_buffer((self.outs * self.lanes,), kind, name, scope="local")

    def _at(self, i: int) -> Any:
        return self._ramp(i * self.lanes, self.lanes)

    def _ramp(self, first: int, count: Any) -> Any:
        from tvm import tirx

        return tirx.Ramp(tirx.const(first, "int32"), tirx.const(1, "int32"), count)

    def _spread(self, number: float, kind: str = "float32") -> Any:
        from tvm import tirx

        return tirx.Broadcast(tirx.const(number, kind), self._lanes)

    def _nought(self) -> Any:
        return self._spread(0, "int32" if self.is_bytes else "float32")


def _number(value: Any) -> Any:
    from tvm import tirx

    return tirx.const(value, "int32") if isinstance(value, int) else value
