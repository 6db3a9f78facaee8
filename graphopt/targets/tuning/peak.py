"""What one core of this machine can compute at most, measured by code that TVM generates: no compiler is needed.

Vectors in registers are multiplied and added without touching memory: `a[j] = a[j] * x + y` for enough `j` that the
latency of one fused multiply-add is hidden. For bytes `a[j]` are 32-bit sums and a step adds a dot product: of the
instruction that kernels take (see `schedules.dot`), or of AMX tiles.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from graphopt.targets.base import TuningReport
    from graphopt.targets.llvm import LlvmTarget

STEPS = 20_000
WINDOWS = 40


def with_shares(report: TuningReport, target: LlvmTarget) -> TuningReport:
    """The report with this machine's peaks, and each kernel's share of them on the target's number of threads."""
    found = peaks(target)

    def share(row: Mapping[str, Any]) -> float | None:
        peak = found.get(row["kind"])
        return None if peak is None or row["gflops"] is None else row["gflops"] / (peak * target.thread_count)

    rows = tuple({**row, "share_of_peak": share(row)} for row in report.rows)
    return replace(report, rows=rows, peaks=dict(found))


@lru_cache(maxsize=8)
def peaks(target: LlvmTarget) -> Mapping[str, float]:
    """By element type of a kernel's weights, GFLOP/s (GOP/s of bytes) of one core. Takes about a second, once."""
    found = {"float32": fma_gflops(target)}
    bytes_ = tile_gops(target) if "amx_int8" in target.features else dot_gops(target)
    if bytes_ is not None:
        found["int8"] = bytes_
    return found


def fma_gflops(target: LlvmTarget) -> float:
    """float32 GFLOP/s of one core, a fused multiply-add counted as two. Takes about half a second."""
    machine = target.machine()
    count = (machine.registers - 4) * machine.lanes
    arrays = [np.full(n, 0.5, np.float32) for n in (machine.lanes, machine.lanes, count)]
    return 2 * STEPS * count / _best_s(_chains(machine.lanes, machine.registers - 4), target, arrays) / 1e9


def dot_gops(target: LlvmTarget) -> float | None:
    """GOP/s of one core with the dot product of bytes that kernels take for small weights, a multiply-add counted as
    two; None where there is none."""
    from graphopt.targets.schedules import dot

    machine = target.machine()
    way = dot.best_way(machine)
    if way is None:
        return None
    chains = machine.registers - 6 if way == "vnni" else machine.registers // 2 - 2
    count = chains * machine.lanes
    arrays = [np.zeros(n, np.int32) for n in (machine.lanes, machine.lanes, count)]
    return 2 * dot.QUAD * STEPS * count / _best_s(_dots(way, machine.lanes, chains), target, arrays) / 1e9


def tile_gops(target: LlvmTarget) -> float | None:
    """GOP/s of one core with AMX tiles of bytes; None where the system does not give them."""
    from graphopt.runtime import amx_permission

    if not amx_permission.granted():
        return None
    config = np.zeros(64, np.uint8)
    config[0] = 1
    config[16:32].view(np.uint16)[:] = 64
    config[48:56] = 16
    arrays = [np.zeros(1024, np.uint8), config.view(np.uint64), np.zeros((16, 16), np.int32)]
    return 2 * 16 * 16 * 64 * TILE_SUMS * STEPS / _best_s(_tiles(), target, arrays) / 1e9


TILE_SUMS = 4
"""Accumulators that hide the latency of a tile product."""


def _best_s(func: Any, target: LlvmTarget, arrays: list[np.ndarray]) -> float:
    """Seconds of one call, the least of many."""
    import tvm

    from graphopt.targets.relax import stack_buffers

    stack_buffers.register()
    compiled_for = target.tvm_target()
    with compiled_for, tvm.transform.PassContext(opt_level=3):
        run: Any = tvm.compile(tvm.IRModule({"main": func}), target=compiled_for).jit()["main"]
    operands = [tvm.runtime.tensor(array) for array in arrays]
    best = float("inf")
    for _ in range(WINDOWS):
        begin = time.perf_counter()
        run(*operands)
        best = min(best, time.perf_counter() - begin)
    return best


def _chains(lanes: int, count: int) -> Any:
    """A PrimFunc of `count` independent chains of fused multiply-adds, `STEPS` long."""
    from tvm.script import tirx as T

    total = lanes * count

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((lanes,), "float32"), y: T.Buffer((lanes,), "float32"), out: T.Buffer((total,), "float32")):  # pyright: ignore
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        held = T.alloc_buffer((total,), "float32", scope="local")
        for j in T.unroll(count):
            for lane in T.vectorized(lanes):
                held[j * lanes + lane] = out[j * lanes + lane]
        for _ in T.serial(STEPS):
            for j in T.unroll(count):
                for lane in T.vectorized(lanes):
                    held[j * lanes + lane] = held[j * lanes + lane] * x[lane] + y[lane]
        for j in T.unroll(count):
            for lane in T.vectorized(lanes):
                out[j * lanes + lane] = held[j * lanes + lane]

    return main


def _dots(way: Any, lanes: int, count: int) -> Any:
    """A PrimFunc of `count` independent chains of dot products, `STEPS` long: quads x, weights y."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder

    from graphopt.targets.schedules import dot
    from graphopt.targets.schedules.amx import ir

    T = ir()
    wide: Any = lanes
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x, y, out = (T.arg(n, T.buffer((size,), "int32")) for n, size in
                     (("x", lanes), ("y", lanes), ("out", count * lanes)))  # fmt: skip
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        held = T.alloc_buffer((count * lanes,), "int32", scope="local")
        places = [T.ramp(j * lanes, 1, wide) for j in range(count)]
        weights = [tirx.reinterpret(f"int8x{dot.QUAD * lanes}", y[T.ramp(0, 1, wide)])]
        for place in places:
            T.buffer_store(held, out[place], [place])
        with T.serial(0, STEPS) as step:  # another quad each time: products of the same would be computed once
            for j, place in enumerate(places):
                T.buffer_store(held, dot.products(way, lanes, held[place], x[(step + j) % lanes], weights), [place])
        for place in places:
            T.buffer_store(out, held[place], [place])
    return builder.get()


def _tiles() -> Any:
    """A PrimFunc of `TILE_SUMS` independent chains of tile products, `STEPS` long."""
    from tvm.script.ir_builder import IRBuilder

    from graphopt.targets.schedules.amx import ir

    T = ir()

    def do(name: str, *operands: Any) -> None:
        T.evaluate(T.call_llvm_intrin("int32", f"llvm.x86.{name}", *operands))

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        data = T.arg("data", T.buffer((1024,), "uint8"))
        config = T.arg("config", T.buffer((8,), "uint64"))
        out = T.arg("out", T.buffer((16, 16), "int32"))
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        do("ldtilecfg", T.address_of(config[0]))
        for tile in range(TILE_SUMS):
            do("tilezero", T.uint8(tile))
        for tile in (TILE_SUMS, TILE_SUMS + 1):
            do("tileloadd64", T.uint8(tile), T.address_of(data[0]), T.int64(64))
        with T.serial(0, STEPS):
            for tile in range(TILE_SUMS):
                do("tdpbusd", T.uint8(tile), T.uint8(TILE_SUMS), T.uint8(TILE_SUMS + 1))
        do("tilestored64", T.uint8(0), T.address_of(out[0, 0]), T.int64(64))
        do("tilerelease")
    return builder.get()
