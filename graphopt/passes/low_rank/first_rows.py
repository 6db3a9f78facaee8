"""What layers multiplied in the model as it was, drawn from the data once, for all portions that are fitted one by one.

Each portion compares the model as it is by now with the model as it was; running the latter anew for every portion is
half of what fitting costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibration.observe import watch
from graphopt.passes.base import Context
from graphopt.passes.low_rank.inputs import Inputs, inputs_of, observe_inputs
from graphopt.passes.low_rank.problem import Problem
from graphopt.passes.paired_inputs import FLUSH_ROWS, PairedMoments
from graphopt.passes.quantization.moments import MAX_TAPS, POSITIONS, draws, patches

MOST_BYTES = 256 << 20
"""Of rows kept. Portions beyond it run the model as it was again."""


class FirstRows:
    """`portions` of the layers of `first`, the model as it was: observed along with what it becomes."""

    def __init__(self, first: ir.Model, portions: Sequence[Sequence[Problem]], context: Context):
        self.first, self.context = first, context
        self._known: dict[Problem, np.ndarray] | None = None
        self._kept: list[list[Problem]] = []
        left = MOST_BYTES
        for portion in portions:
            size = sum(self._bytes(problem) for problem in portion)
            if size <= left:
                self._kept.append(list(portion))
                left -= size

    def observe(self, second: ir.Model | None, portion: Sequence[Problem]) -> Iterator[tuple[Problem, Inputs]]:
        """As `observe_inputs` for one of the portions."""
        if list(portion) not in self._kept or (second is None and len(self._kept) == 1):
            yield from observe_inputs(self.first, second, portion, self.context)
            return
        if self._known is None:
            self._known = self._draw(self.first, self._kept)
        now = None if second is None else self._draw(second, [portion])
        for problem in portion:
            own = self._known.pop(problem)
            yield problem, inputs_of(_moments(own, None if now is None else now.pop(problem)))

    def _bytes(self, problem: Problem) -> int:
        assert self.context.data is not None
        return len(self.context.data) * POSITIONS * problem.groups * problem.shape.taps * 4

    def _draw(self, model: ir.Model, portions: Sequence[Sequence[Problem]]) -> dict[Problem, np.ndarray]:
        """float32 (groups, rows, taps) of each; those that `observe_inputs` draws."""
        assert self.context.data is not None
        rngs = {problem: draws(self.context.seed, problem.layer) for portion in portions for problem in portion}
        found: dict[Problem, list[np.ndarray]] = {problem: [] for problem in rngs}
        names = [str(problem.layer.input.name) for problem in rngs]
        label, progress = "observe layers' inputs", self.context.progress
        for values in watch(model, names, self.context.data, label=label, progress=progress, cut=True):
            for problem, name in zip(rngs, names, strict=True):
                rows = patches(problem.layer, values[name], rngs[problem])
                found[problem].append(rows.astype(np.float32, copy=False))
        return {problem: np.concatenate(found.pop(problem), axis=1) for problem in rngs}


def _moments(first: np.ndarray, second: np.ndarray | None) -> PairedMoments:
    """Of rows (groups, rows, taps) of both models; None: they are one."""
    now = first if second is None else second
    groups, rows, taps = first.shape
    means = [each.sum(axis=1, dtype=np.float64) / rows for each in (first, now)]
    if taps > MAX_TAPS:
        return PairedMoments(means[0], means[1], None, None, rows)
    squares, crossed = np.zeros((groups, taps, taps)), np.zeros((groups, taps, taps))
    for start in range(0, rows, FLUSH_ROWS):
        part = slice(start, start + FLUSH_ROWS)
        squares += now[:, part].transpose(0, 2, 1) @ now[:, part]
        if second is not None:
            crossed += first[:, part].transpose(0, 2, 1) @ now[:, part]
    covariance = squares / rows - means[1][:, :, None] * means[1][:, None, :]
    if second is None:
        return PairedMoments(means[0], means[1], covariance, None, rows)
    return PairedMoments(
        means[0], means[1], covariance, crossed / rows - means[0][:, :, None] * means[1][:, None, :], rows
    )
