"""Convolutions and products with a constant on tensor cores: float16, bfloat16, or int8.

Idea: a block of threads computes a tile of the matrix product (`products`, `tiles`) in steps of `depth`. Both operands
lie in shared memory as rows of k, so spaced that the eight rows of a matrix load fall into different banks. There are
`stages` such buffers. While warps multiply from one, asynchronous copies fill the others, so that memory's latency is
paid once and not at each step; zeros of padding are what a copy writes that reads nothing. Where a GPU has no such
copies, or elements must be converted or gathered one by one, there are two buffers, and the next step's elements are
on their way to registers meanwhile.

Where a layer has few tiles, k is shared out: within a block between `slices` groups of warps, and between the `cluster`
blocks of a thread block cluster, which read each other's sums from shared memory. So small pictures fill the GPU too.

The sums leave through shared memory, in the operands' place: there the chain after the product (bias, activation,
residual, rounding) is computed on four neighbours a thread, and written once.

The constant is repacked to [columns][depth], k innermost, with zeros up to whole tiles and steps.

Decision: {rows, columns, depth, down, across, slices, stages, cluster}: the tile, the step, warps along each and along
k, buffers, blocks along k. By default the one that `tiles.predicted` says is fastest: nothing is measured.

Source: Chetlur et al., cuDNN, arXiv:1410.0759, 2014, section 3; NVIDIA, CUTLASS, "Efficient GEMM in CUDA" (tiles of
blocks, warps and instructions; sliced k; split k; software pipelining).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from math import ceil
from typing import Any

import numpy as np

from graphopt.targets.schedules import amx
from graphopt.targets.schedules.cuda import intrinsics
from graphopt.targets.schedules.cuda.gpu import WARP, GpuWorkload
from graphopt.targets.schedules.cuda.products import Product, output_place, product_of
from graphopt.targets.schedules.cuda.tiles import BYTES, FRAGMENT, LOAD_BYTES, SUMS, Tile, tiles
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.workload import Decision, Kernel

NAME = "tensor_cores"
VERSION = 2
FEATURES = {"float16": "tensor_fp16", "bfloat16": "tensor_bf16", "int8": "tensor_int8"}
STORED_TOGETHER = 4
"""Outputs a thread computes side by side: 16 bytes of sums; TVM writes wider vectors of float32 element by element."""


def match(workload: GpuWorkload) -> list[Decision] | None:
    """Decisions, the one predicted to be fastest first."""
    product = product_of(workload)
    if product is None or product.weight_dtype not in SUMS:
        return None
    dtype = product.weight_dtype
    if FEATURES[dtype] not in workload.gpu.limits.features:
        return None
    if product.data_dtype != dtype and not (product.planes and product.data_dtype == "float32" and dtype != "int8"):
        return None
    if epilogue_of(workload, product.anchor) is None:
        return None
    return [tile.decision for tile in tiles(product, workload.gpu)] or None


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
        self.steps = tile.steps(product.depth)
        self.blocks = ceil(product.rows / tile.rows), ceil(product.columns / tile.columns)
        self.weight_shape = self.blocks[1] * tile.columns, self.steps * tile.cluster * tile.depth
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
            with ExitStack() as stack:
                block: Any = stack.enter_context(_threads("blockIdx.x", self.blocks[0] * self.blocks[1] * tile.cluster))
                if tile.cluster > 1:
                    stack.enter_context(_threads("clusterCtaIdx.x", tile.cluster))
                warp = stack.enter_context(_threads("threadIdx.y", tile.threads // WARP))
                lane = stack.enter_context(_threads("threadIdx.x", WARP))
                self._block(block // tile.cluster, block % tile.cluster, warp, lane)
        return builder.get()

    def _block(self, block, rank, warp, lane) -> None:
        T = amx.ir()
        tile, dtype = self.tile, self.dtype
        down, across = tile.grid
        # Neighbouring blocks share the rows of A: these are the larger operand, and stay in the second-level cache.
        self.row0 = block // self.blocks[1] * tile.rows
        self.column0 = block % self.blocks[1] * tile.columns
        self.rank, self.k0 = rank, rank * (self.steps * tile.depth)
        self.thread = warp * WARP + lane
        self.slice, within = warp // (tile.down * tile.across), warp % (tile.down * tile.across)
        self.warp_row, self.warp_column = within // tile.across, within % tile.across
        self._allocate()
        for i in range(down * across):
            T.evaluate(_call("tvm_fill_fragment", self.sums.data, *_FRAGMENT_SIZES, i, _zero(SUMS[dtype])))
        if tile.asynchronous:
            self._pipeline()
        else:
            self._two_buffers()
        T.evaluate(intrinsics.barrier())
        self._finish()

    def _allocate(self) -> None:
        """Shared memory, where sums take the place of operands, and registers."""
        T = amx.ir()
        tile, dtype = self.tile, self.dtype
        down, across = tile.grid
        planes, pitch = tile.layout(dtype)
        shared = T.alloc_buffer((tile.shared_bytes(dtype) // BYTES[dtype],), dtype, scope="shared.dyn").data
        shape = (tile.stages, planes, tile.rows, pitch)
        self.a = T.decl_buffer(shape, dtype, data=shared, scope="shared.dyn")
        first = tile.stages * tile.stage_bytes(tile.rows, dtype) // BYTES[dtype]
        shape = (tile.stages, planes, tile.columns, pitch)
        self.b = T.decl_buffer(shape, dtype, data=shared, elem_offset=first, scope="shared.dyn")
        shape = (tile.slices * tile.rows, tile.out_pitch)
        self.out = T.decl_buffer(shape, SUMS[dtype], data=shared, scope="shared.dyn")
        size = FRAGMENT * FRAGMENT
        self.a_fragment = T.alloc_buffer((down, size), dtype, scope="wmma.matrix_a")
        self.b_fragment = T.alloc_buffer((across, size), dtype, scope="wmma.matrix_b")
        self.sums = T.alloc_buffer((down * across, size), SUMS[dtype], scope="wmma.accumulator")

    def _pipeline(self) -> None:
        """Copies of the next steps are under way while one is multiplied."""
        T = amx.ir()
        ahead = self.tile.stages - 1
        for step in range(ahead):
            self._copy(_number(step), step < self.steps)
        with T.serial(_number(0), _number(self.steps)) as step:
            T.evaluate(intrinsics.await_copies(ahead - 1))
            T.evaluate(intrinsics.barrier())  # all threads' copies are there, and nobody reads the buffer filled next
            self._copy(step + ahead, step + ahead < self.steps)
            self._multiply(step % self.tile.stages)
        T.evaluate(intrinsics.await_copies(0))

    def _two_buffers(self) -> None:
        T = amx.ir()
        tile, dtype = self.tile, self.dtype
        self.a_moving = T.alloc_buffer((tile.loads(tile.rows, dtype), self.vector), dtype, scope="local")
        self.b_moving = T.alloc_buffer((tile.loads(tile.columns, dtype), self.vector), dtype, scope="local")
        self._fetch(_number(0))
        self._put(_number(0))
        T.evaluate(intrinsics.barrier())
        if self.steps > 1:
            with T.serial(_number(0), _number(self.steps - 1)) as step:
                self._fetch(step + 1)
                self._multiply(step % 2)
                self._put((step + 1) % 2)
                T.evaluate(intrinsics.barrier())
        self._multiply(_number((self.steps - 1) % 2))

    def _copy(self, step, there) -> None:
        """Start copying a step's elements to its buffer, where there is such a step; a group either way."""
        T = amx.ir()
        tile = self.tile
        if there is not False:
            with _when(None if there is True else there):
                buffer = step % tile.stages
                for _, row, k, mine in self._each_load(tile.rows):
                    plane, at = self._in_row(k)
                    indices, inside = self._vector_place(self.row0 + row, self.k0 + step * tile.depth + k)
                    to, source = T.address_of(self.a[buffer, plane, row, at]), T.address_of(self.data[tuple(indices)])
                    with _when(mine):
                        T.evaluate(intrinsics.copy16(to, source, _all(inside) if inside else True))
                for _, column, k, mine in self._each_load(tile.columns):
                    plane, at = self._in_row(k)
                    source = self.weight[self.column0 + column, self.k0 + step * tile.depth + k]
                    to = T.address_of(self.b[buffer, plane, column, at])
                    with _when(mine):
                        T.evaluate(intrinsics.copy16(to, T.address_of(source), True))
        T.evaluate(intrinsics.end_group())

    def _vector_place(self, row, k) -> tuple[list[Any], list[Any]]:
        """Where the neighbours in memory start that a thread takes from A at [row, k], and the conditions under which
        they are there: those of the first of them, since all have one tap."""
        product = self.product
        inside = [] if product.rows % self.tile.rows == 0 else [row < product.rows]
        if product.depth % (self.tile.depth * self.tile.cluster):
            inside.append(k < product.depth)
        if product.anchor == "packed_matmul":
            return list(output_place(product, row, k, [int(d) for d in self.data.shape])), inside
        indices, more = product.element(product.position(row), k)
        return list(indices), [*inside, *more]

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
        zero = _zero(self.dtype)
        if not self.in_vectors:
            for v in range(self.vector):
                T.buffer_store(self.a_moving, self._element(row, k + v), [i, v])
            return
        indices, inside = self._vector_place(row, k)
        if inside and self.dtype == "int8":
            self._fetch_bytes(i, indices, _all(inside))
            return
        with T.vectorized(_number(0), _number(self.vector)) as v:
            value = self.data[(*indices[:-1], indices[-1] + v)]
            T.buffer_store(self.a_moving, T.if_then_else(_all(inside), value, zero) if inside else value, [i, v])

    def _element(self, row, k) -> Any:
        """A[row, k], converted; zero where there is none."""
        T = amx.ir()
        indices, inside = self._vector_place(row, k)
        value = self.data[tuple(indices)].astype(self.dtype)
        return T.if_then_else(_all(inside), value, _zero(self.dtype)) if inside else value

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
        """Sums to shared memory, and from there through the epilogue: each block of a cluster does its rows."""
        T = amx.ir()
        tile, product = self.tile, self.product
        down, across = tile.grid
        for i in range(down):
            for j in range(across):
                row = self.slice * tile.rows + (self.warp_row * down + i) * FRAGMENT
                column = (self.warp_column * across + j) * FRAGMENT
                pointer = T.address_of(self.out[row, column])
                arguments = self.sums.data, *_FRAGMENT_SIZES, i * across + j, pointer, tile.out_pitch, "row_major"
                T.evaluate(_call("tvm_store_matrix_sync", *arguments))
        T.evaluate(intrinsics.cluster_barrier() if tile.cluster > 1 else intrinsics.barrier())
        shape = [int(d) for d in self.output.shape]
        vector = next(v for v in (STORED_TOGETHER, 2, 1) if shape[-1] % v == 0)
        columns = min(tile.columns, ceil(shape[-1] / vector) * vector) if self.blocks[1] == 1 else tile.columns
        per_row = columns // vector
        rows = tile.rows // tile.cluster
        for load in range(ceil(rows * per_row / tile.threads)):
            index = self.thread + load * tile.threads
            local, column = self.rank * rows + index // per_row, index % per_row * vector
            row = self.row0 + local
            conditions = [index < rows * per_row] if (load + 1) * tile.threads > rows * per_row else []
            if product.rows % tile.rows:
                conditions.append(row < product.rows)
            if self.blocks[1] * tile.columns > shape[-1]:
                conditions.append(self.column0 + column < shape[-1])
            with _when(_all(conditions) if conditions else None):
                self._write(row, local, column, vector, shape)
        if tile.cluster > 1:
            T.evaluate(intrinsics.cluster_barrier())  # a block's memory is there until all have read it

    def _write(self, row, local, column, vector: int, shape: list[int]) -> None:
        T = amx.ir()
        tile, product = self.tile, self.product
        added = None
        if tile.cluster > 1:
            added = T.alloc_buffer((vector,), SUMS[self.dtype], scope="local")
            own = T.address_of(self.out[local, column])
            T.evaluate(intrinsics.cluster_sum(T.address_of(added[0]), own, vector, tile.cluster))
        with T.vectorized(_number(0), _number(vector)) as v:
            result = self.out[local, column + v] if added is None else added[v]
            for each in range(1, tile.slices):
                result = result + self.out[local + each * tile.rows, column + v]
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
