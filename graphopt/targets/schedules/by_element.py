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

from graphopt.targets.relax import half
from graphopt.targets.schedules.workload import Machine

LANES = 4
"""float32 elements of a NEON register; of float16 it has `half.LANES`."""
REGISTERS = 32
STEP_INSTRUCTIONS = 4
"""Two addresses, a comparison, a branch."""
NUMBERS = 15
"""Most vectors of numbers, where these are float16: they must be in the lower half of the registers."""
SPARE = 2
"""Registers for weights, beside sums and numbers."""


def has(machine: Machine) -> bool:
    """Whether the machine multiplies by an element."""
    known = machine.lanes in (LANES, half.LANES) and machine.registers == REGISTERS
    return "asimd" in machine.features and known


def most_positions(outs: int, lanes: int = LANES) -> int:
    """The largest tile of `outs` vectors whose sums, numbers and weights fit the registers; 0 where there is none."""
    most = (REGISTERS - SPARE) // (outs + 1)
    return min(most, NUMBERS) if lanes == half.LANES else most


def instructions(lanes: int, positions: int, outs: int, contiguous: bool) -> float:
    """Of one step: `lanes` numbers of each position, times `outs` vectors of weights for each number. `contiguous`: the
    positions lie side by side."""
    pairs = (positions + 1) // 2 if contiguous else positions
    crowded = positions * (outs + 1) + SPARE == REGISTERS  # the weights then come one by one
    return lanes * positions * outs + lanes * outs * (1 if crowded else 0.5) + pairs + STEP_INSTRUCTIONS


def most_positions_in_planes(outs: int, stride: int, kernel: int, lanes: int = LANES) -> int:
    """The same where neighbouring positions, `stride` apart, read numbers of one row."""

    def needed(positions: int) -> int:
        return positions * outs + -(-((positions - 1) * stride + kernel) // lanes) + SPARE

    return max((p for p in range(1, REGISTERS) if needed(p) <= REGISTERS), default=0)


def plane_instructions(lanes: int, positions: int, outs: int, reach: int, taps: int) -> float:
    """Of one tap of `taps` that share `reach` numbers of a row."""
    return positions * outs + 0.5 * outs + (-(-reach // lanes) + STEP_INSTRUCTIONS) / taps


def spread(vector: Any, element: int, lanes: int) -> Any:
    """An expression: one element of a vector in all lanes; LLVM makes it an operand of the multiplication."""
    from tvm import tirx

    index = tirx.const(element, "int32")
    return tirx.Shuffle([vector], [index] * lanes)
