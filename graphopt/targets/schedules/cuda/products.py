"""A convolution or a product with a constant as one matrix product: implicit GEMM, in which im2col is only addresses.

    C[m, n] = sum_k A[m, k] * B[n, k]

Rows m are output positions (n, oh, ow), columns n output channels, and k runs over kernel positions and input
channels, channels innermost, so that neighbours in k are neighbours in memory (channels last). A picture whose channels
are planes has k = (channel, kernel row, kernel column).

Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning, arXiv:1410.0759, 2014, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from graphopt.targets.relax.computes import WINDOW
from graphopt.targets.relax.integer_computes import QUAD
from graphopt.targets.schedules.workload import Workload, extents

CONVOLUTIONS = ("conv2d", "conv2d_int8")
ANCHORS = (*CONVOLUTIONS, "packed_matmul")


@dataclass(frozen=True)
class Product:
    """The matrix product that an anchor block is."""

    anchor: str
    rows: int
    columns: int
    depth: int
    channels: int
    """Neighbours in k that are neighbours in memory; 1 where channels are planes."""
    data_index: int
    weight_index: int
    data_dtype: str
    weight_dtype: str
    size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)
    padded: bool = False

    @property
    def planes(self) -> bool:
        """Whether the picture's channels are planes."""
        return self.anchor in CONVOLUTIONS and self.channels == 1 and self.depth > prod(self.kernel)

    @property
    def copied(self) -> bool:
        """Whether operands can be copied 16 bytes at a time as they are."""
        together = 16 if self.weight_dtype == "int8" else 8
        return self.data_dtype == self.weight_dtype and self.channels % together == 0

    def position(self, row) -> tuple[Any, Any, Any]:
        """Picture, and row and column of the input at the kernel's first position, of a row of the product."""
        area = self.out_size[0] * self.out_size[1]
        place = row % area
        y = place // self.out_size[1] * self.strides[0] - self.pads[0]
        return row // area, y, place % self.out_size[1] * self.strides[1] - self.pads[1]

    def element(self, position, k) -> tuple[tuple[Any, ...], list[Any]]:
        """Indices of A[m, k] in a convolution's input, and the conditions under which it is there; else it is zero.

        `position` is that of m.
        """
        picture, y, x = position
        k_w = self.kernel[1]
        taps = prod(self.kernel)
        channel, tap = (k // taps, k % taps) if self.planes else (k % self.channels, k // self.channels)
        row, column = y + tap // k_w * self.dilations[0], x + tap % k_w * self.dilations[1]
        inside = [row >= 0, row < self.size[0], column >= 0, column < self.size[1]] if self.padded else []
        cell = row * self.size[1] + column
        return ((picture, channel, cell, 0) if self.planes else (picture, 0, cell, channel)), inside

    def transposed(self, weight: np.ndarray, columns: int, depth: int) -> np.ndarray:
        """The constant as the importer packed it -> (columns, depth) with k innermost, zeros beyond its own sizes."""
        if self.anchor == "packed_matmul":
            tiles, inner, block = weight.shape
            matrix = weight.transpose(0, 2, 1).reshape(tiles * block, inner)
        else:
            if self.anchor == "conv2d_int8":
                *lead, quads, wide = weight.shape
                weight = np.moveaxis(weight.reshape(*lead, quads, wide // QUAD, QUAD), -1, -2)
                weight = weight.reshape(*lead, quads * QUAD, wide // QUAD)
            blocks, in_blocks, k_h, k_w, lanes_in, lanes = weight.shape
            order = (0, 5, 1, 2, 3, 4) if self.planes else (0, 5, 2, 3, 1, 4)
            matrix = weight.transpose(order).reshape(blocks * lanes, in_blocks * k_h * k_w * lanes_in)
        whole = np.zeros((columns, depth), weight.dtype)
        whole[: matrix.shape[0], : matrix.shape[1]] = matrix
        return whole


def product_of(workload: Workload) -> Product | None:
    """The product that a function starts with; None where it is none, or has groups or several blocks of channels."""
    block = workload.anchor(*ANCHORS)
    if block is None:
        return None
    anchor, names = str(block.name_hint), list(workload.blocks)
    if set(names[: names.index(anchor)]) - {"pad"}:
        return None
    sources = [region.source for region in block.reads]
    if "pad" in workload.blocks:
        padding = workload.blocks["pad"]
        written, read = padding.writes[0].source, padding.reads[0].source
        sources = [read if source.same_as(written) else source for source in sources]
    params = list(workload.func.params)
    places = [next((i for i, p in enumerate(params) if p.same_as(source)), -1) for source in sources]
    if len(places) != 2 or min(places) < 0:
        return None
    data, weight = places
    shapes = [[int(d) for d in p.ty.shape] for p in params]
    dtypes = str(params[data].ty.dtype), str(params[weight].ty.dtype)
    if anchor == "packed_matmul":
        *lead, depth = shapes[data]
        if len(shapes[weight]) != 3 or shapes[weight][:2] != [1, depth]:
            return None
        return Product(anchor, prod(lead), shapes[weight][2], depth, depth, data, weight, *dtypes)
    if WINDOW not in block.annotations or len(shapes[data]) != 4 or len(shapes[weight]) != 6:
        return None
    batch, out_blocks, positions, lanes = extents(block)[:4]
    _, in_blocks, k_h, k_w, lanes_in, _ = shapes[weight]
    if anchor == "conv2d_int8":
        lanes_in *= QUAD
    height, width, out_h, out_w, s_h, s_w, top, left, d_h, d_w, groups = (int(x) for x in block.annotations[WINDOW])
    if out_blocks != 1 or groups != 1 or (in_blocks != 1 and lanes_in != 1) or shapes[data][1] != in_blocks:
        return None
    return Product(
        anchor, batch * positions, lanes, in_blocks * k_h * k_w * lanes_in, lanes_in, data, weight, *dtypes,
        (height, width), (out_h, out_w), (k_h, k_w), (s_h, s_w), (top, left), (d_h, d_w), "pad" in workload.blocks,
    )  # fmt: skip


def output_place(product: Product, row, column, shape: Sequence[int]) -> list[Any]:
    """Indices of C[row, column] in an output of this shape."""
    if product.anchor in CONVOLUTIONS:
        return [row // shape[2], row * 0, row % shape[2], column]
    *lead, _ = shape
    found: list[Any] = []
    for extent in reversed(lead):
        found.insert(0, row % extent)
        row = row // extent
    return [*found, column]
