"""Groups of a convolution that are narrower than a block of channels, made as wide as one."""

from __future__ import annotations

import numpy as np


def merge_groups(kernel: np.ndarray, groups: int, lanes_in: int, lanes_out: int) -> tuple[np.ndarray, int]:
    """Neighbouring groups as one whose channels fill whole blocks, with zeros where channels do not meet.

    (M, C / groups, kH, kW) -> (M', C' / fewer, kH, kW) and `fewer`, with M' and C' up to the end of the last block.
    Groups of 4 channels in blocks of 16 do four times the arithmetic, a vector at a time. Where no number of groups
    fills whole blocks, all become one.
    """
    outs, ins = kernel.shape[0] // groups, kernel.shape[1]

    def fits(merged: int) -> bool:
        """Merged groups are whole blocks, and end with the last block of the images."""
        return all(
            merged * each % lanes == 0 and -(-groups // merged) * merged * each == -(-groups * each // lanes) * lanes
            for each, lanes in ((outs, lanes_out), (ins, lanes_in))
        )

    merged = next((m for m in range(1, groups) if fits(m)), groups)
    if merged == 1:
        return kernel, groups
    fewer = -(-groups // merged)
    split = np.zeros((fewer * merged, outs, ins, *kernel.shape[2:]), kernel.dtype)
    split[:groups] = kernel.reshape(groups, outs, ins, *kernel.shape[2:])
    split = split.reshape(fewer, merged, outs, ins, *kernel.shape[2:])
    wide = np.zeros((fewer, merged, outs, merged, ins, *kernel.shape[2:]), kernel.dtype)
    for i in range(merged):
        wide[:, i, :, i] = split[:, i]
    return wide.reshape(fewer * merged * outs, merged * ins, *kernel.shape[2:]), fewer
