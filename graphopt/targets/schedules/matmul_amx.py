"""Matrix product with a constant weight on AMX tile registers, bfloat16 operands, float32 sums.

Idea: 16 rows of row-major data x 32 inputs are a tile that loads directly; the weight is repacked into tiles in the
order of use. The last tile of rows and the last block of columns start earlier instead of being smaller, and compute
some results twice. Few rows are the same loop: it then runs at the speed at which the weight arrives, so the weight is
requested a fixed number of steps ahead.

Loop order: block of columns (parallel) / group of row tiles / k / pixels x outs tile products, or the two outer loops
exchanged (`data`). The epilogue of a group is placed behind the first products of the next.

Register budget: pixels * outs accumulators and the operands, 8 tile registers.

Source: Georganas et al., Harnessing Deep Learning and HPC Kernels via High-Level Loop and Tensor Abstractions on CPU
Architectures, IPDPS 2024, section II.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax.bfloat16 import DTYPE
from graphopt.targets.schedules import amx, matmul_row
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.workload import Decision, Kernel, Workload, divisors

NAME = "matmul_amx"
VERSION = 1
STEP_INPUTS = 32
LEAD_STEPS = 4
AHEAD_STEPS = 6
"""Steps between a request for a weight tile and its use; a step of four products takes 20 ns."""
GRIDS = ((2, 2), (1, 4), (4, 1), (1, 2), (1, 1))
EPILOGUE_CYCLES = 7
PARALLEL_PRODUCTS = 256
"""Tile products below which one thread is faster than waking others."""


@dataclass(frozen=True)
class Product:
    """(rows, depth) x (depth, columns); the output has shape `lead` + (columns,), `lead` multiplying to rows."""

    lead: tuple[int, ...]
    depth: int
    columns: int
    data_index: int
    weight_index: int

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def steps(self) -> int:
        return self.depth // STEP_INPUTS


def product_of(workload: Workload) -> Product | None:
    """The product, where operands have a form that tiles can take; else None."""
    block = workload.anchor("packed_matmul")
    if block is None or next(iter(workload.blocks)) != "packed_matmul" or "packed_crop" in workload.blocks:
        return None
    params = list(workload.func.params)
    places = [next((i for i, p in enumerate(params) if p.same_as(r.source)), -1) for r in block.reads]
    if len(places) != 2 or min(places) < 0 or any(str(params[i].ty.dtype) != DTYPE for i in places):
        return None
    data, weight = places
    shape = [int(d) for d in params[data].ty.shape]
    packed = [int(d) for d in params[weight].ty.shape]
    if len(packed) != 3 or packed[1] != shape[-1] or shape[-1] % STEP_INPUTS or min(shape) < 1:
        return None
    return Product(tuple(shape[:-1]), shape[-1], packed[0] * packed[2], data, weight)


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {pixels, outs, order}: the grid of tiles (rows x columns), and the outer loop."""
    if "amx_bf16" not in workload.machine.features:
        return None
    product = product_of(workload)
    if product is None or epilogue_of(workload, "packed_matmul") is None or matmul_row.takes(workload):
        return None
    found: list[tuple[float, Decision]] = []
    tiles = -(-product.rows // amx.ROWS)
    for pixels, outs in GRIDS:
        width = outs * amx.OUTPUTS
        if width > product.columns or pixels > tiles:
            continue
        blocks, groups = -(-product.columns // width), -(-tiles // pixels)
        arithmetic = product.steps * pixels * outs * amx.PRODUCT_CYCLES
        loads = product.steps * 8 * (pixels + outs)
        cycles = max(arithmetic, loads) + pixels * outs * min(product.rows, amx.ROWS) * EPILOGUE_CYCLES / 3
        for order in ("weights", "data") if groups > 1 and blocks > 1 else ("weights",):
            cost = groups * blocks * cycles * (1.0 if order == "weights" else 1.02)
            found.append((cost, {"pixels": pixels, "outs": outs, "order": order}))
    found.sort(key=lambda pair: pair[0])
    return [decision for _, decision in found] or None


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew, loops and all; its weight is repacked into tiles."""
    product, epilogue = product_of(workload), epilogue_of(workload, "packed_matmul")
    assert product is not None and epilogue is not None
    grid = amx.Grid(decision["pixels"], decision["outs"], min(product.rows, amx.ROWS))
    func = _Writer(workload, product, grid, epilogue, decision["order"]).function()
    return Kernel(func, {product.weight_index: lambda weight: pack_weight(weight, grid.outs)})


def pack_weight(weight: np.ndarray, outs: int) -> np.ndarray:
    """(N / nb, K, nb) -> (ceil(N / 16 / outs), K / 32, outs, 16, 16, 2); the last block's columns end at N."""
    tiles, depth, lanes = weight.shape
    columns = tiles * lanes
    matrix = weight.transpose(1, 0, 2).reshape(depth // STEP_INPUTS, STEP_INPUTS, columns)
    width = outs * amx.OUTPUTS
    starts = [min(at, columns - width) for at in range(0, columns, width)]
    chosen = np.concatenate([np.arange(start, start + width) for start in starts])
    return amx.pack_tiles(matrix[:, :, chosen], outs)


class _Writer:
    """Writes the loops of one kernel."""

    def __init__(self, workload: Workload, product: Product, grid: amx.Grid, epilogue: Epilogue, order: str):
        self.workload, self.product, self.grid, self.epilogue = workload, product, grid, epilogue
        self.order = order
        self.dtype = epilogue.index_dtype
        self.width = grid.outs * amx.OUTPUTS
        self.tiles = -(-product.rows // amx.ROWS)
        self.groups = -(-self.tiles // grid.pixels)
        self.blocks = -(-product.columns // self.width)
        self.lead_steps = min(LEAD_STEPS, product.steps)
        products = product.steps * self.tiles * self.blocks * grid.outs
        self.threads = min(workload.machine.threads, self.blocks) if products >= PARALLEL_PRODUCTS else 1

    def function(self):
        from tvm.script.ir_builder import IRBuilder

        T = amx.ir()

        product, grid = self.product, self.grid
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            self.renamed = []
            for index, old in enumerate(self.workload.func.params):
                shape, dtype = [int(d) for d in old.ty.shape], str(old.ty.dtype)
                if index == product.weight_index:
                    shape = [self.blocks, product.steps, grid.outs, amx.ROWS, amx.OUTPUTS, 2]
                self.renamed.append((old, T.arg(str(old.name), T.buffer(shape, dtype))))
            T.func_attr({"tirx.noalias": True})
            self.data = self.renamed[product.data_index][1]
            self.weight = self.renamed[product.weight_index][1]
            self.output = next(new for old, new in self.renamed if old.same_as(self.epilogue.output))
            if self.threads == 1:
                self._thread(self.number(0), self.number(self.blocks))
            else:
                share = -(-self.blocks // self.threads)
                with T.parallel(self.number(0), self.number(self.threads)) as thread:
                    first = amx.minimum(thread * share, self.number(self.blocks - 1))
                    self._thread(first, amx.minimum(first + share, self.number(self.blocks)) - first)
        return builder.get()

    def number(self, value: int):
        from tvm import tirx

        return tirx.const(value, self.dtype)

    def _thread(self, first, blocks) -> None:
        T = amx.ir()

        amx.configure(self.grid)
        self.scratch: Any = T.alloc_buffer((self.grid.pixels, amx.ROWS, self.width), "float32", scope="local")

        def place(index):
            if self.order == "weights":
                return first + index // self.groups, index % self.groups
            return first + index % blocks, index // blocks

        amx.pipelined(
            self.grid,
            self.scratch,
            blocks * self.groups,
            lambda index: self._head(*place(index)),
            lambda index: self._tail(*place(index)),
            lambda index: self._finish(*place(index)),
        )
        amx.release()

    def _row(self, group, pixel: int):
        """First row of a tile."""

        tile = amx.minimum(group * self.grid.pixels, self.number(self.tiles - self.grid.pixels)) + pixel
        return amx.minimum(tile * amx.ROWS, self.number(self.product.rows - self.grid.rows))

    def _place(self, row, column) -> list[Any]:
        """Row-major indices of the data or the output."""
        indices: list[Any] = []
        rest = row
        for extent in reversed(self.product.lead):
            if extent == self.product.rows:
                indices.append(rest)
                rest = self.number(0)
            else:
                indices.append(rest % extent)
                rest = rest // extent
        return [*reversed(indices), column]

    def _step(self, block, group, step) -> None:
        T = amx.ir()

        rows = [self._row(group, pixel) for pixel in range(self.grid.pixels)]
        self.grid.step(
            DTYPE,
            lambda pixel: T.address_of(self.data[tuple(self._place(rows[pixel], step * STEP_INPUTS))]),
            self.product.depth * 2,
            lambda out: T.address_of(self.weight[block, step, out, 0, 0, 0]),
        )
        if self.workload.machine.allows("prefetch"):
            lines = -(-self.grid.outs * amx.ROWS // (self.groups if self.order == "weights" else 1))
            if self.groups > 1 and self.order == "weights":  # the next block, while this one is used again
                for line in range(lines):
                    amx.prefetch(T.address_of(self.weight[block + 1, step, 0, group * lines + line, 0, 0]))
            elif self.groups == 1:
                for line in range(lines):
                    amx.prefetch(T.address_of(self.weight[block, step + AHEAD_STEPS, 0, line, 0, 0]))

    def _head(self, block, group) -> None:
        self.grid.zero()
        for step in range(self.lead_steps):
            self._step(block, group, self.number(step))

    def _tail(self, block, group) -> None:
        T = amx.ir()

        rest = self.product.steps - self.lead_steps
        if rest == 0:
            return
        unrolled = max(divisors(rest, 4))
        with T.serial(self.number(0), self.number(rest // unrolled)) as outer:
            for inner in range(unrolled):
                self._step(block, group, outer * unrolled + (self.lead_steps + inner))

    def _finish(self, block, group) -> None:
        T = amx.ir()

        lanes = min(self.width, 32)
        start = amx.minimum(block * self.width, self.number(self.product.columns - self.width))
        for pixel in range(self.grid.pixels):
            row = self._row(group, pixel)
            with T.serial(self.number(0), self.number(self.grid.rows)) as i:
                for part in range(self.width // lanes):
                    with T.vectorized(self.number(0), self.number(lanes)) as v:
                        place = self._place(row + i, start + part * lanes + v)
                        result = self.scratch[pixel, i, part * lanes + v]
                        T.buffer_store(self.output, self.epilogue.at(place, result, self.renamed), place)
