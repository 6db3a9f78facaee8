"""The loop nest of a matrix product whose operands are copied to the order they are read in.

A nest multiplies `rows` x `vectors` register tiles: the left operand in tiles (row tile, K / 16, rows, 16), whose lines
do not collide in the first-level cache as the rows of a matrix do, the right operand in panels (panel, K, width) with
`width` = vectors * lanes. Row tiles that do not divide the rows overlap: the last one ends at the last row, and repeats
some of its neighbour's work, so that no tile is narrow. A product is stored tile by tile through a small buffer, where
one loop applies the fused elementwise chain.

`Fused` reads the left operand, the right operand and the elementwise chain off a fused function, as expressions: a
transposed or sliced operand is a matter of its indices.

Source: Goto and van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008, sections 4 and
5; Van Zee and van de Geijn: BLIS, ACM TOMS 41(3), 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.targets.relax import half
from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.workload import Machine, Workload, extents, new_schedule, nodes

DEPTH = 16
"""Elements of a row of the left operand that lie together."""
STEP = 4
"""Steps along the common axis that are unrolled: more of them make LLVM hoist broadcasts and spill."""


@dataclass(frozen=True)
class Fused:
    """A product block and what follows it, as expressions of its iteration variables."""

    axes: tuple[Any, ...]
    """Iteration variables of the block: spatial ones, then the common one."""
    extents: tuple[int, ...]
    left: Any
    right: Any
    product: Any
    """The buffer the block writes."""
    out: Any
    """The buffer that the last block stores."""
    out_axes: tuple[Any, ...]
    value: Any
    """What it stores at `out_axes`, with loads of `product` at the same place."""
    out_shape: tuple[int, ...]


def read_fused(workload: Workload, anchor: str) -> Fused | None:
    """The function as one product and one elementwise chain; None where it has another form."""
    from tvm.ir.expr import TensorLoad
    from tvm.s_tir.schedule import ScheduleError

    block = workload.blocks[anchor]
    names = list(workload.blocks)
    if names[0] != anchor or [int(v.iter_type) for v in block.iter_vars][-1] != 2:
        return None
    total = block.body.value
    product, factors = block.body.buffer, total.b
    if not hasattr(factors, "b"):
        return None
    schedule = new_schedule(workload.func)
    after = names[1:]
    try:
        for name in after[:-1]:
            schedule.compute_inline(schedule.get_sblock(name))
    except ScheduleError:
        return None
    spatial = tuple(v.var for v in block.iter_vars[:-1])
    whole = (tuple(v.var for v in block.iter_vars), tuple(extents(block)), factors.a, factors.b, product)
    if not after:
        return Fused(*whole, product, spatial, product[spatial], tuple(extents(block)[:-1]))
    last = schedule.get(schedule.get_sblock(after[-1]))
    axes = tuple(v.var for v in last.iter_vars)
    store = last.body
    if not hasattr(store, "value") or any(int(v.iter_type) != 0 for v in last.iter_vars):
        return None
    if len(axes) != len(store.indices) or not all(i.same_as(a) for i, a in zip(store.indices, axes, strict=True)):
        return None
    loads = [load for load in nodes(store.value, TensorLoad) if load.source.same_as(product)]
    same = all(len(x.indices) == len(axes) and all(i.same_as(a) for i, a in zip(x.indices, axes, strict=True))
               for x in loads)  # fmt: skip
    shape = tuple(extents(last))
    if not same or shape[:-1] != tuple(extents(block)[:-2]) or -1 in shape:
        return None
    return Fused(*whole, store.buffer, axes, store.value, shape)


def substitute(expression, values: Mapping[Any, Any]):
    """The expression with variables replaced."""
    import tvm_ffi
    from tvm.ir import Var

    pairs = list(values.items())

    def replaced(variable):
        for old, new in pairs:
            if variable.same_as(old):
                return new
        return variable

    return tvm_ffi.structural_map(expression, (Var, replaced))


def from_buffer(expression, buffer, load: Callable[[], Any]):
    """The expression with every load of `buffer` replaced by `load()`."""
    import tvm_ffi
    from tvm.ir.expr import TensorLoad

    return tvm_ffi.structural_map(
        expression, (TensorLoad, lambda found: load() if found.source.same_as(buffer) else found)
    )


def row_tile(rows: int, most: int) -> list[int]:
    """Tile heights that waste least by overlapping, best first; heights near `most` before small ones."""
    if rows <= most:
        return [rows]

    def cost(height: int) -> float:
        return -(-rows // height) * height / rows * (1 + 0.5 / height)

    return sorted(range(max(most // 2, 1), most + 1), key=cost)


def register_tiles(rows: int, columns: int, machine: Machine) -> list[dict[str, int]]:
    """Decisions {rows, vectors} for a product of this size, by predicted time."""
    lanes = machine.lanes
    found: list[tuple[float, dict[str, int]]] = []
    for vectors in (2, 3, 4, 1):
        if vectors > 1 and vectors * lanes >= columns + lanes:
            continue
        most = min((machine.registers - vectors - 1) // vectors, 14)
        if machine.lanes == half.LANES and by_element.has(machine):
            most = min(most, by_element.most_positions(vectors, machine.lanes))
        for height in row_tile(rows, most)[:2]:
            padded = -(-columns // (vectors * lanes)) * vectors * lanes / columns * -(-rows // height) * height / rows
            latency = max(8 / (height * vectors), 1)
            loads = max((height + vectors) / (height * vectors), 0.55)
            found.append((padded * latency * (1 + loads / 4), {"rows": height, "vectors": vectors}))
    found.sort(key=lambda pair: pair[0])
    return [decision for _, decision in found]


@dataclass(frozen=True)
class Nest:
    """Extents of one product and the blocking chosen for it."""

    rows: int
    columns: int
    depth: int
    tile: int
    vectors: int
    lanes: int
    chunks: int
    """Pieces of the common axis; the partial sums of all but the last are kept in memory."""
    band: int
    """Row tiles whose left operand is copied at a time."""
    number: str = "float32"
    """What is multiplied and added. float16 is multiplied by elements of vectors, and the sums of each piece of the
    common axis are a run of their own (`half`)."""

    @property
    def is_half(self) -> bool:
        return self.number == "float16"

    @property
    def step(self) -> int:
        """Steps along the common axis that are unrolled."""
        return self.lanes if self.is_half else STEP

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        return -(-self.columns // self.width)

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def piece(self) -> int:
        """Steps of a chunk: a multiple of DEPTH."""
        return -(-self.depth // (self.chunks * DEPTH)) * DEPTH

    @property
    def panel_elements(self) -> int:
        return self.piece * self.width


def emit(
    nest: Nest,
    left: Callable[[Any, Any], Any],
    panel: Callable[[Any, Any, Any], Any],
    store: Callable[[Any, Any, Any, Any], None],
    *,
    parallel: bool,
    prefetch: Callable[[Any, Any, Any, int], Sequence[Any]] | None = None,
) -> None:
    """Emit the nest into the IRBuilder that is open.

    left(row, k): an element of the left operand. panel(chunk, panel, offset): the vector of the right operand's panel
    that begins at `offset`. store(row, column, lane, product): statements that store an element of the result.
    prefetch(chunk, panel, number, count): statements that request `count` lines of a panel, from line `number` on.
    """
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    height, lanes, width = nest.tile, nest.lanes, nest.width
    bands = -(-nest.tiles // nest.band)
    depths = nest.piece // DEPTH
    copied: Any = T.sblock_alloc_buffer((nest.band, depths, height, DEPTH), nest.number, scope="global")
    partial: Any = None
    if nest.chunks > 1:
        partial = T.sblock_alloc_buffer((nest.panels, nest.band, height * width), nest.number, scope="global")

    zero = T.broadcast(tirx.const(0, nest.number), lanes)

    def first_row(tile):
        return tirx.min(tile * height, nest.rows - height)

    def each(count: Any) -> Any:
        return T.parallel(0, count) if parallel else T.serial(0, count)

    steps = (nest.piece if nest.chunks > 1 else -(-nest.depth // nest.step) * nest.step) // nest.step
    resumes = nest.chunks > 1 and not nest.is_half
    with T.serial(0, bands) as band:
        count = nest.band if bands == 1 else tirx.min(nest.band, nest.tiles - band * nest.band)
        if nest.chunks > 1:  # written here, so that the sums outlive a turn of the next loop
            with each(nest.panels) as j, T.serial(0, count) as tile, T.serial(0, height * nest.vectors) as v:
                T.buffer_store(partial, zero, [j, tile, T.ramp(v * lanes, 1, lanes)])
        with T.serial(0, nest.chunks) as chunk:
            with each(count) as tile:
                _copy_left(nest, copied, tile, first_row(band * nest.band + tile), chunk, left)
            with each(nest.panels) as j, T.serial(0, count) as tile:
                sums: Any = T.alloc_buffer((height * width,), nest.number, scope="local")
                vectors = [T.ramp(i * lanes, 1, lanes) for i in range(height * nest.vectors)]

                for ramp in vectors:
                    T.buffer_store(sums, partial[j, tile, ramp] if resumes else zero, [ramp])
                with T.serial(0, steps) as step:
                    if prefetch is not None:
                        lines = -(-nest.panel_elements // (DEPTH * nest.tiles * steps))
                        number = ((band * nest.band + tile) * steps + step) * lines
                        for statement in prefetch(chunk, j + 1, number, lines):
                            T.evaluate(statement.value)
                    numbers = _numbers(nest, copied, tile, step)
                    for i in range(nest.step):
                        k = step * nest.step + i
                        weights = [panel(chunk, j, k * width + v * lanes) for v in range(nest.vectors)]
                        for r in range(height):
                            if nest.is_half:
                                scalar = by_element.spread(numbers[r], i, lanes)
                            else:
                                scalar = T.broadcast(copied[tile, k // DEPTH, r, k % DEPTH], lanes)
                            for v, weight in enumerate(weights):
                                ramp = vectors[r * nest.vectors + v]
                                T.buffer_store(sums, sums[ramp] + scalar * weight, [ramp])

                def keep(j=j, tile=tile, sums=sums, vectors=vectors):
                    for ramp in vectors:
                        value = sums[ramp] if resumes else partial[j, tile, ramp] + sums[ramp]
                        T.buffer_store(partial, value, [j, tile, ramp])

                def finish(j=j, tile=tile, sums=sums, vectors=vectors):
                    if nest.chunks > 1 and not resumes:
                        for ramp in vectors:
                            T.buffer_store(sums, partial[j, tile, ramp] + sums[ramp], [ramp])
                    _store_tile(nest, sums, vectors, j, first_row(band * nest.band + tile), store)

                _either(chunk > nest.chunks - 2 if nest.chunks > 1 else None, finish, keep)


def _numbers(nest: Nest, copied, tile, step) -> list[Any]:
    """A vector of each row's next numbers, where these are multiplied by element."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    if not nest.is_half:
        return []
    first = step * nest.step
    found = []
    for r in range(nest.tile):
        place = [tile, first // DEPTH, r, T.ramp(first % DEPTH, 1, nest.lanes)]
        found.append(tirx.BufferLoad(copied, place))
    return found


def _either(condition, first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Emit `first` where the condition holds, else `second`; a condition of None always holds."""
    from tvm.script.ir_builder import tirx as T

    if condition is None:
        first()
        return
    with T.If(condition):
        with T.Then():
            first()
        with T.Else():
            second()


def _copy_left(nest: Nest, copied, tile, row, chunk, left) -> None:
    """One row tile's piece of the left operand, DEPTH elements of each row at a time; zeros past its end."""

    def last():
        _copy_piece(nest, copied, tile, row, (nest.chunks - 1) * nest.piece, nest.depth, left)

    def whole():
        _copy_piece(nest, copied, tile, row, chunk * nest.piece, None, left)

    if nest.chunks * nest.piece == nest.depth:
        whole()
    else:
        _either(chunk > nest.chunks - 2 if nest.chunks > 1 else None, last, whole)


def _copy_piece(nest: Nest, copied, tile, row, begin, end: int | None, left) -> None:
    """`end` None: a whole piece from `begin`, an expression; else what there is from the number `begin` on."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    zero = tirx.const(0, nest.number)
    length = nest.piece if end is None else end - begin
    full, rest = divmod(length, DEPTH)
    if full:
        with T.serial(0, full) as block, T.serial(0, nest.tile) as r, T.vectorized(0, DEPTH) as lane:
            T.buffer_store(copied, left(row + r, begin + block * DEPTH + lane), [tile, block, r, lane])
    if rest:
        with T.serial(0, nest.tile) as r:
            with T.serial(0, rest) as lane:
                T.buffer_store(copied, left(row + r, begin + full * DEPTH + lane), [tile, full, r, lane])
            with T.serial(0, DEPTH - rest) as lane:
                T.buffer_store(copied, zero, [tile, full, r, rest + lane])
    blank = nest.piece // DEPTH - full - bool(rest)
    if blank and nest.chunks > 1:
        with T.serial(0, blank) as block, T.serial(0, nest.tile) as r, T.vectorized(0, DEPTH) as lane:
            T.buffer_store(copied, zero, [tile, full + bool(rest) + block, r, lane])


def _store_tile(nest: Nest, sums, vectors, j, row, store) -> None:
    """Registers to a buffer, then the elementwise chain in one loop over it."""
    from tvm.script.ir_builder import tirx as T

    height, lanes, width = nest.tile, nest.lanes, nest.width
    tile: Any = T.alloc_buffer((height, width), nest.number, scope="local")
    for i, ramp in enumerate(vectors):
        place = T.ramp(i % nest.vectors * lanes, 1, lanes)
        T.buffer_store(tile, sums[ramp], [i // nest.vectors, place])

    def whole(r, vector_count: int) -> None:
        with T.serial(0, vector_count) as v, T.vectorized(0, lanes) as lane:
            store(row + r, j * width + v * lanes, lane, tile[r, v * lanes + lane])

    rest = nest.columns % width
    with T.serial(0, height) as r:
        if rest and nest.panels == 1:
            _rest_of_row(nest, tile, rest, j, row, r, whole, store)
            return
        _either(
            j < nest.panels - 1 if rest else None,
            lambda: whole(r, nest.vectors),
            lambda: _rest_of_row(nest, tile, rest, j, row, r, whole, store),
        )


def _rest_of_row(nest: Nest, tile, rest: int, j, row, r, whole, store) -> None:
    from tvm.script.ir_builder import tirx as T

    full, narrow = divmod(rest, nest.lanes)
    if full:
        whole(r, full)
    if narrow:
        begin = full * nest.lanes
        with T.vectorized(0, narrow) as lane:
            store(row + r, j * nest.width + begin, lane, tile[r, begin + lane])


def split_rows(row, shape: Sequence[int]) -> list[Any]:
    """Indices of the leading axes of `shape` for a row that counts through all of them."""
    from tvm import tirx

    found: list[Any] = []
    for extent in reversed(shape[1:]):
        found.append(tirx.floormod(row, extent) if extent > 1 else tirx.const(0, "int32"))
        row = tirx.floordiv(row, extent) if extent > 1 else row
    found.append(row)
    return found[::-1]
