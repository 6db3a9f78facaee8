"""How the outputs of a window along one axis are cut into register tiles, and which taps of the window each tile reads.

A tile at the border of the picture reads only the taps that lie inside: its padding costs neither a copy nor
arithmetic. Tiles are balanced, so that an extent no tile divides leaves no small rest: 35 outputs in tiles of at most
14 are 12 + 12 + 11. Neighbouring tiles of one size that read the same taps form one run, which is one loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.targets.relax.borders import Border


@dataclass(frozen=True)
class Taps:
    """Consecutive taps of the window that are inside the picture for the same outputs of a tile."""

    first: int
    count: int
    outputs: tuple[int, ...]
    """Which of the tile's outputs, counted from its first."""


@dataclass(frozen=True)
class Run:
    """`count` tiles of `size` outputs each, side by side, from output `first` on."""

    first: int
    size: int
    count: int
    taps: tuple[Taps, ...]
    is_clipped: bool = False
    """True when which taps are inside depends on the tile, so that the loop over taps has bounds to compute."""


@dataclass(frozen=True)
class Axis:
    """A window along one axis: `extent` outputs read `length` inputs."""

    extent: int
    length: int
    kernel: int
    stride: int
    dilation: int
    pad: int
    """Positions of padding before the first input."""

    def runs(self, tile: int, clip: bool = True) -> list[Run]:
        """Cut into as few tiles as tiles of at most `tile` outputs allow.

        Single outputs make one run, whatever taps they read, since these are always consecutive; with `clip` false,
        they too are told apart by their taps.
        """
        if clip and tile == 1 and self.extent > 1 and len({self._taps(i, 1) for i in range(self.extent)}) > 1:
            return [Run(0, 1, self.extent, (Taps(0, self.kernel, (0,)),), is_clipped=True)]
        tiles = -(-self.extent // tile)
        found: list[Run] = []
        first = 0
        for i in range(tiles):
            size = self.extent // tiles + (i < self.extent % tiles)
            taps = self._taps(first, size)
            last = found[-1] if found else None
            if last is not None and (last.size, last.taps) == (size, taps):
                found[-1] = Run(last.first, size, last.count + 1, taps)
            else:
                found.append(Run(first, size, 1, taps))
            first += size
        return found

    @property
    def border(self) -> Border:
        """Which outputs see the same taps."""
        return Border(self.extent, self.length, self.kernel, self.stride, self.dilation, self.pad)

    def readers(self, run: Run) -> dict[int, list[tuple[int, int]]]:
        """By offset from where the first output's window begins: the (output, tap) pairs that read this input."""
        found: dict[int, list[tuple[int, int]]] = {}
        for taps in run.taps:
            for tap in range(taps.first, taps.first + taps.count):
                for output in taps.outputs:
                    found.setdefault(output * self.stride + tap * self.dilation, []).append((output, tap))
        return dict(sorted(found.items()))

    def clipped(self, output) -> tuple[Any, Any]:
        """Expressions: the first tap inside the picture that output number `output` reads, and how many it reads."""
        from tvm import tirx

        start = output * self.stride - self.pad
        first: Any = tirx.max(0, tirx.floordiv(self.dilation - 1 - start, self.dilation))
        end: Any = tirx.min(self.kernel, tirx.floordiv(self.length - 1 - start, self.dilation) + 1)
        return first, tirx.max(end - first, 0)

    def _taps(self, first: int, size: int) -> tuple[Taps, ...]:
        found: list[Taps] = []
        for tap in range(self.kernel):
            shift = tap * self.dilation - self.pad
            outputs = tuple(i for i in range(size) if 0 <= (first + i) * self.stride + shift < self.length)
            if found and found[-1].outputs == outputs and found[-1].first + found[-1].count == tap:
                found[-1] = Taps(found[-1].first, found[-1].count + 1, outputs)
            elif outputs:
                found.append(Taps(tap, 1, outputs))
        return tuple(found)


POINT = Axis(extent=1, length=1, kernel=1, stride=1, dilation=1, pad=0)
