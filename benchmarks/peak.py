#!/usr/bin/env python3
"""What one core can do at most: arithmetic peaks and memory bandwidth, from code that TVM generates.

    python benchmarks/peak.py

Peaks: float32 multiply-adds on vector registers, and bfloat16 products on AMX tiles where the processor has them. The
code has no memory operands and enough independent sums to hide latency. Bandwidth: sums over arrays that fit each level
of the memory. Each figure is the best of many short windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.runtime import amx_permission
from graphopt.targets.cpu import Cpu
from graphopt.targets.tuning.peak import fma_gflops

STEPS = 20000
LEVELS = (("32 KB", 32 << 10), ("1 MB", 1 << 20), ("16 MB", 16 << 20), ("512 MB", 512 << 20))


def amx_gflops(target: Cpu) -> float | None:
    """Peak of bfloat16 products on tiles, GFLOP/s; None without AMX."""
    if "amx_bf16" not in target.features or not amx_permission.granted():
        return None
    from tvm.script import tirx as T

    words = _tile_configuration()

    @T.prim_func(s_tir=True)
    def kernel(data: T.Buffer((512,), "uint16"), config: T.Buffer((8,), "uint64"), out: T.Buffer((4, 256), "float32")):  # type: ignore
        T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.ldtilecfg", T.address_of(config[0])))
        for tile in T.unroll(4):
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tilezero", T.uint8(tile)))
        T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tileloadd64", T.uint8(4), T.address_of(data[0]), T.int64(64)))
        T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tileloadd64", T.uint8(5), T.address_of(data[0]), T.int64(64)))
        for _ in T.serial(STEPS):
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tdpbf16ps", T.uint8(0), T.uint8(4), T.uint8(5)))
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tdpbf16ps", T.uint8(1), T.uint8(4), T.uint8(5)))
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tdpbf16ps", T.uint8(2), T.uint8(4), T.uint8(5)))
            T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tdpbf16ps", T.uint8(3), T.uint8(4), T.uint8(5)))
        T.evaluate(
            T.call_llvm_intrin("int32", "llvm.x86.tilestored64", T.uint8(0), T.address_of(out[0, 0]), T.int64(64))
        )
        T.evaluate(T.call_llvm_intrin("int32", "llvm.x86.tilerelease"))

    arguments = [np.zeros(512, np.uint16), words, np.zeros((4, 256), np.float32)]
    return 2 * 16 * 16 * 32 * 4 * STEPS / best_s(built(kernel, target), arguments) / 1e9


def _tile_configuration() -> np.ndarray:
    """Palette 1, eight tiles of 16 rows x 64 bytes, as `ldtilecfg` reads it."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    return config.view(np.uint64)


def read_gbytes(target: Cpu, nbytes: int) -> float:
    """What summing an array of `nbytes` again and again reads, GB/s."""
    from tvm.script import tirx as T

    lanes = target.capabilities.float_lanes
    rows = nbytes // 4 // lanes // 8

    @T.prim_func(s_tir=True)
    def kernel(data: T.Buffer((rows, 8, lanes), "float32"), out: T.Buffer((8, lanes), "float32")):  # type: ignore
        T.func_attr({"tirx.noalias": True})
        total = T.alloc_buffer((8, lanes), "float32", scope="local")
        for i in T.unroll(8):
            for lane in T.vectorized(lanes):
                total[i, lane] = T.float32(0)
        for row in T.serial(rows):
            for i in T.unroll(8):
                for lane in T.vectorized(lanes):
                    total[i, lane] = total[i, lane] + data[row, i, lane]
        for i in T.unroll(8):
            for lane in T.vectorized(lanes):
                out[i, lane] = total[i, lane]

    arguments = [np.ones((rows, 8, lanes), np.float32), np.zeros((8, lanes), np.float32)]
    return rows * 8 * lanes * 4 / best_s(built(kernel, target), arguments) / 1e9


def built(kernel, target: Cpu) -> Callable[..., Any]:
    import tvm

    compiled: Any = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target.tvm_target())
    return compiled.jit()


def best_s(module: Any, arguments: list[np.ndarray]) -> float:
    """Seconds of one call, the least of many."""
    import tvm

    tensors = [tvm.runtime.tensor(array) for array in arguments]
    timer = module.time_evaluator("main", tvm.cpu(), number=1, repeat=30, min_repeat_ms=2)
    return float(min(timer(*tensors).results))


def main() -> None:
    target = Cpu(threads=1)
    rows = [(f"float32 multiply-adds ({target.capabilities.float_lanes} lanes)", f"{fma_gflops(target):.0f} GFLOP/s")]
    tiles = amx_gflops(target)
    rows.append(("bfloat16 on AMX tiles", "none here" if tiles is None else f"{tiles:.0f} GFLOP/s"))
    rows += [(f"reading {name}", f"{read_gbytes(target, nbytes):.0f} GB/s") for name, nbytes in LEVELS]
    print(f"| {target.llvm_cpu}, one core | |\n|---|---|")
    for name, figure in rows:
        print(f"| {name} | {figure} |")


if __name__ == "__main__":
    main()
