"""Softmax and layer normalization, one row at a time.

Idea: a row is copied to a buffer that stays in the first-level cache, while its maximum or sum is taken; two more
passes over the buffer finish it. Each element is read from memory once and written once. Past the row's end the buffer
holds what changes nothing (the lowest number, the mean), so every pass runs on whole vectors.

Loop order: row (parallel) / pass / vectors, four at a time in separate accumulators.

Register budget: 4 accumulators, and what one vector of `exp` takes.

Source: Milakov, Gimelshein: Online Normalizer Calculation for Softmax, arXiv:1805.02867, 2018, section 2 (the safe
three-pass form); Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450, 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.targets.schedules.gemm import from_buffer, split_rows, substitute
from graphopt.targets.schedules.workload import PARALLEL_ELEMENTS, Decision, Kernel, Workload, extents

NAME = "rowwise"
VERSION = 1
UNROLL = 4
LOWEST = float(np.finfo(np.float32).min)
SOFTMAX, LAYER_NORM = ("row_max", "row_exp", "softmax"), ("row_sum", "row_squares", "layer_norm")
DATA, BYTES = "row_data", "row_bytes"
"""Blocks before and behind a layer normalization: what it reads, where that is computed; what it makes, quantized."""


def match(workload: Workload) -> list[Decision] | None:
    """One decision, for functions that are a softmax or a layer normalization and nothing else but its DATA, BYTES."""
    names = _passes(workload)
    if names not in (SOFTMAX, LAYER_NORM) or -1 in extents(workload.blocks[names[-1]]):
        return None
    return [{}]


def _passes(workload: Workload) -> tuple[str, ...]:
    """The blocks without those of a layer normalization that join its first and last pass."""
    names = tuple(workload.blocks)
    if "layer_norm" not in names:
        return names
    return names[names[0] == DATA : len(names) - (names[-1] == BYTES)]


def apply(workload: Workload, decision: Decision) -> Kernel:
    """Schedule a function whose last block is `softmax` or `layer_norm`."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    names = _passes(workload)
    *lead, columns = extents(workload.blocks[names[-1]])
    lanes = workload.machine.lanes
    parallel = math.prod(lead) * columns >= PARALLEL_ELEMENTS and workload.machine.threads != 1
    row = _Row(workload, names, lead, columns, lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        with T.parallel(0, row.rows) if parallel else T.serial(0, row.rows) as i:
            row.buffer = T.sblock_alloc_buffer((row.padded,), "float32", scope="global")
            row.softmax(i) if names[-1] == "softmax" else row.layer_norm(i)
    made: Any = builder.get()
    return Kernel(tirx.PrimFunc(workload.func.params, made.body, workload.func.ret_type, workload.func.attrs))


class _Row:
    """Emits the passes over one row: the blocks' own expressions, reading the buffer in place of the operand."""

    def __init__(self, workload: Workload, names, lead, columns: int, lanes: int):
        self.first, self.second, self.last = (workload.blocks[name] for name in names)
        self.lead, self.columns, self.lanes = lead, columns, lanes
        self.rows = math.prod(lead)
        self.vectors = -(-columns // lanes)
        self.padded = self.vectors * lanes
        self.operand = self.first.body.value.b
        self.data, self.bytes = workload.blocks.get(DATA), workload.blocks.get(BYTES)
        self.buffer: Any = None

    def softmax(self, row) -> None:
        self._load(row, LOWEST)
        top = self._reduced(LOWEST, lambda place: self.buffer[place], "max")
        known = [(self.first.body.buffer, top)]
        total = self._reduced(0.0, lambda place: self._read(self.second, place, known), "sum", keep=True)
        share = self._named(np.float32(1) / total)
        self._store(row, lambda place: self.buffer[place] * share)

    def layer_norm(self, row) -> None:
        from tvm import tirx

        self._load(row, 0.0)
        total = self._reduced(0.0, lambda place: self.buffer[place], "sum")
        mean = total * tirx.const(float(np.float32(1 / self.columns)), "float32")
        self._fill(mean)
        known = [(self.first.body.buffer, total)]
        squares = self._reduced(0.0, lambda place: self._read(self.second, place, known), "sum")
        known.append((self.second.body.buffer, squares))
        self._store(row, lambda place: self._read(self.last, place, known))

    def _read(self, block, column, known):
        """What `block` computes at a column, from the buffer and the reductions known so far."""
        value = block.body.value.b if block is not self.last else block.body.value
        value = from_buffer(value, self.operand.source, lambda: self.buffer[column])
        for buffer, reduced in known:
            value = from_buffer(value, buffer, lambda reduced=reduced: reduced)
        return substitute(value, {block.iter_vars[-1].var: column})

    def _named(self, value):
        """The value, computed once."""
        from tvm.script.ir_builder import tirx as T

        held: Any = T.alloc_buffer((1,), "float32", scope="local")
        T.buffer_store(held, value, [0])
        return held[0]

    def _load(self, row, filler: float) -> None:
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        axes = [v.var for v in self.first.iter_vars]

        if self.data is not None:
            axes = [v.var for v in self.data.iter_vars]
        operand = self.operand if self.data is None else self.data.body.value

        def element(column):
            return substitute(operand, dict(zip(axes, [*split_rows(row, self.lead), column], strict=True)))

        full, rest = divmod(self.columns, self.lanes)
        if full:
            with T.serial(0, full) as v, T.vectorized(0, self.lanes) as lane:
                T.buffer_store(self.buffer, element(v * self.lanes + lane), [v * self.lanes + lane])
        if rest:
            with T.serial(0, rest) as lane:
                T.buffer_store(self.buffer, element(full * self.lanes + lane), [full * self.lanes + lane])
            self._fill(tirx.const(filler, "float32"))

    def _fill(self, value) -> None:
        """The buffer past the row's end."""
        from tvm.script.ir_builder import tirx as T

        if self.padded > self.columns:
            with T.serial(0, self.padded - self.columns) as lane:
                T.buffer_store(self.buffer, value, [self.columns + lane])

    def _reduced(self, start: float, function: Callable, kind: str, keep: bool = False):
        """Sum or maximum of `function(column)` over the padded row; `keep` also stores its values in the buffer."""
        from tvm import tirx
        from tvm.script.ir_builder import tirx as T

        lanes = self.lanes
        ways = next(n for n in (UNROLL, 2, 1) if n <= self.vectors)
        sums: Any = T.alloc_buffer((ways * lanes,), "float32", scope="local")
        join: Callable = tirx.max if kind == "max" else lambda a, b: a + b
        for way in range(ways):
            T.buffer_store(sums, T.broadcast(tirx.const(start, "float32"), lanes), [T.ramp(way * lanes, 1, lanes)])

        def step(vector, way: int) -> None:
            with T.vectorized(0, lanes) as lane:
                value = function(vector * lanes + lane)
                if keep:
                    T.buffer_store(self.buffer, value, [vector * lanes + lane])
                    value = self.buffer[vector * lanes + lane]
                T.buffer_store(sums, join(sums[way * lanes + lane], value), [way * lanes + lane])

        with T.serial(0, self.vectors // ways) as turn:
            for way in range(ways):
                step(turn * ways + way, way)
        for way in range(self.vectors % ways):
            step(self.vectors // ways * ways + way, way)
        width = ways * lanes
        while width > 2:
            width //= 2
            here, there = T.ramp(0, 1, width), T.ramp(width, 1, width)
            T.buffer_store(sums, join(sums[here], sums[there]), [here])
        return self._named(join(sums[0], sums[1]))

    def _store(self, row, function: Callable) -> None:
        from tvm.script.ir_builder import tirx as T

        places = split_rows(row, self.lead)
        full, rest = divmod(self.columns, self.lanes)
        out = self.last.body.buffer

        def some(first, count: int) -> None:
            with T.vectorized(0, count) as lane:
                column = first + lane
                T.buffer_store(out, function(column), [*places, column])
                if self.bytes is not None:
                    axes = [v.var for v in self.bytes.iter_vars]
                    made = from_buffer(self.bytes.body.value, out, lambda: out[(*places, column)])
                    value = substitute(made, dict(zip(axes, [*places, column], strict=True)))
                    T.buffer_store(self.bytes.body.buffer, value, [*places, column])

        if full:
            with T.serial(0, full) as v:
                some(v * self.lanes, self.lanes)
        if rest:
            some(full * self.lanes, rest)
