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
    from tvm import tirx

    elements = LINE_BYTES * 8 // tvm.DataType(str(buffer.dtype)).bits
    first = buffer[tuple([0] * (len(buffer.shape) - 1) + [number * elements])]
    hint = [tirx.const(value, "int32") for value in (0, level, 1)]  # a read, the level, data
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(first), *hint))
