"""How a matrix product on tensor cores is cut up: tiles of blocks and warps, steps along k, and a rule that puts the
tiles in order without measuring any.

Source: NVIDIA, CUTLASS, "Efficient GEMM in CUDA" (tiles of blocks, warps and instructions; sliced k; split k).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from graphopt.targets.schedules.cuda.gpu import WARP, Gpu
from graphopt.targets.schedules.cuda.products import Product
from graphopt.targets.schedules.workload import Decision

FRAGMENT = 16
"""Rows, columns and depth of one instruction's matrices."""
SUMS = {"float16": "float32", "bfloat16": "float32", "int8": "int32"}
BYTES = {"float16": 2, "bfloat16": 2, "int8": 1}
LOAD_BYTES = 16
"""What a thread moves at a time."""
SHAPES = (
    (128, 256, 2, 4), (256, 128, 4, 2), (128, 128, 2, 2), (128, 128, 4, 2), (256, 64, 4, 1), (128, 64, 2, 2),
    (128, 64, 4, 2), (64, 128, 2, 2), (64, 128, 2, 4), (64, 64, 2, 2), (64, 32, 2, 2), (32, 64, 2, 2), (128, 32, 4, 1),
    (32, 32, 2, 2), (32, 32, 1, 1), (16, 64, 1, 2), (16, 32, 1, 1), (64, 16, 2, 1), (16, 16, 1, 1),
)  # fmt: skip
"""Rows and columns of a block's tile, warps down and across."""
DEPTHS = (32, 64, 128)
DEEPEST_MOVING = 64
"""Where operands pass through registers: more would not fit there."""
SLICES = (1, 2, 4)
STAGES = (3, 4, 6)
"""Buffers of operands, where they are copied past the registers; else there are two."""
CLUSTERS = (1, 2, 4, 8)
"""Blocks that share out k; eight is what every GPU with clusters can do."""
MOST_SHARED = 160 << 10
"""Shared memory of a block, in bytes; beyond 48 KB the kernel asks the driver for it."""
MOST_SUMS = 128
"""Registers of a thread for sums, where operands do not pass through registers."""
MOST_SUMS_MOVING = 64
"""Where they do."""


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes, and how its warps share it out."""

    rows: int
    columns: int
    depth: int
    """Of a step."""
    down: int
    across: int
    """Warps along rows and columns."""
    slices: int
    """Groups of warps that share out each step's k."""
    stages: int = 2
    """Buffers of operands: 2 are filled through registers, more by asynchronous copies."""
    cluster: int = 1
    """Blocks that share out the steps, and add up their sums through each other's shared memory."""

    @property
    def decision(self) -> Decision:
        return dict(vars(self))

    @property
    def asynchronous(self) -> bool:
        return self.stages > 2

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
        each other without a gap; others are parts of long rows, so spaced that eight fall into different banks.
        """
        return (self.depth // FRAGMENT, FRAGMENT) if dtype == "int8" else (1, self.depth + LOAD_BYTES // BYTES[dtype])

    @property
    def out_pitch(self) -> int:
        return self.columns + 4

    def stage_bytes(self, rows: int, dtype: str) -> int:
        """One buffer of an operand of `rows` rows."""
        planes, pitch = self.layout(dtype)
        return rows * planes * pitch * BYTES[dtype]

    def shared_bytes(self, dtype: str) -> int:
        """Operands; when these are used up, sums take their place."""
        operands = self.stages * self.stage_bytes(self.rows + self.columns, dtype)
        return max(operands, self.slices * self.rows * self.out_pitch * 4)

    def steps(self, depth: int) -> int:
        """Of each block of a cluster."""
        return ceil(depth / (self.depth * self.cluster))

    def loads(self, rows: int, dtype: str) -> int:
        """Moves of 16 bytes that each thread makes for one step of an operand."""
        return ceil(rows * self.depth * BYTES[dtype] / LOAD_BYTES / self.threads)

    def registers(self, dtype: str) -> int:
        """An estimate, a thread: sums, operands on their way and in fragments, addresses."""
        down, across = self.grid
        loads = self.loads(self.rows, dtype) + self.loads(self.columns, dtype)
        moving = 2 * loads + 24 if self.asynchronous else 4 * loads
        return down * across * 8 + moving + 8 * (down + across) // (1 if dtype != "int8" else 2) + 40

    def fits(self, product: Product, gpu: Gpu) -> bool:
        """Whether the GPU can run it, and it is not larger than the product wants."""
        dtype, limits = product.weight_dtype, gpu.limits
        down, across = self.grid
        if down * across * 8 > (MOST_SUMS if self.asynchronous else MOST_SUMS_MOVING) or self.threads > 512:
            return False
        if self.depth > DEEPEST_MOVING and not self.asynchronous:
            return False
        if self.depth % (FRAGMENT * self.slices) or self.registers(dtype) > limits.thread_registers:
            return False
        if self.columns > FRAGMENT and self.columns >= 2 * product.columns:
            return False
        if self.rows > FRAGMENT and self.rows >= 2 * product.rows:
            return False
        if self.cluster > 1 and (self.slices > 1 or self.steps(product.depth) < 2 or self.rows % self.cluster):
            return False
        return self.shared_bytes(dtype) <= min(limits.shared_bytes - 1024, MOST_SHARED)

    def resident(self, dtype: str, gpu: Gpu) -> int:
        """Blocks that a multiprocessor holds at a time."""
        limits = gpu.limits
        shared = self.shared_bytes(dtype) + 1024  # the driver's own share
        return max(
            min(
                limits.threads // self.threads,
                limits.blocks,
                limits.shared_bytes // shared,
                limits.registers // (self.registers(dtype) * self.threads),
            ),
            1,
        )


def tiles(product: Product, gpu: Gpu) -> list[Tile]:
    """All that fit, the one predicted to be fastest first."""
    features = gpu.limits.features
    copies = product.copied and "cp_async" in features and gpu.allows("cp_async")
    clusters = CLUSTERS if copies and "clusters" in features and gpu.allows("clusters") else (1,)
    found = []
    for rows, columns, down, across in SHAPES:
        for depth in DEPTHS:
            for slices in SLICES:
                for stages in STAGES if copies else (2,):
                    for cluster in clusters:
                        tile = Tile(rows, columns, depth, down, across, slices, stages, cluster)
                        if tile.fits(product, gpu):
                            found.append(tile)
    return sorted(found, key=lambda tile: predicted(product, tile, gpu))


MULTIPLY_BYTES = 2048
"""Of float16 or int8 products, in bytes of one operand's k: what the matrix units of a multiprocessor do a cycle."""
SHARED_BYTES = 128
"""From shared memory, a cycle and multiprocessor."""
MEMORY_BYTES = 32
"""From the second-level cache, a cycle and multiprocessor."""
STEP_CYCLES = 60
"""Barriers and addresses of a step, which nothing hides."""
LATENCY_CYCLES = 1200
"""Of one load from memory, and of what must be done with it; a step waits where other steps have less to do."""
CLUSTER_CYCLES = 1500
"""Two barriers of a cluster, and reading each other's sums."""


def predicted(product: Product, tile: Tile, gpu: Gpu) -> float:
    """Cycles of the whole product, from the counts of what passes each unit. A rule, not a measurement."""
    dtype = product.weight_dtype
    width = BYTES[dtype]
    down, across = tile.grid
    blocks = ceil(product.rows / tile.rows) * ceil(product.columns / tile.columns) * tile.cluster
    steps = tile.steps(product.depth)
    multiply = tile.rows * tile.columns * tile.depth * width / MULTIPLY_BYTES
    reads = (down + across) * FRAGMENT * tile.depth // tile.slices * width * tile.threads // WARP
    writes = (tile.rows + tile.columns) * tile.depth * width
    moved = max(multiply, (reads + writes) / SHARED_BYTES, writes / MEMORY_BYTES)
    resident = min(tile.resident(dtype, gpu), ceil(blocks / gpu.multiprocessors))
    latency = LATENCY_CYCLES / (tile.stages - 1)
    step = max(resident * moved + STEP_CYCLES, latency)
    finish = tile.rows * tile.columns * 4 * (tile.slices + 1) / SHARED_BYTES + LATENCY_CYCLES
    if tile.cluster > 1:
        finish += CLUSTER_CYCLES
    rounds = ceil(blocks / (gpu.multiprocessors * resident))
    return rounds * (steps * step + LATENCY_CYCLES + resident * finish)
