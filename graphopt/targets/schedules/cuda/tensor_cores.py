"""Convolutions and products with a constant on tensor cores: float16, bfloat16, or int8.

Idea: a block of threads computes a tile of the matrix product (`products`) in steps of `depth`. Both operands lie in
shared memory as rows of k, so spaced that the eight rows of a matrix load fall into different banks. There are two such
buffers: while warps multiply from one, the next step's elements are on their way to registers, and go to the other.
Where a layer has few tiles, `slices` groups of warps share out each step's k between them, so that more warps are there
to hide latencies.

The sums leave through shared memory, a row of fragments of each warp at a time: there the chain after the product
(bias, activation, residual, rounding) is computed on four neighbours a thread, and written once.

The constant is repacked to [columns][depth], k innermost, with zeros up to whole tiles.

Decision: {rows, columns, depth, down, across, slices}: the tile, the step, warps along each and along k. By default the
one that `predicted` says is fastest: nothing is measured.

Source: Chetlur et al., cuDNN, arXiv:1410.0759, 2014, section 3; NVIDIA, CUTLASS, "Efficient GEMM in CUDA" (tiles of
blocks, warps and instructions; sliced k; software pipelining).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from graphopt.targets.schedules import amx
from graphopt.targets.schedules.cuda.gpu import WARP, Gpu, GpuWorkload
from graphopt.targets.schedules.cuda.products import Product, output_place, product_of
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.workload import Decision, Kernel

NAME = "tensor_cores"
VERSION = 1
FRAGMENT = 16
"""Rows, columns and depth of one instruction's matrices."""
SUMS = {"float16": "float32", "bfloat16": "float32", "int8": "int32"}
BYTES = {"float16": 2, "bfloat16": 2, "int8": 1}
FEATURES = {"float16": "tensor_fp16", "bfloat16": "tensor_bf16", "int8": "tensor_int8"}
LOAD_BYTES = 16
"""What a thread moves at a time."""
STORED_TOGETHER = 4
"""Outputs a thread computes side by side: 16 bytes of sums; TVM writes wider vectors of float32 element by element."""
LEAST_ROWS = 8
"""Below these a product streams its weight: matrix units would idle."""
TILES = (
    (128, 128, 4, 2), (128, 64, 4, 2), (64, 128, 2, 4), (64, 64, 2, 2), (64, 32, 2, 2), (32, 64, 2, 2), (128, 32, 4, 1),
    (32, 32, 2, 2), (32, 32, 1, 1), (16, 64, 1, 2), (16, 32, 1, 1), (64, 16, 2, 1), (16, 16, 1, 1),
)  # fmt: skip
"""Rows and columns of a block's tile, warps down and across."""
DEPTHS = (32, 64)
SLICES = (1, 2, 4)
MOST_SHARED = 96 << 10
"""Shared memory of a block, in bytes; beyond 48 KB the kernel asks the driver for it."""
MOST_SUMS = 64
"""Registers of a thread for sums: with operands on their way and addresses, all fit."""


def match(workload: GpuWorkload) -> list[Decision] | None:
    """Decisions, the one predicted to be fastest first."""
    product = product_of(workload)
    if product is None or product.weight_dtype not in SUMS:
        return None
    dtype = product.weight_dtype
    if FEATURES[dtype] not in workload.gpu.limits.features or product.rows < LEAST_ROWS:
        return None
    if product.data_dtype != dtype and not (product.planes and product.data_dtype == "float32" and dtype != "int8"):
        return None
    if epilogue_of(workload, product.anchor) is None:
        return None
    found = []
    for rows, columns, down, across in TILES:
        for depth in DEPTHS:
            for slices in SLICES:
                tile = Tile(rows, columns, depth, down, across, slices)
                if tile.fits(product, workload.gpu):
                    found.append((predicted(product, tile, workload.gpu), tile.decision))
    found.sort(key=lambda pair: pair[0])
    return [decision for _, decision in found] or None


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes, and how its warps share it out."""

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    slices: int

    @property
    def decision(self) -> Decision:
        return dict(vars(self))

    @property
    def threads(self) -> int:
        return WARP * self.down * self.across * self.slices

    @property
    def grid(self) -> tuple[int, int]:
        """Fragments of one warp: down, across."""
        return self.rows // self.down // FRAGMENT, self.columns // self.across // FRAGMENT

    def layout(self, dtype: str) -> tuple[int, int]:
        """Planes of an operand in shared memory, and elements from a row of a plane to the next.

        A fragment must start at a multiple of 32 bytes. Those of bytes have a plane of their own, in which they follow
        each other without a gap; others are parts of long rows.
        """
        return (self.depth // FRAGMENT, FRAGMENT) if dtype == "int8" else (1, self.depth + LOAD_BYTES // BYTES[dtype])

    @property
    def out_pitch(self) -> int:
        return self.columns + 4

    def operand_bytes(self, dtype: str) -> int:
        planes, pitch = self.layout(dtype)
        return 2 * (self.rows + self.columns) * planes * pitch * BYTES[dtype]

    @property
    def out_bytes(self) -> int:
        return self.slices * self.down * FRAGMENT * self.out_pitch * 4

    def loads(self, rows: int, dtype: str) -> int:
        """Moves of 16 bytes that each thread makes for one step of an operand."""
        return ceil(rows * self.depth * BYTES[dtype] / LOAD_BYTES / self.threads)

    def registers(self, dtype: str) -> int:
        """An estimate, a thread: sums, operands on their way and in fragments, addresses."""
        down, across = self.grid
        moving = 4 * (self.loads(self.rows, dtype) + self.loads(self.columns, dtype))
        return down * across * 8 + moving + 8 * (down + across) // (1 if dtype != "int8" else 2) + 40

    def fits(self, product: Product, gpu: Gpu) -> bool:
        dtype = product.weight_dtype
        down, across = self.grid
        if down * across * 8 > MOST_SUMS or self.depth % (FRAGMENT * self.slices) or self.threads > 512:
            return False
        if self.columns > FRAGMENT and self.columns >= 2 * product.columns:
            return False
        if self.rows > FRAGMENT and self.rows >= 2 * product.rows:
            return False
        return self.operand_bytes(dtype) + self.out_bytes <= min(gpu.limits.shared_bytes - 1024, MOST_SHARED)

    def resident(self, dtype: str, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at a time."""
        limits = gpu.limits
        shared = self.operand_bytes(dtype) + self.out_bytes + 1024  # the driver's own share
        return max(
            min(
                limits.threads // self.threads,
                limits.blocks,
                limits.shared_bytes // shared,
                limits.registers // (self.registers(dtype) * self.threads),
            ),
            1,
        )


MULTIPLY_BYTES = 2048
"""Of float16 or int8 products, in bytes of one operand's k: what the matrix units of a multiprocessor do a cycle."""
SHARED_BYTES = 128
"""From shared memory, a cycle and multiprocessor."""
MEMORY_BYTES = 32
"""From the second-level cache, a cycle and multiprocessor."""
STEP_CYCLES = 60
"""Barriers and addresses of a step, which nothing hides."""
LATENCY_CYCLES = 600
"""Of one load from memory; a step waits for it where other blocks have less to do."""


def predicted(product: Product, tile: Tile, gpu: Gpu) -> float:
    """Cycles of the whole product, from the counts of what passes each unit. A rule, not a measurement."""
    dtype = product.weight_dtype
    width = BYTES[dtype]
    down, across = tile.grid
    blocks = ceil(product.rows / tile.rows) * ceil(product.columns / tile.columns)
    steps = ceil(product.depth / tile.depth)
    multiply = tile.rows * tile.columns * tile.depth * width / MULTIPLY_BYTES
    reads = (down + across) * FRAGMENT * tile.depth // tile.slices * width * tile.threads // WARP
    writes = (tile.rows + tile.columns) * tile.depth * width
    moved = max(multiply, (reads + writes) / SHARED_BYTES, writes / MEMORY_BYTES)
    resident = min(tile.resident(dtype, gpu), ceil(blocks / gpu.multiprocessors))
    step = max(resident * moved + STEP_CYCLES, LATENCY_CYCLES / 2 if product.channels > 1 else LATENCY_CYCLES)
    finish = tile.rows * tile.columns * 4 * (tile.slices + 1) / SHARED_BYTES + LATENCY_CYCLES
    rounds = ceil(blocks / (gpu.multiprocessors * resident))
    return rounds * (steps * step + resident * finish)


def apply(workload: GpuWorkload, decision: Decision) -> Kernel:
    """The function written anew, threads and all; its weight is repacked to [columns][depth]."""
    product = product_of(workload)
    assert product is not None
    epilogue = epilogue_of(workload, product.anchor)
    assert epilogue is not None
    tile = Tile(**{key: int(value) for key, value in decision.items()})
    writer = _Writer(workload, product, tile, epilogue)
    whole = writer.weight_shape

    def repack(weight: np.ndarray) -> np.ndarray:
        return product.transposed(weight, *whole)

    return Kernel(writer.function(), {product.weight_index: repack})


class _Writer:
    def __init__(self, workload: GpuWorkload, product: Product, tile: Tile, epilogue: Epilogue):
        self.workload, self.product, self.tile, self.epilogue = workload, product, tile, epilogue
        self.dtype = product.weight_dtype
        self.vector = LOAD_BYTES // BYTES[self.dtype]
        self.steps = ceil(product.depth / tile.depth)
        self.blocks = ceil(product.rows / tile.rows), ceil(product.columns / tile.columns)
        self.weight_shape = self.blocks[1] * tile.columns, self.steps * tile.depth
        self.in_vectors = product.channels % self.vector == 0

    def function(self):
        from tvm.script.ir_builder import IRBuilder

        T = amx.ir()
        product, tile = self.product, self.tile
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            self.renamed = []
            for index, old in enumerate(self.workload.func.params):
                shape, dtype = [int(d) for d in old.ty.shape], str(old.ty.dtype)
                shape = list(self.weight_shape) if index == product.weight_index else shape
                self.renamed.append((old, T.arg(str(old.name), T.buffer(shape, dtype))))
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            self.data = self.renamed[product.data_index][1]
            self.weight = self.renamed[product.weight_index][1]
            self.output = next(new for old, new in self.renamed if old.same_as(self.epilogue.output))
            with (
                _threads("blockIdx.x", self.blocks[0] * self.blocks[1]) as block,
                _threads("threadIdx.y", tile.threads // WARP) as warp,
                _threads("threadIdx.x", WARP) as lane,
            ):
                self._block(block, warp, lane)
        return builder.get()

    def _block(self, block, warp, lane) -> None:
        T = amx.ir()
        tile, dtype = self.tile, self.dtype
        down, across = tile.grid
        # Neighbouring blocks share the rows of A: these are the larger operand, and stay in the second-level cache.
        self.row0 = block // self.blocks[1] * tile.rows
        self.column0 = block % self.blocks[1] * tile.columns
        self.thread = warp * WARP + lane
        self.slice, within = warp // (tile.down * tile.across), warp % (tile.down * tile.across)
        self.warp_row, self.warp_column = within // tile.across, within % tile.across
        planes, pitch = tile.layout(dtype)
        self.a = T.alloc_buffer((2, planes, tile.rows, pitch), dtype, scope="shared.dyn")
        self.b = T.alloc_buffer((2, planes, tile.columns, pitch), dtype, scope="shared.dyn")
        self.out = T.alloc_buffer((tile.slices * tile.down * FRAGMENT, tile.out_pitch), SUMS[dtype], scope="shared.dyn")
        shape = FRAGMENT * FRAGMENT
        self.a_fragment = T.alloc_buffer((down, shape), dtype, scope="wmma.matrix_a")
        self.b_fragment = T.alloc_buffer((across, shape), dtype, scope="wmma.matrix_b")
        self.sums = T.alloc_buffer((down * across, shape), SUMS[dtype], scope="wmma.accumulator")
        self.a_moving = T.alloc_buffer((tile.loads(tile.rows, dtype), self.vector), dtype, scope="local")
        self.b_moving = T.alloc_buffer((tile.loads(tile.columns, dtype), self.vector), dtype, scope="local")
        for i in range(down * across):
            T.evaluate(_call("tvm_fill_fragment", self.sums.data, *_FRAGMENT_SIZES, i, _zero(SUMS[dtype])))
        self._fetch(_number(0))
        self._put(_number(0))
        if self.steps > 1:
            with T.serial(_number(0), _number(self.steps - 1)) as step:
                self._fetch(step + 1)
                self._multiply(step % 2)
                self._put((step + 1) % 2)
        self._multiply(_number((self.steps - 1) % 2))
        self._finish()
        for operand in (self.a, self.b):  # alive until here: TVM would put `out` into their memory, of another type
            T.evaluate(operand.access_ptr("r"))

    def _each_load(self, rows: int) -> Any:
        """(number of the load, row, first k) of each load of 16 bytes that a thread makes of an operand of `rows` rows,
        and whether it is one of that operand's."""
        per_row = self.tile.depth // self.vector
        for i in range(self.tile.loads(rows, self.dtype)):
            load = self.thread + i * self.tile.threads
            partial = (i + 1) * self.tile.threads > rows * per_row
            yield i, load // per_row, load % per_row * self.vector, load < rows * per_row if partial else None

    def _fetch(self, step) -> None:
        """A step's elements from memory to registers."""
        T = amx.ir()
        tile = self.tile
        for i, row, k, inside in self._each_load(tile.rows):
            with _when(inside):
                self._fetch_data(i, self.row0 + row, step * tile.depth + k)
        for i, column, k, inside in self._each_load(tile.columns):
            with _when(inside), T.vectorized(_number(0), _number(self.vector)) as v:
                value = self.weight[self.column0 + column, step * tile.depth + k + v]
                T.buffer_store(self.b_moving, value, [i, v])

    def _fetch_data(self, i: int, row, k) -> None:
        T = amx.ir()
        product = self.product
        zero = _zero(self.dtype)
        conditions = [] if product.rows % self.tile.rows == 0 else [row < product.rows]
        position = product.position(row)

        def element(at, more) -> Any:
            if product.anchor == "packed_matmul":
                shape = [int(d) for d in self.data.shape]
                indices, inside = output_place(product, row, at, shape), []
            else:
                indices, inside = product.element(position, at)
            found = [*conditions, *more, *inside]
            value = self.data[tuple(indices)].astype(self.dtype)
            return T.if_then_else(_all(found), value, zero) if found else value

        ragged = product.depth % self.tile.depth != 0
        if not self.in_vectors:
            for v in range(self.vector):
                T.buffer_store(self.a_moving, element(k + v, [k + v < product.depth] if ragged else []), [i, v])
            return
        # The conditions and the place are those of the first of the elements: all have one tap.
        if product.anchor == "packed_matmul":
            indices, inside = list(output_place(product, row, k, [int(d) for d in self.data.shape])), []
        else:
            found, inside = product.element(position, k)
            indices = list(found)
        inside = [*conditions, *([k < product.depth] if ragged else []), *inside]
        if inside and self.dtype == "int8":
            self._fetch_bytes(i, indices, _all(inside))
            return
        with T.vectorized(_number(0), _number(self.vector)) as v:
            value = self.data[(*indices[:-1], indices[-1] + v)]
            T.buffer_store(self.a_moving, T.if_then_else(_all(inside), value, zero) if inside else value, [i, v])

    def _fetch_bytes(self, i: int, indices: list[Any], inside) -> None:
        """16 bytes, or zeros: in fours, since TVM cannot write a constant of 16 bytes."""
        T = amx.ir()
        with T.If(inside):
            with T.Then(), T.vectorized(_number(0), _number(self.vector)) as v:
                T.buffer_store(self.a_moving, self.data[(*indices[:-1], indices[-1] + v)], [i, v])
            with T.Else():
                for first in range(0, self.vector, 4):
                    with T.vectorized(_number(0), _number(4)) as v:
                        T.buffer_store(self.a_moving, _zero(self.dtype), [i, first + v])

    def _put(self, buffer) -> None:
        """A step's elements from registers to shared memory."""
        T = amx.ir()
        for shared, moving, rows in (
            (self.a, self.a_moving, self.tile.rows),
            (self.b, self.b_moving, self.tile.columns),
        ):
            for i, row, k, inside in self._each_load(rows):
                with _when(inside), T.vectorized(_number(0), _number(self.vector)) as v:
                    plane, first = self._in_row(k)
                    T.buffer_store(shared, moving[i, v], [buffer, plane, row, first + v])

    def _in_row(self, k) -> tuple[Any, Any]:
        """Plane and place in a row of the k-th element of a step."""
        return (k // FRAGMENT, k % FRAGMENT) if self.dtype == "int8" else (k * 0, k)

    def _multiply(self, buffer) -> None:
        """The products of one step, each slice of warps its share of k."""
        T = amx.ir()
        tile, dtype = self.tile, self.dtype
        down, across = tile.grid
        share = tile.depth // tile.slices
        pitch = tile.layout(dtype)[1]
        for inner in range(share // FRAGMENT):
            plane, k = self._in_row(self.slice * share + inner * FRAGMENT)
            for i in range(down):
                row = (self.warp_row * down + i) * FRAGMENT
                T.evaluate(self._load(self.a_fragment, i, self.a, (buffer, plane, row, k), pitch, "row_major"))
            for j in range(across):
                column = (self.warp_column * across + j) * FRAGMENT
                T.evaluate(self._load(self.b_fragment, j, self.b, (buffer, plane, column, k), pitch, "col_major"))
            for i in range(down):
                for j in range(across):
                    at = i * across + j
                    operands = self.sums.data, at, self.a_fragment.data, i, self.b_fragment.data, j
                    T.evaluate(_call("tvm_mma_sync", *operands, self.sums.data, at))

    def _load(self, fragment, number: int, source, place, pitch: int, layout: str):
        pointer = _pointer(source, place, FRAGMENT * pitch, "r")
        return _call("tvm_load_matrix_sync", fragment.data, *_FRAGMENT_SIZES, number, pointer, pitch, layout)

    def _finish(self) -> None:
        """Sums to shared memory, a row of fragments of each warp at a time, and from there through the epilogue."""
        T = amx.ir()
        tile, product = self.tile, self.product
        down, across = tile.grid
        shape = [int(d) for d in self.output.shape]
        vector = next(v for v in (STORED_TOGETHER, 2, 1) if shape[-1] % v == 0)
        columns = min(tile.columns, ceil(shape[-1] / vector) * vector) if self.blocks[1] == 1 else tile.columns
        per_row = columns // vector
        rows = tile.down * FRAGMENT
        for i in range(down):
            for j in range(across):
                row = (self.slice * tile.down + self.warp_row) * FRAGMENT
                column = (self.warp_column * across + j) * FRAGMENT
                pointer = _pointer(self.out, (row, column), FRAGMENT * tile.out_pitch, "w")
                arguments = self.sums.data, *_FRAGMENT_SIZES, i * across + j, pointer, tile.out_pitch, "row_major"
                T.evaluate(_call("tvm_store_matrix_sync", *arguments))
            for load in range(ceil(rows * per_row / tile.threads)):
                index = self.thread + load * tile.threads
                local, column = index // per_row, index % per_row * vector
                row = self.row0 + (local // FRAGMENT * down + i) * FRAGMENT + local % FRAGMENT
                conditions = [index < rows * per_row] if (load + 1) * tile.threads > rows * per_row else []
                if product.rows % tile.rows:
                    conditions.append(row < product.rows)
                if self.blocks[1] * tile.columns > shape[-1]:
                    conditions.append(self.column0 + column < shape[-1])
                with _when(_all(conditions) if conditions else None):
                    self._write(row, local, column, vector, shape)

    def _write(self, row, local, column, vector: int, shape: list[int]) -> None:
        T = amx.ir()
        tile, product = self.tile, self.product
        with T.vectorized(_number(0), _number(vector)) as v:
            result = self.out[local, column + v]
            for each in range(1, tile.slices):
                result = result + self.out[local + each * tile.down * FRAGMENT, column + v]
            place = output_place(product, row, self.column0 + column + v, shape)
            place = [x.astype(self.epilogue.index_dtype) for x in place]
            T.buffer_store(self.output, self.epilogue.at(place, result, self.renamed), place)


_FRAGMENT_SIZES = (FRAGMENT, FRAGMENT, FRAGMENT)


def _number(value: int):
    from tvm import tirx

    return tirx.const(value, "int32")


def _zero(dtype: str):
    from tvm import tirx

    return tirx.const(0, dtype)


def _call(name: str, *arguments):
    from tvm import tirx

    return tirx.call_intrin("void", f"tirx.{name}", *arguments)


def _pointer(buffer, place, extent: int, mode: str):
    """The address of an element, with how many elements from there on are read or written."""
    strides, offset = [1], 0
    for size in reversed([int(d) for d in buffer.shape][1:]):
        strides.insert(0, strides[0] * size)
    for index, stride in zip(place, strides, strict=True):
        offset = offset + index * stride
    return buffer.access_ptr(mode, ptr_type=str(buffer.dtype), offset=offset, extent=extent)


def _all(conditions):
    from tvm import tirx

    return conditions[0] if len(conditions) == 1 else tirx.all(*conditions)


@contextmanager
def _when(condition):
    """Emit what follows under a condition; None: always."""
    T = amx.ir()
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


@contextmanager
def _threads(tag: str, extent: int):
    T = amx.ir()
    thread: Callable = T.env_thread(tag)
    with T.launch_thread(thread, extent):
        yield thread
