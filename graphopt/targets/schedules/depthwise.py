"""Depthwise convolution and pooling on blocked activations, as loops of register tiles.

Idea: a tile of rows x columns outputs of one vector of channels accumulates in registers. The tile walks its patch of
the input once, position by position: each vector is loaded (and widened, where it is bfloat16) once and added to every
output whose window reaches it, so a 3x3 window over 4 rows loads 1.5 vectors an output instead of 9. Borders skip the
taps that lie outside, so nothing is padded or copied. With a tile of one row the window's rows stay a loop, which
keeps the code of large windows small.

Loop order: n, channel block, row tile (parallel) / vector of the block / column tile / input row, input column, taps.
All but the loop over tiles are unrolled.

Register budget: rows * columns accumulators + 2 inputs; the weights of the window, or of one of its rows, stay in what
is left and are operands from memory beyond that.

Source: Zhang, Lo, Lu: High Performance Depthwise and Pointwise Convolutions on Mobile Devices, AAAI 2020, section 3.
"""

from __future__ import annotations

from graphopt.targets.schedules.depthwise_loops import ANCHORS, DepthwiseLoops, Window
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, unique, work

NAME = "depthwise"
VERSION = 1
BODY_TERMS = 1300
"""Most products written out in a kernel: what compiles in about a second."""
MOST_COLUMNS = 16
MOST_ROWS = 4
SPACE = 8
"""Decisions offered at most."""
ACCUMULATORS = 5 / 8
"""Most of the registers that hold outputs. Fitted: with more, weights and inputs are moved to and fro."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, columns}, those with the fewest loads and whole tiles first."""
    window = Window.of(workload)
    if window is None:
        return None
    found: list[tuple[float, Decision]] = []
    for rows in _sizes(window.rows.extent, MOST_ROWS):
        for columns in _sizes(window.columns.extent, MOST_COLUMNS):
            if rows * columns > workload.machine.registers * ACCUMULATORS:
                continue
            if rows > 1 and window.terms(rows, columns) > BODY_TERMS:
                continue
            found.append((_cost(window, rows, columns, workload.machine.registers), {"rows": rows, "columns": columns}))
    found.sort(key=lambda entry: entry[0])
    return unique(decision for _, decision in found)[:SPACE]


def _sizes(extent: int, most: int) -> list[int]:
    """Tile sizes that differ in the number of tiles they cut `extent` into."""
    return sorted({-(-extent // -(-extent // size)) for size in range(1, min(extent, most) + 1)}, reverse=True)


def _cost(window: Window, rows: int, columns: int, registers: int) -> float:
    """Instructions of an output: products, loads, and what a tile costs by itself."""
    taps = window.rows.kernel * window.columns.kernel
    patch = _reach(window.rows, rows) * _reach(window.columns, columns)
    loads = patch / (rows * columns) * window.load_instructions
    held = taps if rows > 1 else window.columns.kernel
    spilled = max(rows * columns + held + 2 - registers, 0) / held
    weights = (taps if rows == 1 else spilled * taps) / (rows * columns)
    return taps + loads + 0.5 * weights + (12 if rows > 1 else 6 * window.rows.kernel) / (rows * columns)


def _reach(axis, outputs: int) -> int:
    """Inputs that neighbouring outputs read, those between the taps left out."""
    return min((outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1, outputs * axis.kernel)


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is one of ANCHORS."""
    anchor = workload.anchor(*ANCHORS)
    parallel = work(anchor) >= PARALLEL_WORK and workload.machine.threads != 1
    return Kernel(DepthwiseLoops(workload).write(decision["rows"], decision["columns"], parallel=parallel))
