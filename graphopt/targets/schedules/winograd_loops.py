"""The loops of a Winograd convolution; `winograd` says what they are for.

Three stages, each on one chunk of output tiles (all of them, or as many as the second-level cache holds):

- data: per block of input channels and tile, B^T d B of a (tile + 2)^2 square. Where the square leaves the picture, it
  is first copied to a buffer with zeros around.
- multiply: per point and panel of output channels, (tiles x channels) x (channels x width), tiles and width in
  registers. The panels are stored in the order of their use.
- result: per block of output channels and tile, A^T m A, and then the epilogue; a tile that is cut off by the
  picture's edge stores the part that exists.

The chunks overlap where they do not divide the tiles: the same results are then written twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.targets.relax import half
from graphopt.targets.schedules import by_element
from graphopt.targets.schedules.vector_code import Code, Vector, conjunction, negation, read, whole
from graphopt.targets.schedules.winograd_transforms import TAPS, data_transform, result_transform, two_dimensional
from graphopt.targets.schedules.workload import Decision, Machine

LINE = 16
"""Float32 elements of a cache line."""
UNROLLED = 4
"""Input channels of one iteration of the multiplication."""


@dataclass(frozen=True)
class Shape:
    """The convolution, counted in blocks and positions."""

    batch: int
    in_blocks: int
    out_blocks: int
    icb: int
    ocb: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    pads: tuple[int, int]
    """Rows above, columns to the left."""

    def tiles(self, side: int) -> tuple[int, int]:
        """Rows and columns of tiles of `side` squared outputs."""
        return -(-self.out_size[0] // side), -(-self.out_size[1] // side)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of each result: `value`, in terms of the variables `axes` and of elements of `source`."""

    axes: list[Any]
    value: Any
    source: Any
    indices: list[Any]
    output: Any


def applies(shape: Shape, machine: Machine) -> bool:
    """Whether the machine multiplies by an element, and blocks of channels are such vectors."""
    return by_element.has(machine) and shape.icb == shape.ocb == machine.lanes


class Nest:
    """The code of one decision."""

    def __init__(
        self, shape: Shape, decision: Decision, epilogue: Epilogue, data: Any, machine: Machine, number: str = "float32"
    ):
        from tvm import tirx

        threads = machine.threads

        self.shape = shape
        self.epilogue = epilogue
        self.data = data
        self.elements = applies(shape, machine)
        """Whether numbers are loaded as vectors and multiplied as elements of these."""
        self.kind = "SERIAL" if threads == 1 else "PARALLEL"
        self.tile = decision["tile"]
        self.rows = decision["rows"]
        self.vectors = decision["vectors"]
        self.order = decision["order"]
        self.ahead = decision["prefetch"]
        self.points = (self.tile + 2) ** 2
        self.high, self.wide = shape.tiles(self.tile)
        self.tiles = shape.batch * self.high * self.wide
        self.chunk = min(decision["chunk"], self.tiles)
        self.passes = -(-self.chunk // self.rows)
        self.groups = shape.out_blocks // self.vectors
        self.depth = shape.in_blocks * shape.icb
        self.width = self.vectors * shape.ocb
        kept = shape.out_blocks if self.order == "points" else self.vectors
        self.data_stride = _odd_lines(self.depth * self.chunk)
        self.product_stride = _odd_lines(kept * self.chunk * shape.ocb)
        self.weight = tirx.decl_buffer((self.points * self.groups * self.depth * self.width,), number, "weight")
        self.code = Code(number)
        run = max(half.TERMS // shape.icb, 1) if number == "float16" else shape.in_blocks
        """Most blocks of channels that are added up at a time."""
        self.runs = [(first, min(run, shape.in_blocks - first)) for first in range(0, shape.in_blocks, run)]

    def body(self) -> Any:
        """The function's body, one TIR statement; it reads the weight from the buffer `self.weight`."""
        from tvm import tirx

        chunks = -(-self.tiles // self.chunk)
        if chunks == 1:
            self._stages(whole(0), self.kind)
        else:
            with self.code.loop("chunk", chunks, kind=self.kind) as chunk:
                self._stages(tirx.min(chunk * self.chunk, whole(self.tiles - self.chunk)), "SERIAL")
        return self.code.body()

    def _stages(self, first: Any, kind: str) -> None:
        code, s = self.code, self.shape
        start = code.index("start", first)
        spectrum = code.allocate("spectrum", self.points * self.data_stride)
        if self.order == "points":
            product = code.allocate("product", self.points * self.product_stride)
        with code.loop("block", s.in_blocks, kind=kind) as block:
            patch = code.allocate("patch", self.points * s.icb)
            with code.loop("tile", self.chunk) as tile:
                self._transform_data(spectrum, patch, block, tile, start)
        if self.order == "points":
            with code.loop("panel", self.points * self.groups, kind=kind) as panel:
                self._multiply(spectrum, product, panel // self.groups, panel % self.groups, panel)
            with code.loop("block", s.out_blocks, kind=kind) as block:
                results = code.allocate("results", self.tile**2 * s.ocb)
                with code.loop("tile", self.chunk) as tile:
                    self._transform_result(product, results, block, block, tile, start)
        else:
            with code.loop("group", self.groups, kind=kind) as group:
                product = code.allocate("product", self.points * self.product_stride)
                results = code.allocate("results", self.tile**2 * s.ocb)
                with code.loop("point", self.points) as point:
                    self._multiply(spectrum, product, point, whole(0), group * self.points + point)
                with code.loop("vector", self.vectors) as v, code.loop("tile", self.chunk) as tile:
                    self._transform_result(product, results, v, group * self.vectors + v, tile, start)

    def _place(self, number: Any) -> tuple[Any, Any, Any]:
        """Picture, row and column of a tile."""
        code = self.code
        area = self.high * self.wide
        n = code.index("n", number // area)
        within = code.index("within", number % area)
        return n, code.index("ty", within // self.wide), code.index("tx", within % self.wide)

    def _transform_data(self, spectrum: Any, patch: Any, block: Any, tile: Any, start: Any) -> None:
        """B^T d B of one tile and one block of input channels."""
        code, s, m = self.code, self.shape, self.tile
        side = m + 2
        n, ty, tx = self._place(start + tile)
        top, left = code.index("top", ty * m - s.pads[0]), code.index("left", tx * m - s.pads[1])
        origin = code.index("origin", top * s.size[1] + left)
        target = code.index("target", (block * self.chunk + tile) * s.icb)

        def transform(at) -> None:
            square = [[at(i, j) for j in range(side)] for i in range(side)]
            for i, line in enumerate(two_dimensional(data_transform(m), square)):
                for j, value in enumerate(line):
                    code.store(spectrum, [target + (i * side + j) * self.data_stride], value)

        inside = [
            *_within(top, side, s.size[0], s.pads[0], self.high * m),
            *_within(left, side, s.size[1], s.pads[1], self.wide * m),
        ]
        with code.when(conjunction(inside)):
            transform(lambda i, j: code.load(self.data, [n, block, origin + (i * s.size[1] + j), 0], s.icb))
        if inside:
            with code.when(negation(inside)):
                with code.loop("i", side) as i, code.loop("j", side) as j:
                    y, x = top + i, left + j
                    exists = [y >= 0, y < s.size[0], x >= 0, x < s.size[1]]
                    with code.when(conjunction(exists)):
                        value = code.load(self.data, [n, block, y * s.size[1] + x, 0], s.icb)
                        code.store(patch, [(i * side + j) * s.icb], value)
                    with code.when(negation(exists)):
                        code.store(patch, [(i * side + j) * s.icb], code.zero(s.icb))
                transform(lambda i, j: code.load(patch, [(i * side + j) * s.icb], s.icb))

    def _multiply(self, spectrum: Any, product: Any, point: Any, group: Any, panel: Any) -> None:
        """All tiles at one point times one panel of the weight: (tiles, channels) x (channels, width)."""
        code, s = self.code, self.shape
        weights = code.index("weights", panel * (self.depth * self.width))
        source = code.index("source", point * self.data_stride)
        target = code.index("target", point * self.product_stride + group * (self.vectors * self.chunk * s.ocb))
        steps, rest = divmod(self.chunk, self.rows)
        if steps:
            with code.loop("step", steps) as step:
                self._register_tile(spectrum, product, self.rows, weights, source, target, step)
        if rest:
            self._register_tile(spectrum, product, rest, weights, source, target, whole(steps))

    def _register_tile(
        self, spectrum: Any, product: Any, rows: int, weights: Any, source: Any, target: Any, step: Any
    ) -> None:
        """Sums over the channels of `rows` tiles x one panel, run by run; each pass also prefetches its share of the
        next panel."""
        code, s = self.code, self.shape
        first = code.index("first", step * self.rows)
        for before, blocks in self.runs:
            sums = self._run(spectrum, rows, weights, source, step, first, before, blocks)
            for r in range(rows):
                for v in range(self.vectors):
                    place = target + (v * self.chunk + first + r) * s.ocb
                    value = Vector(code, read(sums[r][v], [0], s.ocb), s.ocb)
                    code.store(product, [place], value + code.load(product, [place], s.ocb) if before else value)

    def _run(
        self, spectrum: Any, rows: int, weights: Any, source: Any, step: Any, first: Any, before: int, blocks: int
    ) -> list[list[Any]]:
        """Registers with the sums over `blocks` blocks of channels behind the first `before`."""
        code, s = self.code, self.shape
        sums = [[code.allocate("sum", s.ocb, registers=True) for _ in range(self.vectors)] for _ in range(rows)]
        for line in sums:
            for total in line:
                code.store(total, [0], code.zero(s.ocb))
        unrolled = s.ocb if self.elements else min(UNROLLED, s.icb)
        share = -(-unrolled * self.width // (LINE * self.passes)) if self.ahead else 0
        with code.loop("block", blocks) as turn, code.loop("part", s.icb // unrolled) as part:
            block = turn + before if before else turn
            base = code.index("base", source + (block * self.chunk + first) * s.icb + part * unrolled)
            number = code.index("number", block * (s.icb // unrolled) + part)
            streamed = code.index("streamed", weights + number * (unrolled * self.width))
            if share:  # of the next panel, from front to back over the passes; first, so that no sum is kept in memory
                offset = (step * (self.depth // unrolled) + number) * (share * LINE)
                coming = code.index("coming", weights + self.depth * self.width + offset)
                for line in range(share):
                    code.prefetch(self.weight, coming + line * LINE)
            numbers = [
                code.load(spectrum, [base + r * s.icb], unrolled).expression
                for r in range(rows if self.elements else 0)
            ]
            for c in range(unrolled):
                filters = [
                    code.load(self.weight, [streamed + (c * self.width + v * s.ocb)], s.ocb)
                    for v in range(self.vectors)
                ]
                for r in range(rows):
                    if self.elements:
                        scalar = by_element.spread(numbers[r], c, s.ocb)
                    else:
                        scalar = code.spread(spectrum, [base + (r * s.icb + c)], s.ocb).expression
                    for v in range(self.vectors):
                        total = read(sums[r][v], [0], s.ocb) + scalar * filters[v].expression
                        code.store(sums[r][v], [0], Vector(code, total, s.ocb))
        return sums

    def _transform_result(self, product: Any, results: Any, kept: Any, block: Any, tile: Any, start: Any) -> None:
        """A^T m A of one tile and one block of output channels, and the epilogue."""
        from tvm import tirx

        code, s, m = self.code, self.shape, self.tile
        side = m + 2
        n, ty, tx = self._place(start + tile)
        source = code.index("source", (kept * self.chunk + tile) * s.ocb)
        position = code.index("position", ty * (m * s.out_size[1]) + tx * m)
        square = [
            [code.load(product, [source + (i * side + j) * self.product_stride], s.ocb) for j in range(side)]
            for i in range(side)
        ]
        for i, line in enumerate(two_dimensional(result_transform(m), square)):
            for j, value in enumerate(line):
                code.store(results, [(i * m + j) * s.ocb], value)

        def finish(rows: Any, columns: Any, kind: str) -> None:
            with (
                code.loop("i", rows) as i,
                code.loop("j", columns, kind=kind) as j,
                code.loop("lane", s.ocb, kind="VECTORIZED") as lane,
            ):
                self._finish(results, (i * m + j) * s.ocb + lane, n, block, position + i * s.out_size[1] + j, lane)

        left = [code.index("left", extent - t * m) for extent, t in zip(s.out_size, (ty, tx), strict=True)]
        full = [rest >= m for rest, extent in zip(left, s.out_size, strict=True) if extent % m]
        with code.when(conjunction(full)):
            finish(m, m, "UNROLLED")
        if full:
            with code.when(negation(full)):
                finish(tirx.min(left[0], whole(m)), tirx.min(left[1], whole(m)), "SERIAL")

    def _finish(self, results: Any, index: Any, n: Any, block: Any, position: Any, lane: Any) -> None:
        """The epilogue of one element."""
        import tvm_ffi
        from tvm import tirx
        from tvm.ir import Var
        from tvm.ir.expr import TensorLoad

        e = self.epilogue
        places = list(zip(e.axes, (n, block, position, lane), strict=True))

        def load(node):
            return tirx.BufferLoad(results, [index]) if node.source.same_as(e.source) else node

        def variable(node):
            return next((place for axis, place in places if node.same_as(axis)), node)

        def renamed(expression):
            return tvm_ffi.structural_map(expression, [(TensorLoad, load), (Var, variable)])

        self.code.add(tirx.BufferStore(e.output, renamed(e.value), [renamed(i) for i in e.indices]))


def _within(start: Any, length: int, size: int, before: int, reach: int) -> list[Any]:
    """Conditions for the lines `start` to `start + length` to exist, less those that hold for every tile."""
    conditions = [start >= 0] if before > 0 else []
    return [*conditions, start <= size - length] if reach - before + TAPS - 1 > size else conditions


def _odd_lines(elements: int) -> int:
    """At least so many elements, an odd number of lines: successive points then do not share cache sets."""
    return (-(-elements // LINE) | 1) * LINE
