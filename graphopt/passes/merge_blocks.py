"""Replace residual blocks by one convolution each, fitted on calibration data.

Equation
    y = x + f(x)  ~  K * x + b,     (K, b) = argmin E |y - (K * z + b)|^2 + ridge |K - identity|^2
    K: 1x1 or 3x3, of stride 1, padded so that the size stays. z: the block's input in the model as it is by now, with
    earlier blocks merged; y: the block's output in the model as it was: later blocks make up for earlier errors. The
    strength of the ridge is inferred from the data (blocks/fit.py). What follows the Add stays: its activation, say.

Applies when
    an Add joins x with what is made from x and constants alone, by whatever operators, a Conv among them; x, f(x) and y
    are float32 of one shape (N, C, H, W), of which only N may be dynamic; nothing inside is read elsewhere.

Refuses when
    the shortcut is not x itself (a projection, a pooling); shapes differ or are not known; f reads other values, holds
    subgraphs or is an output of the model; the convolution has no less arithmetic than f, or more than 2304 taps; the
    block lies inside a larger one that is merged, or around one; a node inside is excluded.

Choice
    `blocks` says which, and each one's kernel. Without it, blocks are merged, or given the smaller kernel, one after
    the other, whichever loses the smallest share of its output's energy for the multiply-accumulates it saves, until
    `ratio` of the model's are saved.

Fidelity
    LOSSY.

Reference
    Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization", NeurIPS
    2025 (a linear layer, least squares on calibration data, in the place of residual blocks); Veit et al., "Residual
    Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016 (single blocks are hardly missed); Fu et
    al., "DepthShrinker", ICML 2022 (one dense convolution for an inverted residual block).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.errors import PassError
from graphopt.graph import label
from graphopt.passes.base import Context, Fidelity, Offer, Pass, PassResult, Skip
from graphopt.passes.blocks.choose import Choice, choose
from graphopt.passes.blocks.find import KERNELS, Block, find_blocks
from graphopt.passes.blocks.fit import Fit, unfitted
from graphopt.passes.blocks.observe import fit_blocks, kernels
from graphopt.passes.blocks.rewrite import SUFFIX, merge
from graphopt.passes.excluded import require_nodes


class MergeBlocks(Pass):
    """Residual blocks as single convolutions: less depth, less arithmetic."""

    fidelity = Fidelity.LOSSY
    takes: ClassVar[str] = "blocks"
    renames: ClassVar[bool] = True

    ratio: float = 0.1
    """Share of the model's multiply-accumulates to save, where `blocks` does not say what to merge."""
    blocks: tuple[str, ...] = ()
    """NODE:KERNEL, the label of a block's Add and 3 or 1, instead of `ratio`. Other blocks are left alone."""
    portions: int = 8
    """Blocks are fitted in so many steps, each making up for the error that those before it left."""
    exclude: tuple[str, ...] = ()
    """Names of nodes (of a nameless node: its first output), Adds or inside, whose blocks are left alone."""

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must be above 0 and below 1, not {self.ratio:g}")
        if self.portions < 1:
            raise ValueError(f"portions must be positive, not {self.portions}")
        self._asked()

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Merge. Raises PassError: there is neither calibration data nor `blocks`; `exclude` or `blocks` names no
        node; `blocks` names nested ones."""
        self._check(model, context)
        everything, _, total = find_blocks(model)
        allowed, skipped, _ = find_blocks(model, self.exclude)
        chosen, refused = self._chosen(model, everything, allowed, total, context)
        done: list[tuple[Block, Fit]] = []
        first = model.clone() if context.data is not None and self.portions > 1 else model
        for portion in _portions([block for block in allowed if block in chosen], self.portions):
            if context.data is None:
                fits = {(b.name, chosen[b]): unfitted(b.channels, chosen[b]) for b in portion}
            elif done:
                fits = fit_blocks(first, model, portion, context)
            else:
                # Of all blocks, whatever is chosen: what ONNX Runtime fuses depends on which values are watched.
                fits = fit_blocks(first, None, everything, context)
            for block in portion:
                done.append((block, fits[block.name, chosen[block]]))
                merge(model, block, done[-1][1])
        return PassResult(model, len(done), (*skipped, *refused), _notes(done, total, context))

    def offers(self, model: ir.Model, context: Context) -> Iterator[Offer]:
        """Two for each block, 3x3 and 1x1. Without calibration data the convolution changes nothing: K = identity."""
        self._check_names(model)
        everything, _, _ = find_blocks(model)
        for block in find_blocks(model, self.exclude)[0]:
            for kernel in kernels(block):
                value = f"{block.name}:{kernel}"
                yield Offer(block.name, value, block.layers, partial(_alone, model, everything, block, kernel, context))

    def _chosen(
        self, model: ir.Model, everything: list[Block], allowed: list[Block], total: float, context: Context
    ) -> tuple[Choice, list[Skip]]:
        if not self.blocks:
            if not allowed:
                return {}, []
            return choose(allowed, fit_blocks(model, None, everything, context), self.ratio * total), []
        chosen: Choice = {}
        refused: list[Skip] = []
        asked = self._asked()
        for block in allowed:
            if block.name not in asked:
                continue
            kernel = asked[block.name]
            if kernel not in kernels(block):
                refused.append(
                    Skip(block.name, f"a {kernel}x{kernel} convolution has no less arithmetic or is too large")
                )
                continue
            for other in chosen:
                if block.overlaps(other):
                    raise PassError(
                        f"{self.name}: of blocks {other.name!r} and {block.name!r} one lies inside the other",
                        hint="name one of them in blocks",
                    )
            chosen[block] = kernel
        return chosen, refused

    def _asked(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for text in self.blocks:
            node, _, kernel = text.rpartition(":")
            if not node or kernel not in map(str, KERNELS):
                raise ValueError(f"blocks: {text!r} is not NODE:3 or NODE:1")
            if node in found:
                raise ValueError(f"blocks names {node!r} twice")
            found[node] = int(kernel)
        return found

    def _check(self, model: ir.Model, context: Context) -> None:
        if context.data is None and not self.blocks:
            raise PassError(
                f"{self.name}: choosing and fitting blocks needs calibration data", hint="give --calib DATA"
            )
        self._check_names(model)

    def _check_names(self, model: ir.Model) -> None:
        names = [label(node) for node in model.graph]
        # A later pass may be told to leave a layer alone that this one makes: such a name is none of ours.
        made = {name for name in self.exclude if SUFFIX in name and name.rpartition(SUFFIX)[0] in names}
        require_nodes(model, [name for name in self.exclude if name not in made], self.name)
        require_nodes(model, tuple(self._asked()), self.name, "blocks")


def _alone(model: ir.Model, everything: list[Block], block: Block, kernel: int, context: Context) -> ir.Model:
    """The model with one block merged."""
    if context.data is None:
        found = unfitted(block.channels, kernel)
    else:
        found = fit_blocks(model, None, everything, context)[block.name, kernel]
    clone = model.clone()
    merge(clone, block, found)
    return clone


def _portions(blocks: list[Block], count: int) -> list[list[Block]]:
    """Runs of neighbours, in graph order."""
    bounds = np.linspace(0, len(blocks), min(count, len(blocks)) + 1).astype(int)
    return [blocks[a:b] for a, b in pairwise(bounds)]


def _notes(done: list[tuple[Block, Fit]], total: float, context: Context) -> tuple[str, ...]:
    if not done:
        return ()
    sizes = Counter(found.weights.shape[2] for _, found in done)
    listed = ", ".join(f"{count} by {kernel}x{kernel}" for kernel, count in sorted(sizes.items(), reverse=True))
    saved = sum(block.macs - block.merged_macs(found.weights.shape[2]) for block, found in done)
    notes = [f"{len(done)} blocks merged ({listed}); {100 * saved / total:.1f} % of the multiply-accumulates saved"]
    if context.data is None:
        return (*notes, "no calibration data: the convolutions are identities, the outputs are not those of the model")
    kept = 1 - max(found.lost for _, found in done)
    return (*notes, f"each block's output keeps {100 * kept:.1f} % of its energy or more, as far as the data tells")
