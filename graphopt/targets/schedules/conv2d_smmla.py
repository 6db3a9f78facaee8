"""The nest of a convolution of bytes whose products are those of small matrices (SMMLA, of ARMv8.6).

Idea: one instruction multiplies two positions by two outputs over eight channels, 32 products, twice as many as a dot
product. The bytes of two positions are joined in a register, the weights of two outputs lie side by side, eight
channels each; the result has two outputs of two positions, and neighbouring results are put in order once, when a tile
is complete. What the sums start from is added then, so that it takes no registers meanwhile.

Register budget: positions * (outs + 1) + 2 <= 32, as for a dot product: sums of two positions and two outputs, the
bytes of two positions for each eight channels.

Source: Arm Architecture Reference Manual for A-profile, C7.2 (SMMLA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.targets.schedules import dot
from graphopt.targets.schedules.conv2d_int8_loops import IntegerLoops
from graphopt.targets.schedules.conv2d_loops import Step, Window
from graphopt.targets.schedules.loops import ramp, sequence
from graphopt.targets.schedules.register_tiles import Run
from graphopt.targets.schedules.workload import Machine, Repack

DEPTH = 8
"""Channels that an instruction takes."""
_LANES = 4
"""Results of one instruction: two positions x two outputs."""


def applies(machine: Machine, window: Window) -> bool:
    """Whether the machine has the instruction, and there are pairs of positions and whole eights of channels."""
    several = window.rows.extent * window.columns.extent > 1
    return "i8mm" in machine.features and window.in_lanes * dot.QUAD % DEPTH == 0 and several


def most_positions(vectors: int) -> int:
    """Positions of a tile that fit beside some vectors of outputs: an even number, but for one."""
    most = 30 // (vectors + 1)
    return most - most % 2 if most > 1 else most


def as_pairs_of_outputs(weight: np.ndarray) -> np.ndarray:
    """(..., C / 4, 4 * n) int8 quads -> (..., C / 8, 8 * n): for each two outputs, eight channels of each."""
    *lead, quads, wide = weight.shape
    split = weight.reshape(*lead, quads // 2, 2, wide // (2 * dot.QUAD), 2, dot.QUAD)  # eight, half, pair, output, four
    order = np.moveaxis(split, -4, -2)  # eight, pair, output, half, four
    return np.ascontiguousarray(order).reshape(*lead, quads // 2, 2 * wide)


class MatrixLoops(IntegerLoops):
    """Writes them."""

    def rewritten_weight(self) -> tuple[Any, Repack] | None:
        from tvm import tirx

        *lead, quads, wide = (int(d) for d in self.weight.shape)
        return tirx.decl_buffer((*lead, quads // 2, 2 * wide), "int8", "weight"), as_pairs_of_outputs

    def _summed(
        self, place, rows: Run, columns: Run, outs: int, plan, sums, cell: Callable[..., Any], begin: Any
    ) -> Any:
        from tvm import tirx

        positions = [(row, column) for row in range(rows.size) for column in range(columns.size)]
        self._pairs = [positions[i : i + 2] for i in range(0, len(positions), 2)]
        results = len(self._pairs) * outs * self._halves
        parts = tirx.decl_buffer((results * _LANES,), "int32", "parts", scope="local")
        four: Any = _LANES
        nought = tirx.Broadcast(tirx.const(0, "int32"), four)
        zeros = [tirx.BufferStore(parts, nought, [ramp(i * _LANES, _LANES)]) for i in range(results)]
        steps = self._accumulation(place, rows, columns, outs, plan, parts, cell)
        ordered = sequence(self._ordered(parts, sums, outs, cell))
        return sequence([tirx.AllocBuffer(parts), *zeros, steps, begin, ordered])

    @property
    def _halves(self) -> int:
        """Pairs of outputs of a block."""
        return self.vectors * self.lanes // 2

    def _part(self, pair: int, out: int, half: int, outs: int) -> Any:
        return ramp(((pair * outs + out) * self._halves + half) * _LANES, _LANES)

    def _ordered(self, parts: Any, sums: Any, outs: int, cell: Callable[..., Any]) -> list[Any]:
        """Add the results of two outputs and two positions to the sums of four outputs of each position."""
        from tvm import tirx

        statements = []
        for number, pair in enumerate(self._pairs):
            for out in range(outs):
                for vector in range(self.vectors):
                    both = [parts[self._part(number, out, 2 * vector + half, outs)] for half in range(2)]
                    for which, (row, column) in enumerate(pair):
                        lanes = [tirx.const(2 * which + i, "int32") for i in (0, 1, 4, 5)]
                        place = ramp(cell(out, row, column, vector, 0), self.lanes)
                        statements.append(tirx.BufferStore(sums, sums[place] + tirx.Shuffle(both, lanes), [place]))
        return statements

    def _products(self, step: Step, sums, cell: Callable[..., Any]) -> Any:
        """`at_once` quads of each pair of positions times those of all outputs of the tile; `sums`: the parts."""
        from tvm import tirx

        statements: list[Any] = []
        inside = {(row, column) for row in step.rows.outputs for column in step.columns.outputs}
        joined = {
            number: self._joined(step, [at if at in inside else None for at in pair], statements)
            for number, pair in enumerate(self._pairs)
            if not inside.isdisjoint(pair)
        }
        eights = self.at_once * dot.QUAD // DEPTH
        for eight in range(eights):
            for out in range(step.outs):
                for half in range(self._halves):
                    *at, lane = self._weighed(step, out, half)
                    at[-1] = step.lane * eights + eight
                    weight = tirx.BufferLoad(self.weight, [*at, ramp(lane * 2 * DEPTH, 2 * DEPTH)])
                    for number, data in joined.items():
                        place = self._part(number, out, half, step.outs)
                        name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
                        total = tirx.call_llvm_pure_intrin("int32x4", name, sums[place], data[eight], weight)
                        statements.append(tirx.BufferStore(sums, total, [place]))
        return sequence(statements)

    def _joined(self, step: Step, pair: list[tuple[int, int] | None], statements: list[Any]) -> list[Any]:
        """For each eight channels of a step: the bytes of both positions, zeros for one that is outside or absent."""
        from tvm import tirx

        count: Any = self.at_once * dot.QUAD
        both = []
        for at in [*pair, None][:2]:
            if at is None:
                both.append(tirx.Broadcast(tirx.const(0, "int8"), count))
                continue
            *place, _ = self._read(step, *at)
            load: Any = dot.quads_at(self.data, tuple(place), step.lane * self.at_once, self.at_once)
            held = tirx.Var("held", str(load.ty.dtype))
            statements.append(tirx.Bind(held, load))
            both.append(held)
        found = []
        for first in range(0, count, DEPTH):
            lanes = [*range(first, first + DEPTH), *range(count + first, count + first + DEPTH)]
            value = tirx.Shuffle(both, [tirx.const(i, "int32") for i in lanes])
            held = tirx.Var("eights", f"int8x{2 * DEPTH}")
            statements.append(tirx.Bind(held, value))
            found.append(held)
        return found
