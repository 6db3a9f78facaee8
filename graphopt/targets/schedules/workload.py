"""What a template is given: a fused PrimFunc and the machine it is for; and steps that templates share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from graphopt.targets.relax import half

Decision = dict[str, Any]
"""Small and serialisable: numbers and words."""


@dataclass(frozen=True)
class Machine:
    """The part of a target that schedules depend on."""

    lanes: int
    """Lanes of a vector register: of float32, but for functions that compute in float16."""
    registers: int
    """Vector registers."""
    threads: int
    features: frozenset[str] = frozenset()
    """Extensions that code may use, in /proc/cpuinfo's spelling: amx_bf16, avx512_bf16, avx512f, avx2, fma, ..."""
    without: frozenset[str] = frozenset()
    """Templates and ideas that are switched off, by name: `winograd`, `prefetch`, ..."""

    def allows(self, idea: str) -> bool:
        """Whether an idea is switched on."""
        return idea not in self.without


Repack = Callable[[np.ndarray], np.ndarray]
"""From a constant argument as the importer packed it to the form a kernel reads; done once, when a model is built."""


@dataclass(frozen=True)
class Kernel:
    """A scheduled function, and the constant arguments it wants in another form than the workload's."""

    func: Any
    repack: Mapping[int, Repack] = field(default_factory=dict)
    """By parameter index. The function's parameter has the repacked shape."""


@dataclass(frozen=True, eq=False)
class Workload:
    """One fused function to schedule."""

    func: Any
    machine: Machine
    """Its lanes are those of the numbers that the function computes with."""

    def __post_init__(self):
        if self.number == "float16":
            object.__setattr__(self, "machine", replace(self.machine, lanes=half.LANES))

    @property
    def number(self) -> str:
        """What the function's products and sums are in registers: float32, or float16 (see `half`)."""
        attributes = getattr(self.func, "attrs", None)
        return "float16" if attributes is not None and half.COMPUTED in attributes else "float32"

    @cached_property
    def blocks(self) -> dict[str, Any]:
        """The computation blocks under the root, in order, by name."""
        found: dict[str, Any] = {}
        for realize in _realizes(self.func.body):
            found[str(realize.block.name_hint)] = realize.block
        return found

    def anchor(self, *names: str) -> Any | None:
        """The first block that has one of these names."""
        return next((block for name, block in self.blocks.items() if name in names), None)


def _realizes(body) -> list[Any]:
    import tvm_ffi
    from tvm import s_tir

    found: list[Any] = []

    def visit(node):
        if node.block.name_hint == "root":
            return tvm_ffi.WalkResult.ADVANCE
        found.append(node)
        return tvm_ffi.WalkResult.SKIP  # expressions are walked as trees, which shared ones make very large

    tvm_ffi.structural_walk(body, (s_tir.SBlockRealize, visit), order="pre")
    return found


def nodes(tree, kind) -> list[Any]:
    """All nodes of one class in a TIR statement or expression."""
    import tvm_ffi

    found: list[Any] = []
    tvm_ffi.structural_walk(tree, (kind, found.append))
    return found


def annotation(block, key: str) -> int:
    """A number the tensor expression attached to its block."""
    return int(block.annotations[key])


def extents(block) -> list[int]:
    """Extents of a block's iteration variables; a dynamic one is -1."""
    from tvm import tirx

    return [int(v.dom.extent) if isinstance(v.dom.extent, tirx.IntImm) else -1 for v in block.iter_vars]


def new_schedule(func) -> Any:
    """A schedule of `func`; untyped, because TVM annotates `*loops: list[LoopRV]` where it takes loops."""
    from tvm.s_tir import Schedule

    return Schedule(func)


def divisors(number: int, most: int) -> list[int]:
    """Divisors of `number` up to `most`, ascending."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def loop_extents(schedule, loops) -> list[int]:
    return [int(schedule.get(loop).extent) for loop in loops]


def inline_epilogue(schedule, anchor: str):
    """Inline all blocks after the anchor into the last one; returns the block that stores the result.

    Where nothing follows, a copy of the tile from registers to memory is made, so that templates have one form.
    """
    root = schedule.get_sblock("root")
    names = [str(schedule.get(block).name_hint) for block in schedule.get_child_blocks(root)]
    after = names[names.index(anchor) + 1 :]
    if not after:
        return schedule.cache_write(schedule.get_sblock(anchor), 0, "local")
    for name in after[:-1]:
        schedule.compute_inline(schedule.get_sblock(name))
    return schedule.get_sblock(after[-1])


def schedule_padding(schedule, workload: Workload, parallel: bool) -> None:
    """Padding as a stage of its own: one parallel pass, a vector at a time."""
    if "pad" not in workload.blocks:
        return
    loops = schedule.get_loops(schedule.get_sblock("pad"))
    if loop_extents(schedule, loops)[-1] > 1:
        schedule.vectorize(loops[-1])
        loops = loops[:-1]
    whole = schedule.fuse(*loops[:-1])
    if parallel:
        schedule.parallel(whole)


def work(block) -> int:
    """Iterations of a block: the measure of whether starting threads pays."""
    return math.prod(abs(e) for e in extents(block))


PARALLEL_WORK = 1 << 18
"""Multiply-accumulates in registers (of a convolution, say) below which one thread is faster than two: 3 to 8 us.

Starting a second thread takes 1.5 us while it spins and 3 us once it sleeps; the halves are never quite equal.
"""
PARALLEL_ELEMENTS = 1 << 15
"""The same where every iteration brings its own memory: elementwise chains, one row times a weight."""


def unique(decisions: Iterable[Decision]) -> list[Decision]:
    found: list[Decision] = []
    for decision in decisions:
        if decision not in found:
            found.append(decision)
    return found
