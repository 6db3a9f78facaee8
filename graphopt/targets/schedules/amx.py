"""AMX tile registers in TIR: configuration, loads, products, stores, and the form of packed operands.

A core has eight tile registers of 16 rows x 64 bytes. `tdpbf16ps` adds to a 16 x 16 float32 tile the product of a
16 x 32 bfloat16 tile (rows: positions) and a 32 x 16 one, which is stored as 16 rows of 16 pairs: row k of the register
holds, output by output, inputs 2k and 2k+1. The byte products read (16 x 64) x (64 x 16) the same way, in fours. A
product takes 16 cycles however few rows it has, so full tiles are what matters.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (Programming with AMX).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS = 16
"""Rows of a tile register."""
ROW_BYTES = 64
TILES = 8
OUTPUTS = 16
"""Outputs of one product: 4-byte columns of an accumulator tile."""
PRODUCT_CYCLES = 16
PRODUCTS = {"bfloat16": "llvm.x86.tdpbf16ps", "uint8": "llvm.x86.tdpbusd", "int8": "llvm.x86.tdpbssd"}
"""The product by the element type of its first operand: bfloat16 x bfloat16, uint8 x int8, int8 x int8."""


def ir() -> Any:
    """TVM's builder of loops and calls, untyped: its annotations do not know the expressions it takes."""
    from tvm.script.ir_builder import tirx

    return tirx


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two index expressions."""
    from tvm import tirx

    return tirx.min(a, b)


@dataclass(frozen=True)
class Grid:
    """A register block: `pixels` x `outs` accumulators, and what stays to load operands into."""

    pixels: int
    outs: int
    rows: int
    """Positions in a tile, at most 16."""

    @property
    def fits(self) -> bool:
        """The shorter side's operands stay in registers while the longer side's pass through at least one."""
        return self.pixels * self.outs + min(self.pixels, self.outs) + 1 <= TILES

    def accumulator(self, pixel: int, out: int) -> int:
        return pixel * self.outs + out

    def configuration(self) -> list[int]:
        """The 64 bytes `ldtilecfg` reads, as eight 64-bit words: accumulators and data tiles have `rows` rows."""
        config = np.zeros(64, np.uint8)
        config[0] = 1
        config[16:32].view(np.uint16)[:] = ROW_BYTES
        config[48:56] = ROWS
        for pixel in range(self.pixels):
            for out in range(self.outs):
                config[48 + self.accumulator(pixel, out)] = self.rows
        for register in self._data_registers:
            config[48 + register] = self.rows
        return [int(word) for word in config.view(np.uint64)]

    @property
    def _data_registers(self) -> range:
        first = self.pixels * self.outs
        count = self.pixels if self.pixels <= self.outs else min(self.pixels, TILES - first - self.outs)
        return range(first, first + count)

    @property
    def _weight_registers(self) -> range:
        return range(self._data_registers.stop, TILES)

    def step(self, dtype: str, data, data_stride, weight) -> None:
        """Emit one step of all accumulators.

        `data(pixel)` and `weight(out)` give addresses, `data_stride` is in bytes. The side with fewer tiles stays in
        registers while the other's pass.
        """
        T = ir()

        rows, columns = self._data_registers, self._weight_registers
        held: dict[int, int] = {}  # operand index by register; data and weights have registers of their own

        def operand(registers: range, index: int, address, stride) -> int:
            register = registers[index % len(registers)]
            if held.get(register) != index:
                load(register, address(index), stride)
                held[register] = index
            return register

        if len(columns) >= self.outs:
            pairs = [(p, o) for p in range(self.pixels) for o in range(self.outs)]
        else:
            pairs = [(p, o) for o in range(self.outs) for p in range(self.pixels)]
        for pixel, out in pairs:
            second = T.uint8(operand(columns, out, weight, ROW_BYTES))
            first = T.uint8(operand(rows, pixel, data, data_stride))
            target = T.uint8(self.accumulator(pixel, out))
            T.evaluate(T.call_llvm_intrin("int32", PRODUCTS[dtype], target, first, second))

    def zero(self) -> None:
        """Clear the accumulators."""
        T = ir()

        for number in range(self.pixels * self.outs):
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tilezero", T.uint8(number)))

    def store(self, scratch) -> None:
        """Write the accumulators to `scratch` (pixels, 16, outs * 16), float32 or int32."""
        T = ir()

        for pixel in range(self.pixels):
            for out in range(self.outs):
                address = T.address_of(scratch[pixel, 0, out * OUTPUTS])
                number = T.uint8(self.accumulator(pixel, out))
                stride = T.int64(self.outs * ROW_BYTES)
                T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tilestored64", number, address, stride))


def configure(grid: Grid) -> None:
    """Emit the configuration of this thread's tile registers; their contents become zero."""
    T = ir()

    words: Any = T.alloc_buffer((8,), "uint64", scope="local")
    for i, word in enumerate(grid.configuration()):
        T.buffer_store(words, T.uint64(word), [i])
    T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.ldtilecfg", T.address_of(words[0])))


def release() -> None:
    """Emit the release of the tile registers, so that a switch of threads need not save 8 KB."""
    T = ir()

    T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tilerelease"))


def load(register: int, address, stride) -> None:
    """Emit a tile load, rows `stride` bytes apart."""
    T = ir()

    T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tileloadd64", T.uint8(register), address, T.int64(stride)))


def prefetch(address) -> None:
    """Emit a hint to bring a cache line into the second-level cache."""
    T = ir()

    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))


def pipelined(grid: Grid, scratch, count, head, tail, finish) -> None:
    """Emit `count` groups of products, each one's `finish` behind the `head` of the next.

    `head(i)` clears the accumulators and does the first steps, `tail(i)` the rest; the sums go to `scratch`, from where
    `finish(i)` takes them while the tile unit works on the next group's head. `count` is an expression of loop type.
    """
    from tvm import tirx

    T = ir()

    zero, one = tirx.const(0, count.ty.dtype), tirx.const(1, count.ty.dtype)
    head(zero)
    tail(zero)
    with T.serial(one, count) as index:
        grid.store(scratch)
        head(index)
        finish(index - 1)
        tail(index)
    grid.store(scratch)
    finish(count - 1)


def pack_tiles(matrix: np.ndarray, outs: int) -> np.ndarray:
    """(steps, K, M) with K one step's inputs (32 of 2 bytes, 64 of 1) -> (M / 16 / outs, steps, outs, 16, 16, K / 16).

    Each [16][16][K / 16] is one tile as a product reads it. M must be a multiple of 16 * outs.
    """
    steps, depth, columns = matrix.shape
    pack = depth // ROWS
    split = matrix.reshape(steps, ROWS, pack, columns // OUTPUTS // outs, outs, OUTPUTS)
    return np.ascontiguousarray(split.transpose(3, 0, 4, 1, 5, 2))
