"""Direct convolution on blocked activations.

Idea: a tile of rows x columns of outputs x `outs` blocks of output channels stays in vector registers while the input
channels and the window's positions stream past; each step multiplies broadcast scalars of the input with vectors of the
packed weight. Tiles at the border skip the taps that lie outside, so nothing is padded. Where a tile's weights exceed
the first-level cache, input channels are taken in panels: all tiles of a pair of output blocks use one panel before the
next, their sums waiting in memory. The next panel is requested while the present one is in use, so that weights, which
a run reads once, arrive in time from the third-level cache or from memory.

Loop order: n, group, out-blocks, row tile (parallel) / column tile / in-block, kh, kw, in-lane / columns, outs, lane;
with panels: n, group, out-blocks (parallel) / panel / row tile, column tile / ...; with order "data": n, group, row
tile (parallel) / column tile / out-blocks / .... The innermost three are unrolled and vectorised. The taps kh, kw stay
loops outside the in-lane: unrolled inside, neighbouring outputs share scalars, which the compiler keeps and spills.

Register budget: rows * columns * outs accumulators + outs weights + 1 broadcast scalar <= registers.

Source: Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures, SC 2018,
section II (register and cache blocking, prefetch); Liu et al., NeoCPU, USENIX ATC 2019, section 3.1 (NCHW[x]c).
"""

from __future__ import annotations

from collections.abc import Callable

from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.conv2d_by_element import ByElementLoops, applies, reads_constants
from graphopt.targets.schedules.conv2d_loops import ConvolutionLoops, Window
from graphopt.targets.schedules.register_tiles import Axis, Run
from graphopt.targets.schedules.workload import (
    PARALLEL_WORK,
    Decision,
    Kernel,
    Workload,
    divisors,
    unique,
    work,
)

NAME = "conv2d_blocked"
VERSION = 3
FMA_PER_CYCLE = 2
STEP_CYCLES = 1.0
"""What a step costs beyond its arithmetic; fitted to measured tiles of Sapphire Rapids."""
LOADS_PER_CYCLE = 1.6
"""Two ports, less what address arithmetic and bank conflicts cost; fitted likewise."""
FMA_LATENCY = 4
VECTOR_BYTES = 64
L1_BYTES = 32 << 10
L2_BYTES = 1 << 20
FAR_BYTES = 256 << 10
"""Weights of a tile past this push each other out of the second-level cache before they are used again."""
L1_MISS, L2_MISS = 1.05, 1.15
"""By how much arithmetic slows down that waits for weights; fitted likewise."""
SPACE = 24
"""Decisions offered at most."""
L2_BYTES_PER_CYCLE = 28
MEMORY_BYTES_PER_CYCLE = 5
BODIES = 16
"""Most bodies of tiles in a kernel: each is compiled apart."""
WAITING_BYTES = 1 << 18
"""Most memory for sums that wait."""


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, columns, outs, panel, order}, by predicted cycles."""
    block = workload.anchor("conv2d")
    if block is None or not set(before(workload, "conv2d")) <= {"pad"}:
        return None
    return decisions(Window.of(block), workload)


def decisions(window: Window, workload: Workload, most: Callable[[int], int] | None = None) -> list[Decision]:
    """Register tiles, panels and orders for a direct convolution, best prediction first.

    `most` says how many positions fit the registers beside some vectors of outputs, where products take others than a
    sum for each, the weights and a scalar.
    """
    found: list[tuple[float, int, Decision]] = []
    for rows, columns, outs in _tiles(window, workload, most):
        runs = window.rows.runs(rows), window.columns.runs(columns, clip=False), _outs(window).runs(outs)
        bodies = len(runs[0]) * len(runs[1]) * len(runs[2])
        for panel, order in _orders(window, runs):
            cost = _cycles(window, workload, runs, panel, order)
            decision = {"rows": rows, "columns": columns, "outs": outs, "panel": panel, "order": order}
            found.append((cost * (1 if bodies <= BODIES else bodies), bodies, decision))
    found.sort(key=lambda entry: entry[0])
    return unique(decision for _, bodies, decision in found if bodies <= max(BODIES, found[0][1]))[:SPACE]


def before(workload: Workload, anchor: str) -> list[str]:
    """Names of the blocks that come before the anchor."""
    names = list(workload.blocks)
    return names[: names.index(anchor)]


def _outs(window: Window) -> Axis:
    return Axis(window.out_blocks, window.out_blocks, 1, 1, 1, 0)


def _tiles(
    window: Window, workload: Workload, fitting: Callable[[int], int] | None = None
) -> list[tuple[int, int, int]]:
    """Sizes of register tiles that fit; several rows only where one tile spans them."""
    registers = workload.machine.registers
    vectors = max(window.out_lanes // workload.machine.lanes, 1)
    found = []
    if window.rows.extent * window.columns.extent == 1:  # one row times a matrix: enough sums to hide their latency
        return [(1, 1, outs) for outs in (4, 8, 12, 2, 1) if outs <= window.out_blocks]
    elements = _by_element(workload)
    for outs in range(1, min(6 if elements else 4, window.out_blocks) + 1):
        if fitting is not None:
            most = fitting(outs * vectors)
        elif elements:
            most = by_element.most_positions(outs * vectors, workload.machine.lanes)
            if window.in_lanes == 1:
                columns = window.columns
                most = by_element.most_positions_in_planes(
                    outs * vectors, columns.stride, columns.kernel, workload.machine.lanes
                )
        elif window.in_lanes > 1:
            most = (registers - 1) // (outs * vectors) - 1
        else:  # the compiler unrolls kw after all, and neighbouring outputs share scalars
            most = (registers - outs * vectors) // (outs * vectors + (1 if outs * vectors > 1 else 0))
        if most < 1:
            break
        for columns in _cuts(window.columns.extent, most):
            whole = columns == window.columns.extent
            for rows in _cuts(window.rows.extent, most // columns) if whole else (1,):
                largest = elements and rows * columns == window.rows.extent * window.columns.extent
                if largest or rows * columns * outs * vectors * 4 >= registers or rows * columns * 2 > most:
                    found.append((rows, columns, outs))
    return found


def _cuts(extent: int, most: int) -> list[int]:
    """Tile sizes that differ in the number of tiles they cut `extent` into."""
    return sorted({-(-extent // -(-extent // size)) for size in range(1, min(extent, most) + 1)}, reverse=True)


def _orders(window: Window, runs: tuple[list[Run], list[Run], list[Run]]) -> list[tuple[int, str]]:
    """Panels of input blocks, and orders."""
    rows, columns, outs = runs
    tiles = sum(r.count for r in rows) * sum(c.count for c in columns)
    found = [(window.in_blocks, "weights")]
    if tiles == 1:
        return found
    per_block = outs[0].size * window.taps // window.in_blocks * window.out_lanes * 4
    waiting = outs[0].size * window.rows.extent * window.columns.extent * window.out_lanes * 4
    if waiting <= WAITING_BYTES:
        panels = [d for d in divisors(window.in_blocks, window.in_blocks - 1) if d * per_block <= L1_BYTES]
        found += [(panel, "weights") for panel in panels[-2:]]
    if sum(run.count for run in outs) > 1:
        found.append((window.in_blocks, "data"))
    return found


def predicted_cycles(workload: Workload, decision: Decision) -> float:
    """Of one image, on one core: comparable with the other templates' predictions."""
    window = Window.of(workload.anchor("conv2d", "conv2d_int8"))
    runs = (
        window.rows.runs(decision["rows"]),
        window.columns.runs(decision["columns"], clip=False),
        _outs(window).runs(decision["outs"]),
    )
    return _cycles(window, workload, runs, decision["panel"], decision["order"])


def _cycles(window: Window, workload: Workload, runs, panel: int, order: str) -> float:
    """Predicted cycles of one image; instructions where numbers are multiplied as elements of vectors, which take about
    half a cycle on the larger cores and one on the smaller."""
    vectors = max(window.out_lanes // workload.machine.lanes, 1)
    panels = window.in_blocks // panel
    elements = workload.machine.lanes if _by_element(workload) else 0
    total = 0.0
    for row in runs[0]:
        for column in runs[1]:
            for out in runs[2]:
                accumulators = row.size * column.size * out.size * vectors
                weights = panel * out.size * window.taps // window.in_blocks * window.out_lanes * 4
                if order == "data":
                    weights *= sum(run.count for run in runs[2])
                streaming = out.size * vectors * VECTOR_BYTES / L2_BYTES_PER_CYCLE if weights > L1_BYTES else 0.0
                cycles = 0.0
                for a in row.taps:
                    for b in column.taps:
                        positions = len(a.outputs) * len(b.outputs)
                        arithmetic = positions * out.size * vectors / FMA_PER_CYCLE
                        scalars = positions if out.size * vectors > 1 else positions * 1.5
                        loads = (scalars + out.size * vectors) / LOADS_PER_CYCLE
                        if weights > L1_BYTES:
                            arithmetic *= L2_MISS if weights > FAR_BYTES else L1_MISS
                        step = max(arithmetic, loads, streaming, FMA_LATENCY) + STEP_CYCLES
                        if elements:
                            miss = arithmetic * FMA_PER_CYCLE / (positions * out.size * vectors)
                            contiguous = window.columns.stride == window.rows.stride == 1
                            width = out.size * vectors
                            step = miss * by_element.instructions(elements, positions, width, contiguous) / elements
                            if window.in_lanes == 1:
                                reach = (len(b.outputs) - 1) * window.columns.stride + b.count
                                step = miss * by_element.plane_instructions(elements, positions, width, reach, b.count)
                        cycles += a.count * b.count * step * window.in_blocks * window.in_lanes
                cycles += 2 * accumulators * (panels + 1) + 20 * panels
                total += cycles * row.count * column.count * out.count
    total *= window.groups
    image = window.in_blocks * window.rows.length * window.columns.length * window.in_lanes * 4
    if order == "weights":
        speed = MEMORY_BYTES_PER_CYCLE if image > L2_BYTES else 4 * L2_BYTES_PER_CYCLE
        total += (sum(run.count for run in runs[2]) - 1) * window.groups * image / speed
    else:
        total += window.groups * window.out_blocks * window.taps * window.out_lanes * 4 / MEMORY_BYTES_PER_CYCLE
    return total


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `conv2d`."""
    parallel = work(workload.blocks["conv2d"]) >= PARALLEL_WORK and workload.machine.threads != 1
    tile = (decision["rows"], decision["columns"], decision["outs"])
    panel, order = decision["panel"], decision["order"]
    if _by_element(workload):
        return ByElementLoops(workload).kernel(*tile, panel=panel, order=order, parallel=parallel)
    ahead = workload.machine.allows("prefetch")
    loops = ConvolutionLoops(workload)
    return Kernel(loops.write(*tile, panel=panel, order=order, parallel=parallel, ahead=ahead))


def _by_element(workload: Workload) -> bool:
    """Whether numbers are multiplied as elements of vectors."""
    block = workload.anchor("conv2d")
    return block is not None and applies(Window.of(block), workload.machine) and reads_constants(workload, block)
