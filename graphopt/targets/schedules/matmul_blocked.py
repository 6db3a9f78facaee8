"""Matrix product of several rows with a constant, packed weight.

Idea: a register tile of `rows` x `vectors` vectors; the packed weight is read once, panel by panel, and while one panel
is used the next one is requested from memory. The left operand is copied into tiles first (see `gemm`), a band of
rows and a piece of the common axis at a time, so that it stays in the second-level cache for all panels.

Loop order: band of row tiles / piece of k / column panel (parallel) / row tile / k, unrolled by 4 / rows, vectors.

Register budget: rows * vectors accumulators + vectors weights + 1 broadcast <= registers.

Source: Goto and van de Geijn: Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3), 2008, sections 4, 5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.targets.relax import half
from graphopt.targets.relax.computes import COLUMNS
from graphopt.targets.schedules import gemm, prefetch
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, annotation, work

NAME = "matmul_blocked"
VERSION = 1
PIECE = 800
"""Most steps of a piece of k."""
LEFT_BYTES = 640 << 10
"""What of the left operand is copied at a time: it shares the second-level cache with a panel and the results."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, vectors}: height and width of the register tile."""
    block = workload.anchor("packed_matmul")
    if block is None:
        return None
    fused = gemm.read_fused(workload, "packed_matmul")
    if fused is None or str(fused.product.dtype) != workload.number or _weight_index(workload, fused) is None:
        return None
    rows, columns = math.prod(fused.extents[:-2]), fused.out_shape[-1]
    if rows < 2:
        return None
    return gemm.register_tiles(rows, columns, workload.machine)


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `packed_matmul`; the weight is repacked (chunk, panel, k, lane)."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    fused = gemm.read_fused(workload, "packed_matmul")
    index = None if fused is None else _weight_index(workload, fused)
    assert fused is not None and index is not None
    block = workload.blocks["packed_matmul"]
    lead, depth = fused.extents[:-2], fused.extents[-1]
    nest = blocking(math.prod(lead), fused.out_shape[-1], depth, decision, workload.machine.lanes, workload.number)
    params = list(workload.func.params)
    shape = (nest.chunks, nest.panels, nest.panel_elements)
    weight: tirx.Buffer = tirx.decl_buffer(shape, nest.number, "weight")
    params[index] = weight
    *axes, _column, k_axis = fused.axes

    def left(row, k):
        return gemm.substitute(fused.left, dict(zip([*axes, k_axis], [*gemm.split_rows(row, lead), k], strict=True)))

    def panel(chunk, j, offset):
        return weight[chunk, j, T.ramp(offset, 1, nest.lanes)]

    def store(row, column, lane, product):
        places = [*gemm.split_rows(row, lead), column + lane]
        value = gemm.from_buffer(fused.value, fused.product, lambda: product)
        T.buffer_store(fused.out, gemm.substitute(value, dict(zip(fused.out_axes, places, strict=True))), places)

    def ahead(chunk, j, number, count):
        first = (chunk * nest.panels + j) * (nest.panel_elements // 16) + number
        return prefetch.lines(weight, first, count)

    parallel = work(block) >= PARALLEL_WORK and workload.machine.threads != 1
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        gemm.emit(nest, left, panel, store, parallel=parallel, prefetch=ahead)
    made: Any = builder.get()
    func = tirx.PrimFunc(params, made.body, workload.func.ret_type, workload.func.attrs)
    nb = annotation(block, COLUMNS)
    return Kernel(func, {index: lambda packed: repack(packed, nb, nest)})


def blocking(rows: int, columns: int, depth: int, decision: Decision, lanes: int, number: str = "float32") -> gemm.Nest:
    """The nest of a decision: pieces of k and bands of rows such that the copied left operand fits LEFT_BYTES; in
    float16 a piece is a run of a sum."""
    height = decision["rows"]
    chunks = max(-(-depth // (half.TERMS if number == "float16" else PIECE)), 1)
    piece = -(-depth // chunks)
    tiles = -(-rows // height)
    band = max(min(tiles, LEFT_BYTES // (4 * piece * height)), 1)
    bands = -(-tiles // band)
    return gemm.Nest(rows, columns, depth, height, decision["vectors"], lanes, chunks, -(-tiles // bands), number)


def repack(packed: np.ndarray, block: int, nest: gemm.Nest) -> np.ndarray:
    """(N / block, K, block) -> (chunk, panel, k * width), zeros for padded steps and columns."""
    tiles, depth, _ = packed.shape
    matrix = packed.transpose(1, 0, 2).reshape(depth, tiles * block)[:, : nest.columns]
    whole = np.zeros((nest.chunks * nest.piece, nest.panels * nest.width), packed.dtype)
    whole[:depth, : nest.columns] = matrix
    split = whole.reshape(nest.chunks, nest.piece, nest.panels, nest.width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(split.reshape(nest.chunks, nest.panels, -1))


def _weight_index(workload: Workload, fused: gemm.Fused) -> int | None:
    """The position of the weight among the function's parameters; None where it is used otherwise too."""
    source = getattr(fused.right, "source", None)
    return next((i for i, p in enumerate(workload.func.params) if source is not None and p.same_as(source)), None)
