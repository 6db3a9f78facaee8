"""What a block's convolution is fitted on: patches of x in the model as it is by now, and what they lack of y.

The rows are paired: z, a patch of x, and r = y - x at its middle, y the output that the block had in the model as it
was. A 3x3 patch holds the 1x1 patch, so one run serves both kernels.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.errors import DataError
from graphopt.model import digest
from graphopt.passes.base import Context
from graphopt.passes.blocks.find import KERNELS, Block
from graphopt.passes.blocks.fit import Fit, fit
from graphopt.passes.paired_inputs import PairedMoments, PairedSums, watch_pairs
from graphopt.passes.quantization.moments import MAX_TAPS, covariance_elements, in_parts, window_rows

Fits = dict[tuple[str, int], Fit]
"""By block name and kernel."""
_known: weakref.WeakKeyDictionary[Dataset, dict[tuple, Fits]] = weakref.WeakKeyDictionary()


def kernels(block: Block) -> tuple[int, ...]:
    """Kernels that make a block less arithmetic, and whose patches are not too large for a covariance."""
    return tuple(k for k in KERNELS if _taps(block, k) <= MAX_TAPS and block.merged_macs(k) < block.macs)


def fit_blocks(first: ir.Model, second: ir.Model | None, blocks: Sequence[Block], context: Context) -> Fits:
    """Every block's fits, for all its `kernels`; of x in `second` (None: in `first`) to y in `first`.

    Kept with the data: searches ask for the same again and again. Raises ModelError and DataError as
    `collect_statistics` does.
    """
    assert context.data is not None
    known = _known.setdefault(context.data, {})
    key = (digest(first), second and digest(second), context.seed, tuple(blocks))
    if key not in known:
        known[key] = {
            (block.name, kernel): fit(moments, block.channels, kernel)
            for block, moments in observe_blocks(first, second, blocks, context)
            for kernel in kernels(block)
        }
    return known[key]


def observe_blocks(
    first: ir.Model, second: ir.Model | None, blocks: Sequence[Block], context: Context
) -> Iterator[tuple[Block, PairedMoments]]:
    """Each block's moments: of r, (1, channels), and of patches of x, (1, channels * kernel^2).

    Places are drawn by the block's name, so they do not depend on which blocks are observed.
    """
    for part in in_parts(blocks, lambda block: covariance_elements(1, _taps(block, _window(block)))):
        sums = [_Sums(block, context.seed) for block in part]
        entries, outputs = [block.entry for block in part], [block.output for block in part]
        for own, others in watch_pairs(first, second, outputs, entries, context, "observe blocks"):
            for total in sums:
                total.add(own[total.block.output], others[total.block.entry])
        for block in part:
            moments = sums.pop(0).sums.moments()
            if not np.isfinite(moments.mean).all() or not np.isfinite(moments.first_mean).all():
                source = context.data.source if context.data is not None else "the data"
                raise DataError(f"the values of block {block.name!r} become NaN or infinite on {source}")
            yield block, moments


@dataclass
class _Sums:
    block: Block
    seed: int

    def __post_init__(self) -> None:
        self.window = _window(self.block)
        seed = (self.seed, zlib.crc32(self.block.name.encode()))
        self.first_rng, self.second_rng = np.random.default_rng(seed), np.random.default_rng(seed)
        self.sums = PairedSums(1, self.block.channels, _taps(self.block, self.window))

    def add(self, output: np.ndarray, entry: np.ndarray) -> None:
        lack = window_rows(output - entry, (1, 1), ((0, 0), (0, 0)), self.first_rng)
        around = (self.window // 2, self.window // 2)
        rows = window_rows(entry, (self.window, self.window), (around, around), self.second_rng)
        self.sums.add(lack[None], rows[None])


def _window(block: Block) -> int:
    """The largest kernel that is fitted."""
    return max(kernels(block), default=1)


def _taps(block: Block, kernel: int) -> int:
    return block.channels * kernel**2
