"""Software prefetch: ask for a cache line long before it is read.

Idea: weights are read once a run, so they come from the third-level cache or from memory, which one core reads at a
tenth of the speed it computes with them. While a kernel computes with one block of weights it requests the next one, a
few lines at a time, spread evenly over the block's arithmetic: a core has 10 to 48 requests in flight, and a burst of
more than these stalls it.

A request is a hint: it never faults, so it may pass the end of a buffer.

Source: Mowry, Lam, Gupta: Design and Evaluation of a Compiler Algorithm for Prefetching, ASPLOS 1992.
"""

from __future__ import annotations

from typing import Any

LINE_BYTES = 64
L1, L2 = 3, 2
"""Where a line goes, in LLVM's words: `prefetcht0`, `prefetcht1`."""


def lines(buffer, start, count: int, level: int = L2) -> list[Any]:
    """Statements that request `count` cache lines of `buffer` from line `start` (an expression) on.

    The buffer is taken as one contiguous stretch of memory. `start` counts from the buffer's first element.
    """
    return [line(buffer, start + i, level) for i in range(count)]


def line(buffer, number, level: int = L2) -> Any:
    """A statement that requests the cache line `number` of `buffer`."""
    import tvm

    elements = LINE_BYTES * 8 // tvm.DataType(str(buffer.dtype)).bits
    return element(buffer[tuple([0] * (len(buffer.shape) - 1) + [number * elements])], level)


def element(load, level: int = L2) -> Any:
    """A statement that requests the cache line of one element, written as a load of it."""
    from tvm import tirx

    hint = [tirx.const(value, "int32") for value in (0, level, 1)]  # a read, the level, data
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(load), *hint))


STREAM = "graphopt.stream"
"""Annotation of a loop: how many bytes ahead of its reads of the parameter `weight` lines are to be requested."""


def stream(func, weight) -> Any:
    """A scheduled function with the requests that its loops annotated with STREAM ask for.

    Such a loop walks through the buffer `weight` from front to back. Each turn requests as many lines as it reads, the
    annotated distance ahead: hardware stops at the end of every page of 4 KB, so a single stream stays far below the
    speed of memory.
    """
    import tvm
    import tvm_ffi
    from tvm import s_tir, tirx
    from tvm.ir import Var
    from tvm.ir.expr import TensorLoad

    from graphopt.targets.schedules.workload import nodes

    elements = LINE_BYTES * 8 // tvm.DataType(str(weight.dtype)).bits

    def with_requests(loop):
        if STREAM not in loop.annotations:
            return loop
        realize = nodes(loop.body, s_tir.SBlockRealize)[0]
        load = next(x for x in nodes(realize.block.body, TensorLoad) if x.source.same_as(weight))
        bound = [(v.var, value) for v, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)]
        inner = [(x.loop_var, tirx.const(0, "int32")) for x in nodes(loop.body, tirx.For)]
        turn = 1
        for x in nodes(loop.body, tirx.For):
            turn *= int(x.extent)

        def replaced(expression, pairs):
            return tvm_ffi.structural_map(
                expression, [(Var, lambda var: next((new for old, new in pairs if old.same_as(var)), var))]
            )

        indices = [replaced(replaced(i, bound), inner) for i in load.indices]
        ahead = int(loop.annotations[STREAM]) * elements // LINE_BYTES
        requests = [
            element(weight[(*indices[:-1], indices[-1] + ahead + i * elements)])
            for i in range(max(turn // elements, 1))
        ]
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, tirx.SeqStmt([*requests, loop.body])
        )  # fmt: skip

    return tvm_ffi.structural_map(func, [(tirx.For, with_requests)])
