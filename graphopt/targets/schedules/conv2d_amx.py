"""Convolution on AMX tile registers: bfloat16 operands and float32 sums, or bytes and 32-bit sums.

Idea: in blocked form a pixel's 32 channels of bfloat16, or 64 of bytes, are one cache line, so 16 neighbouring pixels
are a tile that loads directly, and a kernel position is an offset: no im2col. Neighbours are neighbours in an *image*:
the input itself where that will do, else a copy of a band of rows in the second-level cache, made once: padded; for
strides split into phases, so that the inputs of neighbouring outputs are adjacent; for few channels interleaved pixel
by pixel, so that 64 bytes hold several neighbouring pixels and one step covers that many kernel columns (the first
layer of most networks).

A product costs the same for 1 row as for 16, so tiles run across row ends: outputs are numbered with the image's row
pitch, and the few that lie past the row's end are written first and overwritten by the next row's own values. The last
tile of a run and the last group of tiles start earlier instead of being shorter, and compute some outputs twice.

Loop order: image, band (parallel) / `weights`: block of outputs, group of tiles; `data`: the reverse / in-block, kernel
position / pixels x outs tile products. The epilogue of a group is placed behind the first products of the next, which
keep the tile unit busy meanwhile. While a block of outputs is computed, the next one's weights are prefetched.

Register budget: pixels * outs accumulators and the operands, 8 tile registers.

Source: Georganas et al., Harnessing Deep Learning and HPC Kernels via High-Level Loop and Tensor Abstractions on CPU
Architectures, IPDPS 2024, section III (BRGEMM convolution); Intel 64 and IA-32 Architectures Optimization Reference
Manual, chapter 20 (AMX).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax.integer_computes import QUAD
from graphopt.targets.schedules import amx
from graphopt.targets.schedules.conv2d_image import Image, Window, image_of, window_of
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.workload import Decision, Kernel, Workload, divisors

NAME = "conv2d_amx"
VERSION = 2
FEATURES = {"bfloat16": "amx_bf16", "uint8": "amx_int8"}
"""By element type of the data: what a processor must have."""
SUMS = {"bfloat16": "float32", "uint8": "int32"}
LEAD_STEPS = 4
"""Steps of the next group that precede a group's epilogue: as many as the reorder buffer holds with it."""
DATA_CYCLES, WEIGHT_CYCLES = 8, 16
"""To load a tile from the first-level cache, where data is, and from the second, where weights are."""
DATA_ORDER = 1.1
"""Cost of the order `data` against `weights`, whose next block is requested ahead; as measured."""
ONE_GROUP = 0.9
"""Cost where all outputs of a block fit the registers, so that each weight is loaded once; as measured."""
WORTH_TRYING = 1.4
"""Decisions predicted to take longer than the best by more than this are left out."""
EPILOGUE_CYCLES = 7
"""Cycles to finish 16 outputs of one position; hidden behind products where there are enough."""
GRIDS = ((2, 2), (4, 1), (3, 1), (2, 1), (1, 4), (1, 2), (1, 1))
PARALLEL_PRODUCTS = 256
"""Tile products below which one thread is faster than waking others."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {pixels, outs, order, merge}: the grid of tiles, the outer loop, whether tiles run across rows."""
    window = window_of(workload)
    if window is None or FEATURES[window.dtype] not in workload.machine.features:
        return None
    epilogue = epilogue_of(workload, window.anchor)
    if epilogue is None:
        return None
    found: list[tuple[float, Decision]] = []
    for merge in (True, False):
        image = image_of(window, merge)
        if image.merged != merge:
            continue
        for pixels, outs in GRIDS:
            if window.out_tiles % outs or (window.groups > 1 and window.out_tiles // window.groups % outs):
                continue
            for order in ("weights", "data"):
                cost = _cycles(window, image, pixels, outs, order)
                found.append((cost, {"pixels": pixels, "outs": outs, "order": order, "merge": merge}))
    found.sort(key=lambda pair: pair[0])
    best = found[0][0] if found else 0.0
    return [decision for cost, decision in found if cost < WORTH_TRYING * best] or None


def _cycles(window: Window, image: Image, pixels: int, outs: int, order: str) -> float:
    """Predicted cycles of one picture."""
    groups = -(-image.tiles // pixels) * image.bands
    blocks = window.out_tiles // outs
    steps = image.steps
    products = steps * pixels * outs * amx.PRODUCT_CYCLES
    loads = steps * (DATA_CYCLES * pixels + WEIGHT_CYCLES * outs)
    epilogue = pixels * outs * image.rows * EPILOGUE_CYCLES
    group = max(products, loads) + epilogue / (3 if steps >= LEAD_STEPS else 1.5)
    once = ONE_GROUP if groups == 1 else 1.0
    return groups * blocks * group * once * (1.0 if order == "weights" else DATA_ORDER)


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew, loops and all; its weight is repacked into tiles."""
    window = window_of(workload)
    assert window is not None
    epilogue = epilogue_of(workload, window.anchor)
    assert epilogue is not None
    image = image_of(window, bool(decision["merge"]))
    grid = amx.Grid(decision["pixels"], decision["outs"], image.rows)
    func = _Writer(workload, window, image, grid, epilogue, decision["order"]).function()
    return Kernel(func, {window.weight_index: lambda weight: pack_weight(weight, window, image, grid.outs)})


def pack_weight(weight: np.ndarray, window: Window, image: Image, outs: int) -> np.ndarray:
    """(M / ocb, C / icb, kH, kW, icb, ocb) -> (M / 16 / outs, steps, outs, 16, 16, 2), in the order of use.

    Bytes come as (M / ocb, C / icb, kH, kW, icb / 4, ocb * 4), and end in fours.
    """
    if window.dtype == "uint8":
        *lead, quads, wide = weight.shape
        weight = np.moveaxis(weight.reshape(*lead, quads, wide // QUAD, QUAD), -1, -2)
        weight = weight.reshape(*lead, quads * QUAD, wide // QUAD)
    blocks, _, _, _, _, lanes = weight.shape
    columns = blocks * lanes
    matrix = np.zeros((image.steps, window.step_inputs, columns), weight.dtype)
    for step, (block, tap) in enumerate((b, t) for b in range(image.blocks) for t in image.taps):
        for kernel_y, kernel_x, first in tap.kernel:
            if image.interleaved:  # one-channel blocks became lanes of a pixel
                rows = weight[:, :, kernel_y, kernel_x, 0].transpose(1, 0, 2).reshape(-1, columns)
            else:
                rows = weight[:, block, kernel_y, kernel_x].transpose(1, 0, 2).reshape(-1, columns)
            matrix[step, first : first + len(rows)] = rows
    return amx.pack_tiles(matrix, outs)


class _Writer:
    """Writes the loops of one kernel."""

    def __init__(
        self, workload: Workload, window: Window, image: Image, grid: amx.Grid, epilogue: Epilogue, order: str
    ):
        self.workload, self.window, self.image, self.grid, self.epilogue = workload, window, image, grid, epilogue
        self.order = order
        self.dtype = epilogue.index_dtype
        self.blocks = window.out_tiles // grid.outs
        self.groups = max(-(-image.tiles // grid.pixels), 1)
        self.lines = -(-grid.outs * amx.ROWS // self.groups)
        self.ahead = order == "weights" and self.blocks > 1 and workload.machine.allows("prefetch")
        self.taps = len(image.taps)
        products = image.steps * image.tiles * image.bands * window.out_tiles * window.batch
        self.threads = workload.machine.threads if products >= PARALLEL_PRODUCTS else 1

    def function(self):
        from tvm.script.ir_builder import IRBuilder

        T = amx.ir()

        window, grid = self.window, self.grid
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            self.renamed = []
            for index, old in enumerate(self.workload.func.params):
                shape, dtype = [int(d) for d in old.ty.shape], str(old.ty.dtype)
                if index == window.weight_index:
                    pack = window.step_inputs // amx.ROWS
                    shape = [self.blocks, self.image.steps, grid.outs, amx.ROWS, amx.OUTPUTS, pack]
                self.renamed.append((old, T.arg(str(old.name), T.buffer(shape, dtype))))
            T.func_attr({"tirx.noalias": True})
            self.data = self.renamed[window.data_index][1]
            self.weight = self.renamed[window.weight_index][1]
            self.output = next(new for old, new in self.renamed if old.same_as(self.epilogue.output))
            self._threads()
        return builder.get()

    def number(self, value: int):
        from tvm import tirx

        return tirx.const(value, self.dtype)

    def _threads(self) -> None:
        """Pictures and bands are shared out between threads; where there are too few, blocks of outputs are."""
        T = amx.ir()

        pictures = self.window.batch * self.image.bands
        if self.threads == 1:
            self._thread(0, pictures, 0, self.blocks)
            return
        with T.parallel(self.number(0), self.number(self.threads)) as thread:
            whole = pictures if pictures >= self.threads else self.blocks
            share = -(-whole // self.threads)
            first = amx.minimum(thread * share, whole)
            count = amx.minimum(first + share, whole) - first
            if whole == pictures:
                self._thread(first, count, 0, self.blocks)
            else:
                self._thread(0, pictures, first, count)

    def _thread(self, first_picture, pictures, first_block, blocks) -> None:
        T = amx.ir()

        amx.configure(self.grid)
        shape = (self.grid.pixels, amx.ROWS, self.grid.outs * amx.OUTPUTS)
        self.scratch = T.alloc_buffer(shape, SUMS[self.window.dtype], scope="local")
        self.source: Any = self.data
        if self.image.copied:
            self.source = T.alloc_buffer(self.image.shape, self.image.dtype, scope="global")
        with T.serial(self.number(0), self._count(pictures)) as each:
            picture = first_picture + each
            n, band = picture // self.image.bands, picture % self.image.bands
            if self.image.copied:
                self.image.copy(self.data, self.source, n, self.image.first_row(band), self.dtype)
            self._band(n, band, first_block, blocks)
        amx.release()

    def _count(self, value):
        return self.number(value) if isinstance(value, int) else value

    def _band(self, n, band, first_block, blocks) -> None:
        """All outputs of a band: groups of tiles in turn, each one's epilogue behind the next one's start."""
        whole = self._count(blocks) * self.groups

        def place(index):
            if self.order == "weights":
                return first_block + index // self.groups, index % self.groups
            return first_block + index % self._count(blocks), index // self._count(blocks)

        lead = self._lead()
        amx.pipelined(
            self.grid,
            self.scratch,
            whole,
            lambda index: self._products(n, band, *place(index), lead, first=True),
            lambda index: self._products(n, band, *place(index), lead, first=False),
            lambda index: self._finish(n, band, *place(index)),
        )

    def _lead(self) -> tuple[int, int]:
        """How many in-blocks, and how many taps of the next one, come before the previous group's epilogue."""
        if self.taps >= LEAD_STEPS:
            return 0, min(LEAD_STEPS, self.taps)
        return min(max(LEAD_STEPS // self.taps, 1), self.image.blocks), 0

    def _products(self, n, band, block, group, lead: tuple[int, int], *, first: bool) -> None:
        """The first or the remaining steps of one group."""
        T = amx.ir()

        image, grid = self.image, self.grid
        whole, part = lead
        tiles = [self._tile(group, pixel) for pixel in range(grid.pixels)]
        base = self._base(n, band, block)
        bases = [image.position(run, start) for run, start in tiles]

        def step(in_block, tap: int) -> None:
            number = in_block * self.taps + tap
            offset = image.taps[tap].offset

            def data(pixel: int):
                return T.address_of(self.source[(*base(in_block), bases[pixel] + offset, 0)])

            def weight(out: int):
                return T.address_of(self.weight[block, number, out, 0, 0, 0])

            grid.step(self.window.dtype, data, image.column_bytes, weight)
            if self.ahead:
                for line in range(self.lines):
                    at = group * self.lines + line
                    amx.prefetch(T.address_of(self.weight[block + 1, number, 0, at, 0, 0]))

        if first:
            grid.zero()
            for in_block in range(whole):
                for tap in range(self.taps):
                    step(self.number(in_block), tap)
            for tap in range(part):
                step(self.number(whole), tap)
            return
        if part:
            for tap in range(part, self.taps):
                step(self.number(whole), tap)
            whole += 1
        if whole < image.blocks:
            unrolled = 1 if self.taps > 2 else max(divisors(image.blocks - whole, 4))
            with T.serial(self.number(0), self.number((image.blocks - whole) // unrolled)) as outer:
                for inner in range(unrolled):
                    for tap in range(self.taps):
                        step(outer * unrolled + (whole + inner), tap)

    def _tile(self, group, pixel: int):
        """(run, first output in the run) of a tile."""

        image = self.image
        index = amx.minimum(group * self.grid.pixels, self.number(max(image.tiles - self.grid.pixels, 0))) + pixel
        if image.tiles < self.grid.pixels:
            index = amx.minimum(index, self.number(image.tiles - 1))
        run, tile = index // image.run_tiles, index % image.run_tiles
        return run, amx.minimum(tile * amx.ROWS, self.number(image.run_length - image.rows))

    def _base(self, n, band, block):
        """Leading indices of the source buffer, by in-block."""
        window, image = self.window, self.image
        group_blocks = 0
        if window.groups > 1:
            group_blocks = block // (self.blocks // window.groups) * image.blocks
        if image.copied:
            return lambda in_block: (group_blocks + in_block,)
        return lambda in_block: (n, group_blocks + in_block)

    def _finish(self, n, band, block, group) -> None:
        """The epilogue of a group whose sums are in the scratch tile."""
        T = amx.ir()

        image, grid, window = self.image, self.grid, self.window
        width = min(grid.outs * amx.OUTPUTS, window.out_lanes)
        for pixel in range(grid.pixels):
            run, start = self._tile(group, pixel)
            row0 = image.first_row(band) + run * image.run_rows
            with T.serial(self.number(0), self.number(image.rows)) as i:
                q = start + i
                p = row0 * window.out_w + q
                if image.pitch != window.out_w and image.run_rows > 1:
                    p = p - q // image.pitch * (image.pitch - window.out_w)
                for part in range(grid.outs * amx.OUTPUTS // width):
                    channel = block * (grid.outs * amx.OUTPUTS) + part * width
                    o, lane = channel // window.out_lanes, channel % window.out_lanes
                    with T.vectorized(self.number(0), self.number(width)) as v:
                        place = [n, o, p, v if width == window.out_lanes else lane + v]
                        result = self.scratch[pixel, i, part * width + v]
                        T.buffer_store(self.output, self.epilogue.at(place, result, self.renamed), place)
