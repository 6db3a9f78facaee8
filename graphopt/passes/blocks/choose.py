"""Which blocks to merge: those that lose least for the arithmetic they save."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.passes.blocks.find import Block
from graphopt.passes.blocks.observe import Fits, kernels

Choice = dict[Block, int]
"""The kernel of each block to merge."""


def choose(blocks: Sequence[Block], fits: Fits, saving: float) -> Choice:
    """Kernels that together save at least so many multiply-accumulates of one sample, or all there are.

    One step after the other: a block is merged, or gets a smaller kernel, whichever loses least energy for what it
    saves. The energy of a block's output is one, whatever its size. Of nested blocks one is taken.
    """
    chosen: Choice = {}
    saved = 0.0
    while saved < saving:
        steps = []
        for index, block in enumerate(blocks):
            if any(block.overlaps(other) for other in chosen):
                continue
            have = chosen.get(block)
            cost = block.macs if have is None else block.merged_macs(have)
            lost = 0.0 if have is None else fits[block.name, have].lost
            for kernel in kernels(block):
                gain, more = cost - block.merged_macs(kernel), fits[block.name, kernel].lost - lost
                if gain > 0:
                    steps.append((more / gain, index, kernel, gain))
        if not steps:
            break
        _, index, kernel, gain = min(steps)
        chosen[blocks[index]] = kernel
        saved += gain
    return chosen
