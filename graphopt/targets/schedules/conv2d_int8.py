"""Direct convolution of bytes with a dot-product instruction, 32-bit sums in registers.

Idea: the loop nest of `conv2d_blocked`, a step of which multiplies a quad of input channels: four bytes of a pixel,
broadcast, with the quads of a vector of outputs. A quad is as large as a float32, so tiles, panels and predictions are
those of a convolution with a quarter of the channels. The epilogue rescales, activates, adds and rounds the sums while
they are still in registers.

Loop order: that of `conv2d_blocked`; the in-lane counts quads.

On ARM, a step takes up to four quads, which are lanes of one register, or is a product of small matrices
(`conv2d_smmla`).

Register budget: rows * columns * outs sums + outs weights + 1 broadcast quad <= registers; `pairs` and `words` need two
more for constants and intermediate products.

Source: Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures, SC 2018,
section II-K (int16 kernels); Intel, Lower Numerical Precision Deep Learning Inference and Training, 2018 (VNNI).
"""

from __future__ import annotations

from graphopt.targets.schedules import conv2d_smmla, dot
from graphopt.targets.schedules.conv2d_blocked import before, decisions, predicted_cycles
from graphopt.targets.schedules.conv2d_int8_loops import ANCHOR, IntegerLoops
from graphopt.targets.schedules.conv2d_loops import Window
from graphopt.targets.schedules.workload import PARALLEL_WORK, Decision, Kernel, Workload, work

NAME = "conv2d_int8"
VERSION = 1

__all__ = ["ANCHOR", "NAME", "VERSION", "apply", "match", "predicted_cycles"]


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {rows, columns, outs, panel, order}, by predicted cycles."""
    block = workload.anchor(ANCHOR)
    way = None if block is None else dot.way(workload.machine, block)
    if way is None or not set(before(workload, ANCHOR)) <= {"pad"}:
        return None
    window = Window.of(block)
    if conv2d_smmla.applies(workload.machine, window):
        return decisions(window, workload, conv2d_smmla.most_positions)
    return decisions(window, workload, dot.most_positions(way))


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose anchor block is `conv2d_int8`; some ways want the weight in a form of their own."""
    block = workload.blocks[ANCHOR]
    matrices = conv2d_smmla.applies(workload.machine, Window.of(block))
    loops = conv2d_smmla.MatrixLoops(workload) if matrices else IntegerLoops(workload)
    return loops.kernel(
        decision["rows"],
        decision["columns"],
        decision["outs"],
        panel=decision["panel"],
        order=decision["order"],
        parallel=work(block) >= dot.QUAD * PARALLEL_WORK and workload.machine.threads != 1,
        ahead=workload.machine.allows("prefetch"),
    )
