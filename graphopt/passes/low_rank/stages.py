"""The layers that a decomposition puts in the place of one: their sizes, their arithmetic, their product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rank = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """One group of a layer: weights (outputs, inputs, *kernel); `kernel` is empty for Gemm and MatMul."""

    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """Weights of one output channel."""
        return self.inputs * int(np.prod(self.kernel, dtype=int))


@dataclass(frozen=True)
class Stage:
    """One of the layers: weights (outputs, inputs, *kernel) with a kernel of 1 along all but `axes`.

    `axes`: the spatial axes along which it has the original's kernel, stride, dilation and padding. `depthwise`: one
    input a channel, so `inputs` is 1.
    """

    outputs: int
    inputs: int
    axes: tuple[int, ...] = ()
    depthwise: bool = False

    def shape(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """The shape of its weights for a layer with this kernel."""
        return (self.outputs, self.inputs, *(k if axis in self.axes else 1 for axis, k in enumerate(kernel)))


def macs(stages: Sequence[Stage], kernel: Sequence[int], resolution: Sequence[float]) -> float:
    """Multiply-accumulates for one position of the layer's output, of one group.

    `resolution`: input size over output size along each spatial axis; it drops to 1 where a stage strides.
    """
    left, total = list(resolution), 0.0
    for stage in stages:
        for axis in stage.axes:
            left[axis] = 1.0
        total += float(np.prod(stage.shape(kernel))) * float(np.prod(left))
    return total


def compose(stages: Sequence[Stage], weights: Sequence[np.ndarray]) -> np.ndarray:
    """The weights (outputs, inputs, *kernel) of the one layer that equals these layers behind one another."""
    whole = weights[0]
    for stage, own in zip(stages[1:], weights[1:], strict=True):
        rank = own.ndim - 2
        if stage.depthwise:
            whole = own * whole
            continue
        product = np.tensordot(own, whole, ([1], [0]))  # (outputs, *own kernel, inputs, *kernel so far)
        order = [0, 1 + rank, *(axis for pair in zip(range(1, 1 + rank), range(2 + rank, 2 + 2 * rank), strict=True)
                                for axis in pair)]  # fmt: skip
        kernel = [a * b for a, b in zip(own.shape[2:], whole.shape[2:], strict=True)]  # one of the two is 1
        whole = product.transpose(order).reshape(own.shape[0], whole.shape[1], *kernel)
    return whole


def balance(stages: Sequence[Stage], weights: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The same product with every inner channel scaled so that what makes it and what reads it have equal norms.

    Factors come out of a fit in any scale; later passes that round weights or values want them alike.
    """
    scaled = [each.copy() for each in weights]
    for index, stage in enumerate(stages[1:], 1):
        before, after = scaled[index - 1], scaled[index]
        reads = after.reshape(len(after), -1) if stage.depthwise else after.swapaxes(0, 1).reshape(after.shape[1], -1)
        makes = before.reshape(len(before), -1)
        norms = np.linalg.norm(makes, axis=1), np.linalg.norm(reads, axis=1)
        alive = (norms[0] > 0) & (norms[1] > 0)
        factor = np.sqrt(np.where(alive, norms[1], 1.0) / np.where(alive, norms[0], 1.0))
        trailing = (1,) * (before.ndim - 2)
        scaled[index - 1] = before * factor.reshape(-1, 1, *trailing)
        scaled[index] = after / factor.reshape((-1, 1, *trailing) if stage.depthwise else (1, -1, *trailing))
    return tuple(scaled)
