"""Times of a model's layers on the target, after quantization, each version against the same unchanged one."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphopt.candidates import Compiler, specialise
from graphopt.errors import PassError, TargetError
from graphopt.measure import environment
from graphopt.model import digest
from graphopt.passes.base import Context, Pass
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.pipeline import Pipeline
from graphopt.runtime.kernel_times import KernelTime, kernel_times
from graphopt.search.layers import labels, origin
from graphopt.search.ledger import Ledger

FEW_SAMPLES = 8
"""Calibrate the ranges of a model that is only timed."""
PARTS = 5
"""Kernels are timed for this part of `--measure-seconds` each time."""
Seconds = Mapping[str, float]


@dataclass
class Clock:
    """Compiles versions of `exact`, quantized by `base` on a few samples, and times their layers.

    `times`: a ledger that other searches may share. `tune_seconds`: the schedule search of each version.
    """

    exact: ir.Model
    base: Pipeline
    context: Context
    compiler: Compiler
    times: Ledger
    tune_seconds: float
    _first: Path | None = field(default=None, init=False)

    def time(self, model: ir.Model) -> Seconds | None:
        """Seconds by layer of `exact`, with '' for all kernels of no layer; None where it cannot be compiled.

        Clocks drift: all are as if measured while the unchanged model took as long as the first time.
        """
        key = self._key(model)
        known = self.times.find("layers", key)
        if known is not None:
            return known
        first = self.times.find("layers", self._key(self.exact))
        try:
            self._first = self._first or self._built(self.exact)
            folder = self._first if model is self.exact else self._built(model)
        except (TargetError, PassError) as error:
            self.context.progress.note(f"a version that is only timed: {error}")
            return None
        found = self._timed({"first": self._first, "this": folder})
        seconds = self._by_layer(found["this"])
        if first is not None:
            drift = sum(first.values()) / sum(call.seconds for call in found["first"])
            seconds = {layer: drift * each for layer, each in seconds.items()}
        self.times.add("layers", key, seconds)
        return seconds

    def _timed(self, folders: Mapping[str, Path]) -> dict[str, tuple[KernelTime, ...]]:
        settings = self.compiler.settings
        return kernel_times(
            folders, self.compiler.data.samples[0], settings.threads or 1, settings.measure_seconds / PARTS
        )

    def _built(self, model: ir.Model) -> Path:
        data = self.context.data
        few = None if data is None else data.draw(min(FEW_SAMPLES, len(data)), self.context.seed)[0]
        renamed = labels(self.exact) - labels(model)
        quick = Pipeline(tuple(_quick(each, renamed) for each in self.base.passes))
        quantized, _ = quick.run(model, dataclasses.replace(self.context, data=few))
        folder = Path(tempfile.mkdtemp(prefix="timed-", dir=self.compiler.work))
        self.compiler.build(specialise(quantized, self.compiler.data.samples[0]), folder, "float32", self.tune_seconds)
        return folder

    def _by_layer(self, calls: Sequence[KernelTime]) -> dict[str, float]:
        originals = labels(self.exact)
        found: dict[str, float] = {}
        for call in calls:
            layer = origin(call.layer, originals) or ""
            found[layer] = found.get(layer, 0.0) + call.seconds
        return found

    def _key(self, model: ir.Model) -> str:
        settings = self.compiler.settings
        here = environment(settings.threads or 1)
        parts = (
            digest(model), str(self.base), settings.target, str(settings.threads), str(here.machine["cpu"]),
            str(here.machine["features"]), str(here.versions),
            *(f"{name}:{array.shape}" for name, array in self.compiler.data.samples[0].items()),
        )  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _quick(each: Pass, missing: frozenset[str]) -> Pass:
    """The pass without what matters to accuracy alone, and without the names of layers that are not there."""
    if isinstance(each, QuantizeInt8):
        kept = tuple(name for name in each.exclude if name not in missing)
        return dataclasses.replace(each, rounding="nearest", exclude=kept)
    return each
