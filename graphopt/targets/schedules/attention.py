"""Attention of one head at a time: scores, mask, softmax and weighted values without a matrix in memory.

Idea: queries are the lanes of vectors. A block of queries is transposed once; its scores are a matrix (keys, queries)
of the first-level cache, each of whose rows is a key times the block, so that a number of the key is broadcast and
keys are read where they lie. Maxima, exponentials and sums then run over rows, vector by vector, with no step across
lanes and no rest at the end of a row. The weighted values read the same matrix by broadcasts, so that their vectors are
features and are stored as they are; they are divided by the sums at the very end.

Loop order: batch and head (parallel) / block of queries / key tiles, features | keys | query tiles, keys.

Register budget: keys * vectors sums + vectors queries + 1 broadcast; rows * features / lanes sums + as many values + 1.

Source: Dao et al., FlashAttention, NeurIPS 2022, section 3.1; Milakov, Gimelshein: Online Normalizer Calculation for
Softmax, arXiv:1805.02867, 2018, section 2 (the safe form).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax import attention as computed
from graphopt.targets.relax.elementwise import share_of
from graphopt.targets.schedules import gemm
from graphopt.targets.schedules.rowwise import LOWEST
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, new_schedule, nodes, unique

NAME = "attention"
VERSION = 1
ANCHOR = "attention"
BLOCK_BYTES = 40 << 10
"""Most of the first-level cache for the scores of a block of queries."""
STEP = 4
"""Features, or keys, that are unrolled."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {vectors, keys, rows}: vectors of queries a block has, keys a tile, and queries a tile of values."""
    if workload.anchor(ANCHOR) is None or next(iter(workload.blocks)) != "attention_scores":
        return None
    if _epilogue(workload) is None:
        return None
    _, _, rows, columns, _, width = _geometry(workload)
    lanes, registers = workload.machine.lanes, workload.machine.registers
    needed = -(-rows // lanes)
    wide = _values_at_once(width // lanes)
    found = []
    for vectors in (2, 3, 1):
        if vectors > needed and vectors > 1:
            continue
        if vectors > 1 and vectors * lanes * columns * 4 > BLOCK_BYTES:
            continue
        keys = gemm.row_tile(columns, min((registers - vectors - 1) // vectors, 14))[0]
        tiles = gemm.row_tile(min(vectors * lanes, rows), min((registers - wide - 1) // wide, 14))
        found += [{"vectors": vectors, "keys": keys, "rows": tile} for tile in tiles[:2]]
    return unique(found) or None


def _values_at_once(vectors: int) -> int:
    """Vectors of features whose sums are kept together."""
    return next(n for n in (4, 3, 2, 1) if vectors % n == 0)


def _geometry(workload: Workload) -> list[int]:
    return [int(x) for x in workload.blocks[ANCHOR].annotations[computed.GEOMETRY]]


def _epilogue(workload: Workload):
    """The last block, all between it and the attention inlined into it; None where it has another form."""
    from tvm.s_tir.schedule import ScheduleError

    names = list(workload.blocks)
    after = names[names.index(ANCHOR) + 1 :]
    if not after:
        return workload.blocks[ANCHOR]
    schedule = new_schedule(workload.func)
    try:
        for name in after[:-1]:
            schedule.compute_inline(schedule.get_sblock(name))
    except ScheduleError:
        return None
    last = schedule.get(schedule.get_sblock(after[-1]))
    store = last.body
    axes = [v.var for v in last.iter_vars]
    if not hasattr(store, "value") or len(store.indices) != len(axes) or len(axes) != 4:
        return None
    if not all(i.same_as(a) for i, a in zip(store.indices, axes, strict=True)):
        return None
    return last


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `attention`."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    batch, heads, rows, columns, size, width = _geometry(workload)
    parallel = workload.machine.threads != 1 and batch * heads > 1
    parallel = parallel and batch * heads * rows * columns * (size + width) >= PARALLEL_WORK
    head = _Head(workload, decision)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        with T.parallel(0, batch * heads) if parallel else T.serial(0, batch * heads) as turn:
            head.b, head.h = tirx.floordiv(turn, heads), tirx.floormod(turn, heads)
            blocks = -(-rows // head.width)
            with T.serial(0, blocks) as number:
                head.first = tirx.min(number * head.width, max(rows - head.width, 0))
                head.write()
    made: Any = builder.get()
    return Kernel(tirx.PrimFunc(workload.func.params, made.body, workload.func.ret_type, workload.func.attrs))


class _Head:
    """Emits one block of queries of one head."""

    def __init__(self, workload: Workload, decision: Decision):
        from tvm.ir.expr import TensorLoad

        self.batch, self.heads, self.rows, self.columns, self.size, self.wide = _geometry(workload)
        self.lanes, self.vectors = workload.machine.lanes, decision["vectors"]
        self.keys, self.tile = decision["keys"], decision["rows"]
        self.width = self.vectors * self.lanes
        blocks = workload.blocks
        factors = blocks["attention_scores"].body.value.b
        self.q, self.k = factors.a.a.source, factors.b.source
        self.factor = factors.a.b
        self.offsets = [int(n) for n in blocks[ANCHOR].annotations[computed.OFFSETS]]
        self.v = blocks[ANCHOR].body.value.b.b.source
        self.masked = blocks.get("attention_masked")
        self.scores = blocks["attention_scores"].body.buffer
        self.last = _epilogue(workload)
        self.product = blocks[ANCHOR].body.buffer
        self.loads = [] if self.last is None else nodes(self.last.body.value, TensorLoad)
        self.b: Any = None
        self.h: Any = None
        self.first: Any = None

    def write(self) -> None:
        from tvm.script.ir_builder import tirx as T

        queries: Any = T.sblock_alloc_buffer((self.size, self.width), "float32", scope="global")
        shares: Any = T.sblock_alloc_buffer((self.columns, self.width), "float32", scope="global")
        inverse: Any = T.sblock_alloc_buffer((self.width,), "float32", scope="global")
        top: Any = T.alloc_buffer((self.width,), "float32", scope="local")
        self._transpose(queries)
        self._score(queries, shares, top)
        self._exponentiate(shares, top, inverse)
        self._weigh(shares, inverse)

    def _at(self, source, row, column):
        """An element of rows in blocks; `column` is a multiple of something, plus a small number."""
        from tvm import tirx

        lanes = int(source.shape[3])
        if int(source.shape[1]) == 1:
            return source[0, 0, row, column]
        return source[0, tirx.floordiv(column, lanes), row, tirx.floormod(column, lanes)]

    def _transpose(self, queries) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        whole = min(self.rows, self.width)
        with T.serial(0, self.size // self.lanes) as chunk:
            with T.serial(0, whole) as row, T.serial(0, self.lanes) as lane:
                at = self._at(self.q, self.b * self.rows + self.first + row,
                              self.offsets[0] + self.h * self.size + chunk * self.lanes + lane)  # fmt: skip
                T.buffer_store(queries, at * self.factor, [chunk * self.lanes + lane, row])
            if whole < self.width:
                with T.serial(0, self.lanes) as lane, T.serial(0, self.width - whole) as row:
                    T.buffer_store(queries, tirx.const(0, "float32"), [chunk * self.lanes + lane, whole + row])

    def _score(self, queries, shares, top) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        lanes, keys, vectors = self.lanes, self.keys, self.vectors
        ramps = [T.ramp(i * lanes, 1, lanes) for i in range(keys * vectors)]
        for v in range(vectors):
            T.buffer_store(top, T.broadcast(tirx.const(LOWEST, "float32"), lanes), [ramps[v]])
        zero = T.broadcast(tirx.const(0, "float32"), lanes)
        with T.serial(0, -(-self.columns // keys)) as tile:
            key = tirx.min(tile * keys, self.columns - keys)
            sums: Any = T.alloc_buffer((keys * self.width,), "float32", scope="local")
            for ramp in ramps:
                T.buffer_store(sums, zero, [ramp])
            with T.serial(0, self.size // STEP) as step:
                for i in range(STEP):
                    d = step * STEP + i
                    block = [queries[d, T.ramp(v * lanes, 1, lanes)] for v in range(vectors)]
                    for r in range(keys):
                        column = self.offsets[1] + self.h * self.size + d
                        number = self._at(self.k, self.b * self.columns + key + r, column)
                        scalar = T.broadcast(number, lanes)
                        for v, query in enumerate(block):
                            place = ramps[r * vectors + v]
                            T.buffer_store(sums, sums[place] + scalar * query, [place])
            held: Any = T.alloc_buffer((keys, self.width), "float32", scope="local")
            for i, ramp in enumerate(ramps):
                T.buffer_store(held, sums[ramp], [i // vectors, T.ramp(i % vectors * lanes, 1, lanes)])
            with T.serial(0, keys) as r:
                for v in range(vectors):
                    with T.vectorized(0, lanes) as lane:
                        place = v * lanes + lane
                        value = self._masked(place, key + r, held[r, place])
                        T.buffer_store(shares, value, [key + r, place])
                        T.buffer_store(top, tirx.max(top[place], shares[key + r, place]), [place])

    def _masked(self, place, key, score):
        from tvm import tirx

        if self.masked is None:
            return score
        value = gemm.from_buffer(self.masked.body.value, self.scores, lambda: score)
        row = self.first + place
        if self.rows < self.width:
            row = tirx.min(row, self.rows - 1)
        axes = [v.var for v in self.masked.iter_vars]
        return gemm.substitute(value, dict(zip(axes, [self.b, self.h, row, key], strict=True)))

    def _exponentiate(self, shares, top, inverse) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        lanes = self.lanes
        ways = 2 if self.columns % 2 == 0 else 1
        total: Any = T.alloc_buffer((ways * self.width,), "float32", scope="local")
        with T.serial(0, ways * self.vectors) as v, T.vectorized(0, lanes) as lane:
            T.buffer_store(total, tirx.const(0, "float32"), [v * lanes + lane])
        with T.serial(0, self.columns // ways) as turn:
            for way in range(ways):
                for v in range(self.vectors):
                    with T.vectorized(0, lanes) as lane:
                        place, key = v * lanes + lane, turn * ways + way
                        T.buffer_store(shares, share_of(shares[key, place] - top[place]), [key, place])
                        sum_ = way * self.width + place
                        T.buffer_store(total, total[sum_] + shares[key, place], [sum_])
        for v in range(self.vectors):
            with T.vectorized(0, lanes) as lane:
                place = v * lanes + lane
                whole = total[place] + total[self.width + place] if ways == 2 else total[place]
                whole = tirx.max(whole, tirx.const(computed.LEAST, "float32"))
                T.buffer_store(inverse, tirx.const(1, "float32") / whole, [place])

    def _weigh(self, shares, inverse) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        lanes, tile = self.lanes, self.tile
        at_once = _values_at_once(self.wide // lanes)
        ramps = [T.ramp(i * lanes, 1, lanes) for i in range(tile * at_once)]
        zero = T.broadcast(tirx.const(0, "float32"), lanes)
        whole = min(self.rows, self.width)
        steps, rest = divmod(self.columns, STEP)
        with T.serial(0, self.wide // lanes // at_once) as part, T.serial(0, -(-whole // tile)) as number:
            row: Any = tirx.min(number * tile, whole - tile)
            column = self.h * self.wide + part * (at_once * lanes)
            sums: Any = T.alloc_buffer((tile * at_once * lanes,), "float32", scope="local")
            for ramp in ramps:
                T.buffer_store(sums, zero, [ramp])

            def add(key, sums=sums, row=row, column=column) -> None:
                at = self.b * self.columns + key
                values = [self._vector(self.v, at, self.offsets[2] + column + v * lanes) for v in range(at_once)]
                for r in range(tile):
                    scalar = T.broadcast(shares[key, row + r], lanes)
                    for v, value in enumerate(values):
                        place = ramps[r * at_once + v]
                        T.buffer_store(sums, sums[place] + scalar * value, [place])

            if steps:
                with T.serial(0, steps) as step:
                    for i in range(STEP):
                        add(step * STEP + i)
            for i in range(rest):
                add(tirx.const(steps * STEP + i, "int32"))
            held: Any = T.alloc_buffer((tile, at_once * lanes), "float32", scope="local")
            for i, ramp in enumerate(ramps):
                T.buffer_store(held, sums[ramp], [i // at_once, T.ramp(i % at_once * lanes, 1, lanes)])
            with T.serial(0, tile) as r:
                for v in range(at_once):
                    with T.vectorized(0, lanes) as lane:
                        done = held[r, v * lanes + lane] * inverse[row + r]
                        self._store(row + r, column + v * lanes, lane, done)

    def _vector(self, source, row, column):
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        lanes = int(source.shape[3])
        if int(source.shape[1]) == 1:
            return source[0, 0, row, T.ramp(column, 1, self.lanes)]
        place = T.ramp(tirx.floormod(column, lanes), 1, self.lanes)
        return source[0, tirx.floordiv(column, lanes), row, place]

    def _store(self, row, column, lane, value) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        assert self.last is not None
        block = int(self.product.shape[3])
        spots = [tirx.const(0, "int32"), tirx.floordiv(column, block), self.b * self.rows + self.first + row,
                 tirx.floormod(column, block) + lane]  # fmt: skip
        out = self.last.body.buffer
        if not out.same_as(self.product):
            axes = [v.var for v in self.last.iter_vars]
            made = gemm.from_buffer(self.last.body.value, self.product, lambda: value)
            value = gemm.substitute(made, dict(zip(axes, spots, strict=True)))
        T.buffer_store(out, value, spots)
