"""One row times a constant weight: several streams of the weight at the speed of memory.

Idea: each weight is used once, so time is the weight's bytes over the bandwidth. One stream of reads does not fill it:
the hardware's prefetcher works on a page at a time, and starts anew with each. So the weight is repacked into `streams`
parts of a group of columns that are read side by side, and lines are requested `ahead` bytes before their use in each.
bfloat16 weights lie in pairs of neighbouring inputs: a line is 16 columns x 2 inputs, and a shift and a mask make two
float32 vectors of it.

Loop order: group of columns (parallel) / input or pair of inputs / streams x vectors unrolled, lane.

Register budget: streams * vectors accumulators of 16 columns + 2 of the weight + 2 broadcast inputs <= registers.

Source: McCalpin, Memory Bandwidth and System Balance in HPC Systems, 2016 (concurrency = latency x bandwidth); Mowry,
Lam, Gupta: Design and Evaluation of a Compiler Algorithm for Prefetching, ASPLOS 1992.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax import half
from graphopt.targets.relax.bfloat16 import DTYPE, widen
from graphopt.targets.schedules import amx, prefetch
from graphopt.targets.schedules.epilogue import Epilogue, epilogue_of
from graphopt.targets.schedules.workload import PARALLEL_ELEMENTS, Decision, Kernel, Workload

NAME = "matmul_row"
VERSION = 1
COLUMNS = 16
"""Of a vector: a cache line of float32, or of pairs of bfloat16."""
SHAPES = ((4, 1, 4096), (2, 2, 8192), (8, 1, 4096), (4, 2, 4096), (2, 1, 8192), (1, 1, 8192))
"""(streams, vectors, ahead), best first. From far memory 17 GB/s against 15 with one stream, from the third-level cache
25 against 20."""
MOST_DECISIONS = 4


@dataclass(frozen=True)
class Row:
    """(1, depth) x (depth, columns)."""

    depth: int
    columns: int
    data_index: int
    weight_index: int
    rank: int
    dtype: str

    @property
    def pack(self) -> int:
        """Inputs of one element of the repacked weight."""
        return 2 if self.dtype == DTYPE else 1

    @property
    def steps(self) -> int:
        return -(-self.depth // self.pack)


def row_of(workload: Workload) -> Row | None:
    """The product, where data is one row and both operands are of one type; else None."""
    block = workload.anchor("packed_matmul")
    if block is None or next(iter(workload.blocks)) != "packed_matmul" or "packed_crop" in workload.blocks:
        return None
    params = list(workload.func.params)
    places = [next((i for i, p in enumerate(params) if p.same_as(r.source)), -1) for r in block.reads]
    if len(places) != 2 or min(places) < 0:
        return None
    data, weight = places
    shape, packed = ([int(d) for d in params[i].ty.shape] for i in places)
    dtype = str(params[weight].ty.dtype)
    if dtype not in (workload.number, DTYPE) or str(params[data].ty.dtype) != dtype:
        return None
    if len(packed) != 3 or packed[1] != shape[-1] or math.prod(shape[:-1]) != 1 or shape[-1] < 1:
        return None
    return Row(shape[-1], packed[0] * packed[2], data, weight, len(shape), dtype)


def match(workload: Workload) -> list[Decision] | None:
    """Decisions {streams, vectors, ahead}: parts read side by side, lines of each, bytes between request and use."""
    row = row_of(workload)
    if row is None or epilogue_of(workload, "packed_matmul") is None:
        return None
    machine = workload.machine
    found: list[Decision] = []
    for streams, vectors, ahead in SHAPES:
        registers = streams * vectors * -(-COLUMNS // machine.lanes)
        if streams * vectors * COLUMNS > row.columns or registers + 4 > machine.registers:
            continue
        decision = {"streams": streams, "vectors": vectors, "ahead": ahead if machine.allows("prefetch") else 0}
        if decision not in found:
            found.append(decision)
    return found[:MOST_DECISIONS] or None


def takes(workload: Workload) -> bool:
    """Whether this template is on and applies: templates for many rows then leave the kernel to it."""
    return workload.machine.allows(NAME) and match(workload) is not None


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew, loops and all; its weight is repacked into streams."""
    row, epilogue = row_of(workload), epilogue_of(workload, "packed_matmul")
    assert row is not None and epilogue is not None
    writer = _Writer(workload, row, epilogue, decision)
    streams, vectors = decision["streams"], decision["vectors"]
    return Kernel(writer.function(), {row.weight_index: lambda weight: pack_weight(weight, streams, vectors)})


def pack_weight(weight: np.ndarray, streams: int, vectors: int) -> np.ndarray:
    """(N / nb, K, nb) -> (groups, streams, K, vectors, 16), or of bfloat16 (.., ceil(K / 2), ..) uint32.

    The last group's columns end at N, so that it repeats some of the group's before. Of a pair of inputs the first is
    the lower half.
    """
    tiles, depth, lanes = weight.shape
    columns, width = tiles * lanes, streams * vectors * COLUMNS
    matrix = weight.transpose(1, 0, 2).reshape(depth, columns)
    starts = [min(at, columns - width) for at in range(0, columns, width)]
    chosen = np.concatenate([np.arange(start, start + width) for start in starts])
    if weight.dtype.itemsize == 2 and weight.dtype != np.float16:
        bits = matrix.view(np.uint16)[:, chosen]
        bits = np.concatenate([bits, np.zeros((depth % 2, len(chosen)), np.uint16)])
        pairs = np.ascontiguousarray(bits.reshape(-1, 2, len(chosen)).transpose(0, 2, 1))
        chosen_rows = pairs.view(np.uint32)[:, :, 0]
    else:
        chosen_rows = matrix[:, chosen]
    split = chosen_rows.reshape(len(chosen_rows), len(starts), streams, vectors, COLUMNS)
    return np.ascontiguousarray(split.transpose(1, 2, 0, 3, 4))


class _Writer:
    """Writes the loops of one kernel."""

    def __init__(self, workload: Workload, row: Row, epilogue: Epilogue, decision: Decision):
        self.workload, self.row, self.epilogue = workload, row, epilogue
        self.streams, self.vectors = decision["streams"], decision["vectors"]
        self.ahead = decision["ahead"] // prefetch.LINE_BYTES
        self.dtype = epilogue.index_dtype
        self.width = self.streams * self.vectors * COLUMNS
        self.groups = -(-row.columns // self.width)
        large = row.depth * row.columns >= PARALLEL_ELEMENTS
        self.threads = min(workload.machine.threads, self.groups) if large else 1

    def function(self):
        from tvm.script.ir_builder import IRBuilder

        T = amx.ir()

        row = self.row
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            self.renamed = []
            for index, old in enumerate(self.workload.func.params):
                shape, dtype = [int(d) for d in old.ty.shape], str(old.ty.dtype)
                if index == row.weight_index:
                    shape = [self.groups, self.streams, row.steps, self.vectors, COLUMNS]
                    dtype = "uint32" if row.pack == 2 else dtype
                self.renamed.append((old, T.arg(str(old.name), T.buffer(shape, dtype))))
            T.func_attr({"tirx.noalias": True})
            self.data = self.renamed[row.data_index][1]
            self.weight = self.renamed[row.weight_index][1]
            self.output = next(new for old, new in self.renamed if old.same_as(self.epilogue.output))
            if self.threads == 1:
                self._thread(self.number(0), self.number(self.groups))
            else:
                share = -(-self.groups // self.threads)
                with T.parallel(self.number(0), self.number(self.threads)) as thread:
                    first = amx.minimum(thread * share, self.number(self.groups))
                    self._thread(first, amx.minimum(first + share, self.number(self.groups)) - first)
        return builder.get()

    def number(self, value: int):
        from tvm import tirx

        return tirx.const(value, self.dtype)

    def _at(self, index) -> list[Any]:
        """Indices of the data or the output."""
        return [*[self.number(0)] * (self.row.rank - 1), index]

    def _thread(self, first, groups) -> None:
        T = amx.ir()

        if self.row.pack == 2:
            self._widen_data()
        with T.serial(self.number(0), groups) as each:
            self._group(first + each)

    def _widen_data(self) -> None:
        """The row as float32, once: it is broadcast from memory for every group."""
        T = amx.ir()

        depth = self.row.depth
        self.inputs: Any = T.alloc_buffer((self.row.steps * 2,), "float32", scope="global")
        whole = depth // COLUMNS * COLUMNS
        if whole:
            vectors = T.serial(self.number(0), self.number(whole // COLUMNS))
            with vectors as i, T.vectorized(self.number(0), self.number(COLUMNS)) as lane:
                place = i * COLUMNS + lane
                T.buffer_store(self.inputs, widen(self.data[tuple(self._at(place))]), [place])
        if whole < depth:
            with T.serial(self.number(whole), self.number(depth)) as i:
                T.buffer_store(self.inputs, widen(self.data[tuple(self._at(i))]), [i])
        if depth % 2:
            T.buffer_store(self.inputs, T.float32(0), [self.number(depth)])

    def _group(self, group) -> None:
        T = amx.ir()

        parts = [(s, v) for s in range(self.streams) for v in range(self.vectors)]
        if self.workload.number == "float16":
            sums = self._in_runs(group, parts)
        else:
            sums = self._registers(parts)
            self._add(sums, group, parts, 0, self.row.steps)
        start = amx.minimum(group * self.width, self.number(self.row.columns - self.width))
        for part in range(len(parts)):
            with T.vectorized(self.number(0), self.number(COLUMNS)) as lane:
                place = self._at(start + part * COLUMNS + lane)
                T.buffer_store(self.output, self.epilogue.at(place, sums[part, lane], self.renamed), place)

    def _in_runs(self, group, parts) -> Any:
        """The sums of all inputs, each of runs that are added up by themselves (`half`)."""
        T = amx.ir()

        totals = self._registers(parts)

        def run(first: Any, steps: int) -> None:
            sums = self._registers(parts)
            self._add(sums, group, parts, first, steps)
            for part in range(len(parts)):
                with T.vectorized(self.number(0), self.number(COLUMNS)) as lane:
                    T.buffer_store(totals, totals[part, lane] + sums[part, lane], [part, lane])

        whole, rest = divmod(self.row.steps, half.TERMS)
        if whole:
            with T.serial(self.number(0), self.number(whole)) as number:
                run(number * half.TERMS, half.TERMS)
        if rest:
            run(whole * half.TERMS, rest)
        return totals

    def _registers(self, parts) -> Any:
        """Sums of zero."""
        from tvm import tirx

        T = amx.ir()

        made: Any = T.alloc_buffer((len(parts), COLUMNS), self.workload.number, scope="local")
        for part in range(len(parts)):
            with T.vectorized(self.number(0), self.number(COLUMNS)) as lane:
                T.buffer_store(made, tirx.const(0, self.workload.number), [part, lane])
        return made

    def _add(self, sums, group, parts, first: Any, steps: int) -> None:
        """Add the products of `steps` elements of the weight's columns, from number `first` on."""
        T = amx.ir()

        with T.serial(self.number(0), self.number(steps)) as turn:
            step = turn if isinstance(first, int) and first == 0 else first + turn
            for part, (stream, vector) in enumerate(parts):
                if self.ahead:
                    later = self.weight[group, stream, step + self.ahead // self.vectors, vector, 0]
                    T.evaluate(prefetch.element(later).value)
                for which in range(self.row.pack):
                    with T.vectorized(self.number(0), self.number(COLUMNS)) as lane:
                        factor = self._factor(self.weight[group, stream, step, vector, lane], which)
                        T.buffer_store(sums, sums[part, lane] + factor * self._input(step, which), [part, lane])

    def _input(self, step, which: int) -> Any:
        if self.row.pack == 2:
            return self.inputs[step * 2 + which]
        return self.data[tuple(self._at(step))]

    def _factor(self, element, which: int) -> Any:
        """float32 of one of a pair of bfloat16: the bits are its upper half."""
        from tvm import tirx

        if self.row.pack == 1:
            return element
        high = element & tirx.const(0xFFFF0000, "uint32") if which else element << tirx.const(16, "uint32")
        return tirx.reinterpret("float32", high)
