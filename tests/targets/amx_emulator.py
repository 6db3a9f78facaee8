"""AMX tile registers in numpy, for machines that have none: what a kernel computes, at a thousandth of the speed.

`emulated` replaces the tile instructions of a function by calls of packed functions. They keep eight tiles and their
configuration, and read and write the addresses they are given, as the instructions do. One thread only.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG, TDPBUSD, TDPBF16PS, ...).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

PREFIX = "graphopt.test.amx."
INSTRUCTIONS = (
    "ldtilecfg", "tilezero", "tileloadd64", "tdpbusd", "tdpbssd", "tdpbf16ps", "tilestored64", "tilerelease",
)  # fmt: skip


class Tiles:
    """The registers: rows of 64 bytes each, as many as configured."""

    def __init__(self) -> None:
        self.rows = [0] * 8
        self.data = [np.zeros((16, 64), np.uint8) for _ in range(8)]
        self.products = 0
        """Tile products so far."""

    def ldtilecfg(self, address) -> None:
        config = _memory(address, 64)
        assert config[0] == 1 and list(config[16:32].view(np.uint16)) == [64] * 8
        self.rows = [int(r) for r in config[48:56]]
        assert all(0 < r <= 16 for r in self.rows)
        for tile in self.data:
            tile[:] = 0

    def tilezero(self, tile: int) -> None:
        self.data[tile][:] = 0

    def tileloadd64(self, tile: int, address, stride: int) -> None:
        self.data[tile][:] = 0
        for row in range(self.rows[tile]):
            self.data[tile][row] = _memory(address, 64, row * stride)

    def tilestored64(self, tile: int, address, stride: int) -> None:
        for row in range(self.rows[tile]):
            _memory(address, 64, row * stride)[:] = self.data[tile][row]

    def tdpbusd(self, target: int, first: int, second: int) -> None:
        self._quads(target, first, second, np.uint8)

    def tdpbssd(self, target: int, first: int, second: int) -> None:
        self._quads(target, first, second, np.int8)

    def _quads(self, target: int, first: int, second: int, kind) -> None:
        rows = self.rows[target]
        a = self.data[first].view(kind)[:rows].astype(np.int32)
        b = self.data[second].view(np.int8).reshape(16, 16, 4).astype(np.int32)
        sums = self.data[target].view(np.int32)[:rows]
        sums += a @ b.transpose(0, 2, 1).reshape(64, 16)
        self.products += 1

    def tdpbf16ps(self, target: int, first: int, second: int) -> None:
        rows = self.rows[target]
        a = _widened(self.data[first].view(np.uint16)[:rows])
        b = _widened(self.data[second].view(np.uint16)).reshape(16, 16, 2)
        sums = self.data[target].view(np.float32)[:rows]
        sums += a @ b.transpose(0, 2, 1).reshape(32, 16)
        self.products += 1

    def tilerelease(self) -> None:
        self.rows = [0] * 8


TILES = Tiles()


def emulated(func: Any) -> Any:
    """The function with every tile instruction replaced."""
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import Call, Op

    names, operator = _names(), Op.get("tirx.call_llvm_intrin")

    def rewrite(call):
        if not isinstance(call.op, Op) or not call.op.same_as(operator):
            return call
        name = names.get(int(call.args[0].value))
        return call if name is None else tirx.call_packed(PREFIX + name, *call.args[1:])

    return func.with_body(tvm_ffi.structural_map(func.body, (Call, rewrite)))


@lru_cache(maxsize=1)
def _names() -> dict[int, str]:
    """By LLVM's number of an intrinsic, the instruction; the packed functions exist from now on."""
    import tvm_ffi
    from tvm import tirx

    found = {}
    for name in INSTRUCTIONS:
        tvm_ffi.register_global_func(PREFIX + name, getattr(TILES, name), override=True)
        call: Any = tirx.call_llvm_intrin("int32", f"llvm.x86.{name}")
        found[int(call.args[0].value)] = name
    return found


def _memory(address, size: int, offset: int = 0) -> np.ndarray:
    place = (address.value if hasattr(address, "value") else int(address)) + offset
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(place))


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
