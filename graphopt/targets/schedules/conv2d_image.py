"""How a convolution's input lies in memory so that neighbouring outputs read neighbouring tile rows.

An image is a sequence of *positions* for each block of input channels. Output q of a run reads position
`base + q * step + offset(tap)`, and a tap is what one step of 64 bytes of inputs covers (32 of bfloat16, 64 of bytes):
a kernel position of as many channels, or for fewer channels several neighbouring kernel columns at once. Such a step
may also read positions right of the kernel, with weights of zero: an infinity or NaN in a bfloat16 picture then reaches
outputs up to 31 / channels positions to its left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graphopt.targets.relax.bfloat16 import DTYPE, OPERATOR, register
from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.relax.integer_computes import QUAD
from graphopt.targets.schedules import amx
from graphopt.targets.schedules.workload import Workload, extents

ANCHORS = {"conv2d": DTYPE, "conv2d_int8": "uint8"}
"""By anchor block: the element type that its tile products read."""
_WEIGHTS = {DTYPE: DTYPE, "uint8": "int8"}
_BYTES = {DTYPE: 2, "uint8": 1}
MOST_PLANES = 8
"""Channels of a plain (unblocked) input that are interleaved."""
BAND_BYTES = 1 << 20
"""A band of the copied image; it shares a 2 MB second-level cache with weights and outputs."""


@dataclass(frozen=True)
class Window:
    """The geometry of a `conv2d` block."""

    batch: int
    in_blocks: int
    """Of one group."""
    in_lanes: int
    out_lanes: int
    out_tiles: int
    """Output channels in sixteens, of all groups."""
    height: int
    width: int
    out_h: int
    out_w: int
    strides: tuple[int, int]
    pads: tuple[int, int]
    """Top and left."""
    dilations: tuple[int, int]
    groups: int
    kernel: tuple[int, int]
    padded: bool
    data_index: int
    weight_index: int
    data_dtype: str
    anchor: str

    @property
    def dtype(self) -> str:
        """What tile products read: `bfloat16` or `uint8`."""
        return ANCHORS[self.anchor]

    @property
    def element_bytes(self) -> int:
        return _BYTES[self.dtype]

    @property
    def step_inputs(self) -> int:
        """Inputs of one tile product."""
        return amx.ROW_BYTES // self.element_bytes


def window_of(workload: Workload) -> Window | None:
    """The geometry, where operands have a form that tiles can take; else None."""
    block = workload.anchor(*ANCHORS)
    names = list(workload.blocks)
    if block is None or WINDOW not in block.annotations:
        return None
    anchor = str(block.name_hint)
    if set(names[: names.index(anchor)]) - {"pad"}:
        return None
    sources = [region.source for region in block.reads]
    if "pad" in workload.blocks:
        written = workload.blocks["pad"].writes[0].source
        read = workload.blocks["pad"].reads[0].source
        sources = [read if source.same_as(written) else source for source in sources]
    params = list(workload.func.params)
    places = [next((i for i, p in enumerate(params) if p.same_as(source)), -1) for source in sources]
    data = next((i for i in places if i >= 0 and len(params[i].ty.shape) == 4), -1)
    weight = next((i for i in places if i >= 0 and len(params[i].ty.shape) == 6), -1)
    if data < 0 or weight < 0 or str(params[weight].ty.dtype) != _WEIGHTS[ANCHORS[anchor]]:
        return None
    data_dtype = str(params[data].ty.dtype)
    batch, out_blocks, _, out_lanes, in_blocks, kernel_h, in_lanes, kernel_w = extents(block)[:8]
    height, width, out_h, out_w, s_h, s_w, top, left, d_h, d_w, groups = (int(x) for x in block.annotations[WINDOW])
    if out_lanes % amx.OUTPUTS or min(height, width, out_h, out_w) < 1:
        return None
    if anchor == "conv2d_int8":
        in_lanes *= QUAD
        if in_lanes not in (4, 8, 16, 32, 64) or (in_lanes < 64 and (in_blocks > 1 or groups > 1)):
            return None
    elif in_lanes == 1:
        if groups > 1 or in_blocks > MOST_PLANES or data_dtype not in (DTYPE, "float32"):
            return None
    elif in_lanes not in (16, 32) or data_dtype != DTYPE:
        return None
    return Window(
        batch, in_blocks, in_lanes, out_lanes, out_blocks * out_lanes // amx.OUTPUTS, height, width, out_h, out_w,
        (s_h, s_w), (top, left), (d_h, d_w), groups, (kernel_h, kernel_w), "pad" in workload.blocks, data, weight,
        data_dtype, anchor,
    )  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """One step's place in the image, and which of its inputs belong to which kernel position."""

    offset: int
    kernel: tuple[tuple[int, int, int], ...]
    """(kernel row, kernel column, first of the step's inputs)."""


@dataclass(frozen=True)
class Image:
    """Where positions lie; sizes are in positions unless named otherwise."""

    window: Window
    copied: bool
    lanes: int
    """Channels of a position."""
    phases: tuple[int, int]
    """Rows and columns are split by their remainder: strides, where neighbouring outputs shall be adjacent."""
    row_pitch: int
    """Between neighbouring image rows."""
    column_step: int
    """Between the inputs of neighbouring outputs."""
    merge: bool
    band_rows: int
    """Output rows of a band."""

    @property
    def interleaved(self) -> bool:
        """Planes of a plain tensor became lanes of a position."""
        return self.window.in_lanes == 1

    @property
    def blocks(self) -> int:
        """Blocks of input channels of one group."""
        return 1 if self.interleaved else self.window.in_blocks

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        (k_h, k_w), (d_h, d_w), (p_h, p_w) = self.window.kernel, self.window.dilations, self.phases
        found = []
        for y in range(k_h):
            row = y * d_h
            top = row % p_h * p_w * self._phase_size + row // p_h * self.row_pitch
            if self.lanes == self.window.step_inputs:
                for x in range(k_w):
                    column = x * d_w
                    offset = top + column % p_w * self._phase_size + column // p_w
                    found.append(Tap(offset, ((y, x, 0),)))
                continue
            for first in range(0, (k_w - 1) * d_w + 1, self._step_columns):
                inside = [x for x in range(k_w) if first <= x * d_w < first + self._step_columns]
                kernel = tuple((y, x, (x * d_w - first) * self.lanes) for x in inside)
                if kernel:
                    found.append(Tap(top + first, kernel))
        return tuple(found)

    @property
    def steps(self) -> int:
        return self.blocks * len(self.taps)

    @property
    def _step_columns(self) -> int:
        return self.window.step_inputs // self.lanes

    @property
    def _image_rows(self) -> int:
        """Of one phase of a band."""
        reach = (self.window.kernel[0] - 1) * self.window.dilations[0]
        return (self.band_rows - 1) * self.window.strides[0] // self.phases[0] + reach // self.phases[0] + 1

    @property
    def _phase_size(self) -> int:
        return self._image_rows * self.row_pitch

    @property
    def row_step(self) -> int:
        """Between the inputs of outputs one row apart."""
        return self.window.strides[0] // self.phases[0] * self.row_pitch

    @property
    def pitch(self) -> int:
        """Output numbers from a row to the next."""
        return self.row_step // self.column_step

    @property
    def merged(self) -> bool:
        """Whether tiles run across row ends. What lies past a row's end must fall into the next row."""
        return self.merge and self.row_step % self.column_step == 0 and self.pitch <= 2 * self.window.out_w

    @property
    def run_rows(self) -> int:
        return self.band_rows if self.merged else 1

    @property
    def run_length(self) -> int:
        return (self.run_rows - 1) * self.pitch + self.window.out_w

    @property
    def rows(self) -> int:
        """Of a tile."""
        return min(self.run_length, amx.ROWS)

    @property
    def run_tiles(self) -> int:
        return -(-self.run_length // amx.ROWS)

    @property
    def tiles(self) -> int:
        """Of a band."""
        return self.band_rows // self.run_rows * self.run_tiles

    @property
    def bands(self) -> int:
        return -(-self.window.out_h // self.band_rows)

    @property
    def column_bytes(self) -> int:
        return self.column_step * self.lanes * self.window.element_bytes

    @property
    def _word_bits(self) -> int:
        return 16 * min(self.lanes, 4) if self.interleaved else 8 * self.window.element_bytes

    @property
    def dtype(self) -> str:
        """Of the copy: bits, since TVM computes in float32 whatever it allocates as bfloat16."""
        return f"uint{self._word_bits}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(blocks, positions, lanes); interleaved planes are stored as words of up to four lanes."""
        blocks = self.blocks * self.window.groups
        bits = self.lanes * 8 * self.window.element_bytes
        return blocks, self.phases[0] * self.phases[1] * self._phase_size, bits // self._word_bits

    @property
    def bytes(self) -> int:
        window = self.window
        if not self.copied:
            return self.blocks * window.groups * window.height * window.width * self.lanes * window.element_bytes
        return self.shape[0] * self.shape[1] * self.lanes * window.element_bytes

    def first_row(self, band):
        """Output row where a band begins; the last band begins earlier instead of being shorter."""

        if self.bands == 1:
            return 0
        return amx.minimum(band * self.band_rows, self.window.out_h - self.band_rows)

    def position(self, run, start):
        """Of the input of output `start` of a run, tap offset aside."""
        return run * self.run_rows * self.row_step + start * self.column_step

    def copy(self, data, target, n, row0, dtype: str) -> None:
        """Emit the copy of picture `n`'s band from output row `row0` on; `dtype` is that of indices."""
        from tvm import tirx

        T = amx.ir()

        def number(value: int):
            return tirx.const(value, dtype)

        window = self.window
        (p_h, p_w), (s_h, _), (top, left) = self.phases, window.strides, window.pads
        with T.serial(number(0), number(self.shape[0])) as block:
            for phase_y in range(min(p_h, self._reach(0))):
                for phase_x in range(min(p_w, self._reach(1))):
                    base = (phase_y * p_w + phase_x) * self._phase_size
                    low = min(max(0, -(-(left - phase_x) // p_w)), self.row_pitch)
                    high = max(low, min(self.row_pitch, (window.width - 1 + left - phase_x) // p_w + 1))
                    with T.serial(number(0), number(self._image_rows)) as y:
                        row = row0 * s_h + y * p_h + (phase_y - top)
                        at = base + y * self.row_pitch
                        inside = tirx.all(row >= 0, row < window.height)
                        self._fill(target, block, at, 0, low, number)
                        with T.If(inside):
                            with T.Then():
                                column = row * window.width + (phase_x - left)
                                self._move(data, target, n, block, at, column, low, high, number)
                            with T.Else():
                                self._fill(target, block, at, low, high, number)
                        self._fill(target, block, at, high, self.row_pitch, number)

    def _reach(self, axis: int) -> int:
        """Phases that a kernel touches: no more than its extent."""
        return (self.window.kernel[axis] - 1) * self.window.dilations[axis] + 1

    def _fill(self, target, block, at, low: int, high: int, number) -> None:
        from tvm import tirx

        T = amx.ir()

        if low == high:
            return
        zero = tirx.const(0, self.dtype)
        with T.serial(number(low), number(high)) as x, T.vectorized(number(0), number(self.shape[2])) as v:
            T.buffer_store(target, zero, [block, at + x, v])

    def _move(self, data, target, n, block, at, column, low: int, high: int, number) -> None:
        """Positions [low, high) of a row, from `data` at `column + x * phases`."""
        from tvm import tirx

        T = amx.ir()

        step = self.phases[1]
        if low == high:
            return
        if not self.interleaved:
            with T.serial(number(0), number(high - low)) as x, T.vectorized(number(0), number(self.lanes)) as v:
                value = data[n, block, column + (low + x) * step, v]
                if self.dtype != "uint8":
                    value = tirx.reinterpret(self.dtype, value)
                T.buffer_store(target, value, [block, at + low + x, v])
            return
        whole = (high - low) // 16 * 16
        for word in range(self.shape[2]):
            if whole:
                with T.serial(number(0), number(whole // 16)) as tile, T.vectorized(number(0), number(16)) as x:
                    place = low + tile * 16 + x
                    T.buffer_store(target, self._word(data, n, word, column + place), [0, at + place, word])
            if whole < high - low:
                with T.serial(number(0), number(high - low - whole)) as x:
                    place = low + whole + x
                    T.buffer_store(target, self._word(data, n, word, column + place), [0, at + place, word])

    def _word(self, data, n, word: int, position) -> Any:
        """Up to four channels of a pixel as bfloat16 bits, the first lowest."""
        from tvm import tirx

        register()
        total: Any = None
        bits: Any
        for lane in range(self._word_bits // 16):
            channel = word * 4 + lane
            if channel >= self.window.in_blocks:
                break
            value = data[n, channel, position, 0]
            if self.window.data_dtype == "float32":
                bits = tirx.call_intrin("uint16", OPERATOR, value)
            else:
                bits = tirx.reinterpret("uint16", value)
            bits = tirx.Cast(self.dtype, bits)
            if lane:
                bits = bits << tirx.const(16 * lane, self.dtype)
            total = bits if total is None else total | bits
        return tirx.const(0, self.dtype) if total is None else total


def image_of(window: Window, merge: bool) -> Image:
    """The image of a convolution: the input itself where it can be read in place, else a copy."""
    s_h, s_w = window.strides
    reach = (window.kernel[1] - 1) * window.dilations[1]
    whole = window.step_inputs
    if window.in_lanes == whole:
        strided = (s_h, s_w) != (1, 1)
        if not window.padded and not (strided and merge):
            return Image(window, False, whole, (1, 1), window.width, s_w, merge, window.out_h)
        pitch = window.out_w + reach // s_w
        image = Image(window, True, whole, (s_h, s_w), pitch, 1, merge, window.out_h)
    else:
        lanes = window.in_lanes if window.in_lanes > 1 else 1 << (window.in_blocks - 1).bit_length()
        step_columns = whole // lanes
        pitch = (window.out_w - 1) * s_w + -(-(reach + 1) // step_columns) * step_columns
        image = Image(window, True, lanes, (1, 1), pitch, s_w, merge, window.out_h)
    bands = min(math.ceil(image.bytes / BAND_BYTES), window.out_h)
    if bands == 1:
        return image
    rows = -(-window.out_h // bands)
    return Image(window, True, image.lanes, image.phases, pitch, image.column_step, merge, rows)
