"""Products of two activations, one a batch: attention's scores, and its weighted values.

Idea: both operands of one product are copied into the order they are read in (see `gemm`), the right one into panels;
then the nest of a constant weight applies. Transposed and sliced operands differ in the indices of that copy alone, so
no pass of their own moves them.

Loop order: batch (parallel) / copy the right operand / band / column panel / row tile / k / rows, vectors.

Register budget: rows * vectors accumulators + vectors of the right operand + 1 broadcast <= registers.

Source: Goto and van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008, section 4.2.
"""

from __future__ import annotations

import math
from typing import Any

from graphopt.targets.schedules import gemm
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, work

NAME = "batch_matmul"
VERSION = 1
LEFT_BYTES = 512 << 10


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, vectors}: height and width of the register tile."""
    if workload.anchor("batch_matmul") is None:
        return None
    fused = gemm.read_fused(workload, "batch_matmul")
    if fused is None or str(fused.product.dtype) != "float32" or fused.out_shape != fused.extents[:-1]:
        return None
    *_, rows, columns, _ = fused.extents
    return gemm.register_tiles(rows, columns, workload.machine)[:6]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `batch_matmul`: (..., M, N) from (..., M, K) and (..., K, N)."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    fused = gemm.read_fused(workload, "batch_matmul")
    assert fused is not None
    *lead, rows, columns, depth = fused.extents
    lanes, height = workload.machine.lanes, decision["rows"]
    tiles = -(-rows // height)
    bands = -(-tiles // max(min(tiles, LEFT_BYTES // (4 * depth * height)), 1))
    nest = gemm.Nest(rows, columns, depth, height, decision["vectors"], lanes, 1, -(-tiles // bands))
    batch = math.prod(lead)
    threads = workload.machine.threads != 1 and work(workload.blocks["batch_matmul"]) >= PARALLEL_WORK
    across = threads and batch > 1
    *lead_axes, row_axis, column_axis, depth_axis = fused.axes

    def emit_one(places: list[Any]) -> None:
        at = list(zip(lead_axes, places, strict=True))
        right: Any = T.sblock_alloc_buffer((nest.panels, nest.piece, nest.width), "float32", scope="global")

        def left(row, k):
            return gemm.substitute(fused.left, dict([*at, (row_axis, row), (depth_axis, k)]))

        def element(k, column):
            return gemm.substitute(fused.right, dict([*at, (depth_axis, k), (column_axis, column)]))

        def store(row, column, lane, product):
            spots = [*places, row, column + lane]
            value = gemm.from_buffer(fused.value, fused.product, lambda: product)
            T.buffer_store(fused.out, gemm.substitute(value, dict(zip(fused.out_axes, spots, strict=True))), spots)

        def panel(_chunk, j, offset):
            return right[j, tirx.floordiv(offset, nest.width), T.ramp(tirx.floormod(offset, nest.width), 1, lanes)]

        copy_right(nest, right, element, parallel=threads and not across)
        gemm.emit(nest, left, panel, store, parallel=threads and not across)

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        if batch == 1:
            emit_one([tirx.const(0, "int32")] * len(lead))
        else:
            with T.parallel(0, batch) if across else T.serial(0, batch) as b:
                emit_one(gemm.split_rows(b, lead))
    made: Any = builder.get()
    return Kernel(tirx.PrimFunc(workload.func.params, made.body, workload.func.ret_type, workload.func.attrs))


def copy_right(nest: gemm.Nest, right, element, *, parallel: bool) -> None:
    """The right operand as panels (panel, k, width); zeros past its last column and its last step."""
    from tvm import tirx
    from tvm.script.ir_builder import tirx as T

    lanes = nest.lanes
    full, rest = divmod(nest.columns, lanes)
    zero = tirx.const(0, "float32")
    vectors = nest.panels * nest.vectors
    with T.parallel(0, vectors) if parallel else T.serial(0, vectors) as v, T.serial(0, nest.piece) as k:
        spot = [tirx.floordiv(v, nest.vectors), k]
        first = tirx.floormod(v, nest.vectors) * lanes
        with T.If(tirx.all(v < full, k < nest.depth)):
            with T.Then(), T.vectorized(0, lanes) as lane:
                T.buffer_store(right, element(k, v * lanes + lane), [*spot, first + lane])
            with T.Else():
                with T.vectorized(0, lanes) as lane:
                    T.buffer_store(right, zero, [*spot, first + lane])
                if rest:
                    with T.If(tirx.all(v >= full, v < full + 1, k < nest.depth)), T.Then(), T.serial(0, rest) as lane:
                        T.buffer_store(right, element(k, full * lanes + lane), [*spot, first + lane])
