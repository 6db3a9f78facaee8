"""Concatenation of blocked images whose channels end within a block: pieces of vectors move.

Idea: a step that divides the block and every part's channels never straddles anything, so each piece of so many lanes
comes from one place that is known when the code is written. 208 + 48 channels in blocks of 32 move in halves.

Loop order: n / block, piece unrolled / position / lanes of a piece in one vector.

Register budget: one vector.

Source: none; it is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graphopt.targets.relax.bfloat16 import DTYPE, widen
from graphopt.targets.relax.computes import PARTS
from graphopt.targets.schedules import amx
from graphopt.targets.schedules.workload import Decision, Kernel, Workload

NAME = "concat_lanes"
VERSION = 1


def step_of(channels: Sequence[int], block: int) -> int:
    """The lanes that move together."""
    return math.gcd(block, *channels)


def match(workload: Workload) -> list[Decision] | None:
    """One decision."""
    block = workload.anchor("concat_lanes")
    return None if block is None or len(workload.blocks) > 1 else [{}]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew: (N, C_i / b_i, P, b_i), ... -> (N, sum(C_i) / b, P, b).

    Lanes past the last channel repeat those before: filler has only to be finite.
    """
    from tvm.script.ir_builder import IRBuilder

    T = amx.ir()
    channels = [int(c) for c in workload.blocks["concat_lanes"].annotations[PARTS]]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        *parts, out = [
            T.arg(str(p.name), T.buffer([int(d) for d in p.ty.shape], str(p.ty.dtype))) for p in workload.func.params
        ]
        batch, blocks, positions, lanes = (int(d) for d in workload.func.params[-1].ty.shape)
        widths = [int(p.ty.shape[3]) for p in workload.func.params[:-1]]
        step = step_of(channels, lanes)
        sources = [(k, c) for k, count in enumerate(channels) for c in range(0, count, step)]
        with T.serial(0, batch) as n:
            for piece in range(blocks * lanes // step):
                block, lane = divmod(piece * step, lanes)
                with T.serial(0, positions) as p, T.vectorized(0, step) as v:
                    place = [n, block, p, lane + v]
                    part, channel = sources[min(piece, len(sources) - 1)]
                    width = widths[part]
                    element = parts[part][n, channel // width, p, channel % width + v]
                    T.buffer_store(out, _moved(element, str(workload.func.params[-1].ty.dtype)), place)
    return Kernel(builder.get())


def _moved(element, dtype: str):
    """The element, through integers where it is bfloat16: TVM refuses a bare move of a vector of these."""
    from tvm import tirx

    if dtype != DTYPE:
        return element
    bits = tirx.reinterpret("uint32", widen(element)) >> tirx.const(16, "uint32")
    return tirx.reinterpret(dtype, bits.astype("uint16"))
