"""Multiplication by one element of a vector register, which ARM has: FMLA (by element).

Idea: elsewhere a number is spread over the lanes of a register before it is multiplied with a vector: a load for each
number. Here four neighbouring numbers are loaded as one vector, and each multiplication says which of them it
means: a quarter of the loads, neighbouring vectors in pairs (LDP), and a register for four numbers instead of one for
each.

Register budget of a tile of `positions` x `outs` sums: these, the vectors of numbers (one a position), and two weights.

Source: Arm Architecture Reference Manual for A-profile, FMLA (by element); Arm, Cortex-A72 Software Optimization Guide,
section 4.8 (loads in pairs).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.schedules.workload import Machine

LANES = 4
"""float32 elements of a NEON register."""
REGISTERS = 32
STEP_INSTRUCTIONS = 4
"""Two addresses, a comparison, a branch."""
SPARE = 2
"""Registers for weights, beside sums and numbers."""


def has(machine: Machine) -> bool:
    """Whether the machine multiplies by an element."""
    return "asimd" in machine.features and (machine.lanes, machine.registers) == (LANES, REGISTERS)


def most_positions(outs: int) -> int:
    """The largest tile of `outs` vectors whose sums, numbers and weights fit the registers; 0 where there is none."""
    return (REGISTERS - SPARE) // (outs + 1)


def instructions(positions: int, outs: int, contiguous: bool) -> float:
    """Of one step: LANES numbers of each position, times `outs` vectors of weights for each number. `contiguous`: the
    positions lie side by side."""
    pairs = (positions + 1) // 2 if contiguous else positions
    crowded = positions * (outs + 1) + SPARE == REGISTERS  # the weights then come one by one
    return LANES * positions * outs + LANES * outs * (1 if crowded else 0.5) + pairs + STEP_INSTRUCTIONS


def most_positions_in_planes(outs: int, stride: int, kernel: int) -> int:
    """The same where neighbouring positions, `stride` apart, read numbers of one row."""

    def needed(positions: int) -> int:
        return positions * outs + -(-((positions - 1) * stride + kernel) // LANES) + SPARE

    return max((p for p in range(1, REGISTERS) if needed(p) <= REGISTERS), default=0)


def plane_instructions(positions: int, outs: int, reach: int, taps: int) -> float:
    """Of one tap of `taps` that share `reach` numbers of a row."""
    return positions * outs + 0.5 * outs + (-(-reach // LANES) + STEP_INSTRUCTIONS) / taps


def spread(vector: Any, element: int) -> Any:
    """An expression: one element of a vector of LANES in all lanes; LLVM makes it an operand of the multiplication."""
    from tvm import tirx

    index = tirx.const(element, "int32")
    return tirx.Shuffle([vector], [index] * LANES)
