"""Mixed precision by measurement: a layer stays quantized only where that makes the whole model faster.

The quantized candidate and the float ones run in turns, every kernel timed where it lies in the model. Layers whose
kernel is slower quantized are left float in one more variant, and that is compiled. What conversions at the borders
cost shows in it: their time is shared out among the layers that were left float, and those that gain less than their
share go back to integers, for ROUNDS libraries at most. The fastest of them then races against all others, if its
kernels take less time than the quantized candidate's: this stage proposes, the gate decides.

Layers left float run in what the float candidate stores: float32, or 16 bits with `--precision bf16` or `fp16`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.candidates import Candidate, Compiler
from graphopt.layer_times import compiled, layer_records, precisions, time_kernels
from graphopt.passes.base import Fidelity
from graphopt.report import LayerRecord
from graphopt.runtime.kernel_times import KernelTime

ROUNDS = 3
"""Libraries built at most for each float precision."""
FASTER = 0.97
"""A float kernel must take less than this of the quantized one's time to be tried: clocks and borders cost too."""
PARTS = 5
"""Kernels are timed for this part of `--measure-seconds` each time."""
WORTH = 0.99
"""A mixed library must take less than this of the quantized one's time to race against it."""


@dataclass(frozen=True)
class _Trial:
    candidate: Candidate
    ratio: float
    """Seconds of its kernels over those of the quantized candidate's, timed in turns."""


def mix(candidates: Sequence[Candidate], compiler: Compiler) -> tuple[list[Candidate], tuple[LayerRecord, ...]]:
    """`candidates` and those of mixed precision that are worth a race, with the times of all layers in each."""
    built = compiled(candidates) if compiler.target.times_kernels else []
    if not built:
        return list(candidates), ()
    clock = _Clock(compiler)
    times = clock.time(*built)
    quantized = next((c for c in built if c.variant is not None and c.variant.with_float is not None), None)
    found: list[Candidate] = []
    if quantized is not None:
        spent = sum(c.record.tuning["seconds"] for c in built if c.record.tuning is not None)
        for rival in built:
            if rival.variant is not None and rival.variant.fidelity is not Fidelity.LOSSY:
                left = max(compiler.settings.tune_seconds - spent, 0.0)
                mixed = _best(quantized, rival, times, compiler, clock, left / ROUNDS)
                found += [] if mixed is None else [mixed]
    if found:
        built += found
        times = clock.time(*built)
    return [*candidates, *found], layer_records(built, times)


@dataclass(frozen=True)
class _Clock:
    compiler: Compiler

    def time(self, *candidates: Candidate) -> dict[str, tuple[KernelTime, ...]]:
        settings = self.compiler.settings
        return time_kernels(
            candidates, self.compiler.data.samples[0], settings.threads or 1, settings.measure_seconds / PARTS
        )


def _best(
    quantized: Candidate,
    rival: Candidate,
    times: Mapping[str, Sequence[KernelTime]],
    compiler: Compiler,
    clock: _Clock,
    tune_seconds: float,
) -> Candidate | None:
    """The quantized candidate with the layers in float that are faster so, or None where that makes nothing faster."""
    assert quantized.variant is not None and quantized.variant.with_float is not None
    precision = rival.record.precision
    integer = [layer for layer, kind in precisions(quantized).items() if kind.startswith("int")]
    before, in_float = by_layer(times[quantized.name]), by_layer(times[rival.name])
    floats = tuple(x for x in integer if x in before and in_float.get(x, before[x]) < FASTER * before[x])
    best: _Trial | None = None
    for _ in range(ROUNDS):
        if not floats:
            break
        variant = quantized.variant.with_float(floats, "mixed" if precision == "float32" else f"mixed-{precision}")
        candidate = compiler.compile(variant, precision, tune_seconds) if variant.record.within_bound else None
        if candidate is None or candidate.record.status != "measured":
            break
        timed = clock.time(quantized, candidate)
        old, new = timed[quantized.name], timed[candidate.name]
        trial = _Trial(candidate, total(new) / total(old))
        compiler.progress.note(
            f"{len(floats)} of {len(integer)} layers in {precision}: {trial.ratio:.3f} of the time quantized"
        )
        if best is None or trial.ratio < best.ratio:
            best = trial
        kept = gaining(floats, old, new)
        if kept == floats:
            break
        floats = kept
    return best.candidate if best is not None and best.ratio < WORTH else None


def gaining(floats: Sequence[str], before: Sequence[KernelTime], after: Sequence[KernelTime]) -> tuple[str, ...]:
    """Those of `floats` that gained more than their share of what the kernels of no layer in `floats` lost."""
    old, new = by_layer(before), by_layer(after)
    gains = {layer: old.get(layer, 0.0) - new.get(layer, 0.0) for layer in floats}
    borders = total(after) - total(before) + sum(gains.values())
    share = max(borders, 0.0) / len(floats)
    return tuple(layer for layer in floats if gains[layer] > share)


def by_layer(calls: Sequence[KernelTime]) -> dict[str, float]:
    """Seconds by layer."""
    found: dict[str, float] = {}
    for call in calls:
        if call.layer:
            found[call.layer] = found.get(call.layer, 0.0) + call.seconds
    return found


def total(calls: Sequence[KernelTime]) -> float:
    """Seconds of all kernels."""
    return sum(call.seconds for call in calls)
