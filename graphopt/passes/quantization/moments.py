"""Mean and covariance of what each weight of a layer multiplies, from the calibration data, in one streaming pass."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.calibration.observe import watch
from graphopt.graph import attribute, constant_of, label
from graphopt.passes.quantization.placement import Layer
from graphopt.progress import Progress

POSITIONS = 32
"""Output positions drawn a sample: neighbours say nearly the same."""
FLUSH_ROWS = 1024
"""Rows gathered before they are multiplied into the covariance."""
MAX_TAPS = 2304
"""Largest group of weights with a covariance (its square is kept); larger layers get the mean alone."""

MOST_ELEMENTS = 64 << 20
"""Of all covariances that are kept at one time: 512 MiB."""
Item = TypeVar("Item")


def covariance_elements(groups: int, taps: int) -> int:
    """Elements of a layer's covariance; 0 where it is too large to have one."""
    return groups * taps**2 if taps <= MAX_TAPS else 0


def in_parts(items: Iterable[Item], elements: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Runs of `items` whose covariances together have at most `MOST_ELEMENTS`; each is one run over the data."""
    part: list[Item] = []
    size = 0
    for item in items:
        own = elements(item)
        if part and size + own > MOST_ELEMENTS:
            yield part
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield part


@dataclass
class Moments:
    """Over the rows seen: `mean` (groups, taps), `covariance` (groups, taps, taps) or None for large layers.

    Taps are the weights of one output channel in the order they are stored: (C/group, kH, kW) of a Conv, rows of a
    Gemm's or MatMul's matrix.
    """

    mean: np.ndarray
    covariance: np.ndarray | None
    rows: int = 0
    """How many; 0 where nobody counted."""

    @property
    def second_moment(self) -> np.ndarray | None:
        """(groups, taps, taps): the mean of products, not of products of deviations from the mean."""
        if self.covariance is None:
            return None
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def collect_moments(
    model: ir.Model,
    layers: Sequence[Layer],
    dataset: Dataset,
    seed: int,
    progress: Progress,
    *,
    covariance: bool = True,
) -> dict[Layer, Moments]:
    """Moments of every layer's input, the mean alone without `covariance`.

    Raises ModelError and DataError as `collect_statistics` does.
    """
    largest = MAX_TAPS if covariance else 0
    sums = {layer: _Sums(layer, draws(seed, layer), largest) for layer in layers}
    names = [str(layer.input.name) for layer in layers]
    for values in watch(model, names, dataset, label="collect input moments", progress=progress):
        for layer, name in zip(layers, names, strict=True):
            sums[layer].add(values[name])
    return {layer: total.moments() for layer, total in sums.items()}


class _Sums:
    def __init__(self, layer: Layer, rng: np.random.Generator, largest: int):
        self.layer = layer
        self.rng = rng
        self.largest = largest
        self.rows = 0
        self.waiting: list[np.ndarray] = []
        self.total: np.ndarray | None = None
        self.squares: np.ndarray | None = None

    def add(self, array: np.ndarray) -> None:
        self.waiting.append(patches(self.layer, array, self.rng).astype(np.float32, copy=False))
        if sum(rows.shape[1] for rows in self.waiting) >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = np.concatenate(self.waiting, axis=1)
        self.waiting.clear()
        groups, _, taps = rows.shape
        if self.total is None:
            self.total = np.zeros((groups, taps))
            self.squares = np.zeros((groups, taps, taps)) if taps <= self.largest else None
        self.rows += rows.shape[1]
        self.total += rows.sum(axis=1, dtype=np.float64)
        if self.squares is not None:
            self.squares += rows.transpose(0, 2, 1) @ rows

    def moments(self) -> Moments:
        if self.waiting:
            self._flush()
        assert self.total is not None
        mean = self.total / self.rows
        if self.squares is None:
            return Moments(mean, None, self.rows)
        return Moments(mean, self.squares / self.rows - mean[:, :, None] * mean[:, None, :], self.rows)


def draws(seed: int, layer: Layer) -> np.random.Generator:
    """Where `patches` takes a layer's rows: told by its name, so whatever else is observed changes nothing for it."""
    return np.random.default_rng((seed, zlib.crc32(label(layer.node).encode())))


def patches(layer: Layer, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(groups, rows, taps): what the layer's weights multiply at some output positions, drawn from `rng`.

    `array`: a batch of the layer's input.
    """
    node = layer.node
    if node.op_type != "Conv":
        return matrix_rows(array, rng)[None]
    weights = constant_of(node.inputs[1])
    assert weights is not None
    kernel, sizes = weights.shape[2:], array.shape[2:]
    rank = len(kernel)
    strides = tuple(attribute(node, "strides", (1,) * rank))
    dilations = tuple(attribute(node, "dilations", (1,) * rank))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    rows = window_rows(array, reach, _pads(node, sizes, reach, strides), rng, strides, dilations)
    return rows.reshape(len(rows), attribute(node, "group", 1), -1).transpose(1, 0, 2)


def matrix_rows(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(rows, last axis) of a batch of what a matrix product reads or writes: as many places as of a convolution."""
    rows = array.reshape(-1, array.shape[-1])
    if len(rows) > POSITIONS * max(1, array.shape[0]):
        rows = rows[rng.choice(len(rows), POSITIONS * array.shape[0], replace=False)]
    return rows


def window_rows(
    array: np.ndarray,
    reach: Sequence[int],
    pads: Sequence[tuple[int, int]],
    rng: np.random.Generator,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
) -> np.ndarray:
    """(rows, channels * taps of the window): windows of `reach`, one every `dilations`, at places drawn from `rng`.

    `array`: (N, C, *spatial). The same places are drawn from arrays and windows that have as many.
    """
    sizes, channels, one = array.shape[2:], array.shape[1], (1,) * len(reach)
    strides, dilations = strides or one, dilations or one
    kernel = [(r - 1) // d + 1 for r, d in zip(reach, dilations, strict=True)]
    places = [(n + a + b - r) // s + 1 for n, (a, b), r, s in zip(sizes, pads, reach, strides, strict=True)]
    count = min(POSITIONS, math.prod(places))
    drawn = [rng.choice(math.prod(places), count, replace=False) for _ in range(len(array))]
    position = np.unravel_index(np.concatenate(drawn), places)
    spatial, inside = _window(position, kernel, strides, dilations, [before for before, _ in pads], sizes)
    planes = np.repeat(np.arange(len(array)), count)[:, None] * channels + np.arange(channels)
    taken = array.reshape(-1)[planes[:, :, None] * math.prod(sizes) + spatial[:, None, :]]
    if inside is not None:
        taken *= inside[:, None, :]
    return taken.reshape(len(taken), -1)


def _window(position, kernel, strides, dilations, before, sizes) -> tuple[np.ndarray, np.ndarray | None]:
    """Indices into a plane of `sizes`, (rows, taps of the kernel), for each output position, and which taps are inside
    (None: all); what is outside is padding, and has some index all the same.

    Only the taps that are wanted are touched: padding or windowing the whole input would cost more than all the rest.
    """
    spatial = np.zeros((len(position[0]), 1), np.intp)
    inside: np.ndarray | None = None
    for axis, size in enumerate(sizes):
        first = position[axis][:, None] * strides[axis] - before[axis]
        at = first + np.arange(kernel[axis]) * dilations[axis]
        held = at.clip(0, size - 1)
        valid = np.ones(spatial.shape, bool) if inside is None else inside
        if inside is not None or (held != at).any():
            inside = (valid[:, :, None] & (held == at)[:, None, :]).reshape(len(at), -1)
        spatial = (spatial[:, :, None] * size + held[:, None, :]).reshape(len(at), -1)
    return spatial, inside


def _pads(node: ir.Node, shape, reach, strides) -> list[tuple[int, int]]:
    rank = len(reach)
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, window, stride in zip(shape, reach, strides, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + window - size)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return pads
    if auto == "VALID":
        return [(0, 0)] * rank
    flat = attribute(node, "pads", (0,) * (2 * rank))
    return [(flat[axis], flat[rank + axis]) for axis in range(rank)]
