"""Time a kernel as it runs within a model: its constants come from far memory, its inputs were just written.

Between two runs of one kernel a model reads all its other constants, so a kernel's own have left the caches, and a
timing that keeps them there prefers schedules that read them often. Here each call reads a fresh part of an arena as
large as the model's constants. Inputs are written anew before each call, from far memory, as the kernels before would
have done: they are as warm as their size allows. Outputs go to memory that was not touched of late.

Samples are single calls; the figure is a low quantile of them, because interference only ever adds time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILE = 0.25
WINDOW_S = 0.012
FEWEST_CALLS = 7
LONGEST_S = 0.25
ARENA_BYTES = (12 << 20, 192 << 20)
"""The least that is colder than a second-level cache, and the most that is worth its memory."""
ALIGNMENT = 64
MOST_SETS = 4096
OUTPUT_BYTES = 4 << 20
"""Outputs rotate through this much: memory that a model writes was last touched several kernels ago."""
MOST_OUTPUTS = 64
_FILL_BYTES = 1 << 20

Arguments = Iterator[list[Any]]
"""The argument lists of the next calls."""


@dataclass(frozen=True)
class Parameter:
    """Shape and element type of a kernel's parameter; whether the model stores a constant there."""

    shape: tuple[int, ...]
    dtype: str
    constant: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * element_bytes(self.dtype)


def parameters(func: Any, constants: Sequence[int] = ()) -> list[Parameter]:
    """The parameters of a PrimFunc of static shapes, `constants` by index."""
    held = set(constants)
    return [
        Parameter(tuple(int(d) for d in p.ty.shape), str(p.ty.dtype), index in held)
        for index, p in enumerate(func.params)
    ]


def element_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


class Bench:
    """Times kernels of one model, whose constants are `constant_bytes` in total."""

    def __init__(self, constant_bytes: int, seed: int = 0):
        self.arena_bytes = min(max(constant_bytes, ARENA_BYTES[0]), ARENA_BYTES[1])
        self._seed = seed
        self._arenas: dict[str, Any] = {}
        self._cursor = 0

    def arguments(self, params: Sequence[Parameter]) -> Arguments:
        """Argument lists to call in turns, without end.

        Each has one tensor for each variable, and a fresh part of the arena for each constant. Values are small
        positive numbers, so that no path meets denormals or NaN.
        """
        variables = {i: self._memory(p) for i, p in enumerate(params) if not p.constant}
        warm = {i: _tensor_at(memory, 0, params[i]) for i, memory in variables.items()}
        before_output = list(variables)[:-1]
        inputs = [(params[i].dtype, variables[i]) for i in reversed(before_output)]  # the first was written last
        sizes = [-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in params if p.constant]
        total = sum(sizes)
        count = min(max(self.arena_bytes // total, 1), MOST_SETS) if total else 1
        arenas = {p.dtype: self._arena(p.dtype, max(total, self.arena_bytes)) for p in params if p.constant}
        found = []
        for _ in range(count):
            if self._cursor + total > self.arena_bytes:
                self._cursor = 0
            at, row = self._cursor, []
            for index, p in enumerate(params):
                if p.constant:
                    row.append(_tensor_at(arenas[p.dtype], at, p))
                    at += -(-p.nbytes // ALIGNMENT) * ALIGNMENT
                else:
                    row.append(warm[index])
            found.append(row)
            self._cursor = at
        return self._turns(found, inputs, self._outputs(params))

    def _outputs(self, params: Sequence[Parameter]) -> list[Any]:
        """Tensors for the last parameter; empty where it is a constant."""
        last = params[-1]
        if last.constant:
            return []
        count = min(max(OUTPUT_BYTES // max(last.nbytes, 1), 1), MOST_OUTPUTS)
        return [_tensor_at(self._memory(last), 0, last) for _ in range(count)]

    def _turns(self, rows: list[list[Any]], inputs: list[tuple[str, np.ndarray]], outputs: list[Any]) -> Arguments:
        """The rows without end, with the outputs in turns; before each the inputs are written anew, as the kernels
        before would have done."""
        turns = itertools.cycle(outputs or [row[-1] for row in rows])
        sources = [(self._arena(dtype, memory.nbytes), memory) for dtype, memory in inputs]
        offset = 0
        for row in itertools.cycle(rows):
            for source, memory in sources:
                if offset + memory.nbytes > source.nbytes:
                    offset = 0
                memory[:] = source[offset : offset + memory.nbytes]
                offset += -(-memory.nbytes // ALIGNMENT) * ALIGNMENT
            yield [*row[:-1], next(turns)]

    def time_us(self, function: Any, arguments: Arguments) -> float:
        """Microseconds of one call."""
        function(*next(arguments))
        clock = time.perf_counter_ns
        samples: list[int] = []
        begin = clock()
        while True:
            row = next(arguments)
            start = clock()
            function(*row)
            end = clock()
            samples.append(end - start)
            spent = (end - begin) * 1e-9
            if (spent >= WINDOW_S and len(samples) >= FEWEST_CALLS) or spent >= LONGEST_S:
                break
        samples.sort()
        return samples[int(QUANTILE * (len(samples) - 1))] / 1e3

    def duel(self, one: tuple[Any, Arguments], other: tuple[Any, Arguments], rounds: int = 3):
        """Two kernels in turns: the median of each one's windows, in microseconds."""
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for (function, arguments), times in zip((one, other), found, strict=True):
                times.append(self.time_us(function, arguments))
        return float(np.median(found[0])), float(np.median(found[1]))

    def _memory(self, parameter: Parameter) -> np.ndarray:
        return _filled(parameter.nbytes, self._values(parameter.dtype))

    def _arena(self, dtype: str, nbytes: int) -> np.ndarray:
        known = self._arenas.get(dtype)
        if known is None or known.nbytes < nbytes:
            known = self._arenas[dtype] = _filled(max(nbytes, ARENA_BYTES[0]), self._values(dtype))
        return known

    def _values(self, dtype: str) -> np.ndarray:
        return _values(dtype, _FILL_BYTES // element_bytes(dtype), self._seed)


def _filled(nbytes: int, pattern: np.ndarray) -> np.ndarray:
    """Aligned bytes that repeat a pattern."""
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -room.ctypes.data % ALIGNMENT
    found = room[skip : skip + nbytes]
    found[:] = np.resize(pattern.view(np.uint8), nbytes)
    return found


def _tensor_at(memory: np.ndarray, offset: int, parameter: Parameter) -> Any:
    """A tensor over a part of `memory`, which it keeps alive."""
    import tvm

    part = memory[offset : offset + parameter.nbytes].view(_stored(parameter.dtype)).reshape(parameter.shape)
    tensor: Any = tvm.runtime.from_dlpack(part)
    return tensor if str(tensor.dtype) == parameter.dtype else tensor._create_view(parameter.shape, parameter.dtype)


def _stored(dtype: str) -> np.dtype:
    """numpy's type of the same width, for those it lacks or does not exchange."""
    return np.dtype({"bfloat16": "uint16", "bool": "uint8"}.get(dtype, dtype))


def _values(dtype: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype in ("bfloat16", "uint16", "uint32"):  # bits: the upper halves of float32, one or a pair to an element
        halves = (rng.uniform(0.1, 1.0, 2 * count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return halves.view(np.uint32)[:count] if dtype == "uint32" else halves[:count]
    if np.dtype(dtype).kind == "f":
        return rng.uniform(0.1, 1.0, count).astype(dtype)
    return rng.integers(0, 2, count).astype(dtype)
