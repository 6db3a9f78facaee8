"""What one core of this machine can compute at most, measured by code that TVM generates: no compiler is needed.

Vectors in registers are multiplied and added without touching memory: `a[j] = a[j] * x + y` for enough `j` that the
latency of one fused multiply-add is hidden.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from graphopt.targets.cpu import Cpu

STEPS = 20_000
WINDOWS = 40


def fma_gflops(target: Cpu) -> float:
    """float32 GFLOP/s of one core, a fused multiply-add counted as two. Takes about half a second."""
    import tvm

    machine = target.machine()
    func = _chains(machine.lanes, machine.registers - 4)
    compiled_for = target.tvm_target()
    with compiled_for, tvm.transform.PassContext(opt_level=3):
        run: Any = tvm.compile(tvm.IRModule({"main": func}), target=compiled_for).jit()["main"]
    operands = [tvm.runtime.empty((machine.lanes,), "float32") for _ in range(2)]
    out = tvm.runtime.empty(((machine.registers - 4) * machine.lanes,), "float32")
    for operand in (*operands, out):
        operand.copyfrom(np.full(tuple(operand.shape), 0.5, np.float32))
    best = float("inf")
    for _ in range(WINDOWS):
        begin = time.perf_counter()
        run(*operands, out)
        best = min(best, time.perf_counter() - begin)
    return 2 * STEPS * (machine.registers - 4) * machine.lanes / best / 1e9


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
