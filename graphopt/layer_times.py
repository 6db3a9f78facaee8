"""Layer by layer: how long each layer takes in each compiled candidate, and how its weights are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.candidates import Candidate
from graphopt.graph import label
from graphopt.recovery import weight_bits
from graphopt.report import LayerRecord
from graphopt.runtime.kernel_times import KernelTime, kernel_times
from graphopt.verify import Feeds

LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits"})


def compiled(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that are compiled and may be timed."""
    return [c for c in candidates if c.record.engine == "tvm" and c.record.status == "measured"]


def time_kernels(
    candidates: Sequence[Candidate], sample: Feeds, threads: int, seconds: float
) -> dict[str, tuple[KernelTime, ...]]:
    """By candidate: each call of a kernel in a run, timed in turns for about `seconds`."""
    return kernel_times({c.name: c.path for c in candidates}, sample, threads, seconds)


def layer_records(
    candidates: Sequence[Candidate], times: Mapping[str, Sequence[KernelTime]]
) -> tuple[LayerRecord, ...]:
    """A record for each layer that has a kernel of its own in any candidate, in the first one's order."""
    inside = {c.name: precisions(c) for c in candidates}
    operators: dict[str, str] = {}
    for candidate in candidates:
        operators.update(_operators(candidate))
    found: dict[str, dict[str, float]] = {}
    for name, calls in times.items():
        for call in calls:
            if call.layer in operators:
                taken = found.setdefault(call.layer, {})
                taken[name] = taken.get(name, 0.0) + call.seconds
    return tuple(
        LayerRecord(layer, operators[layer], taken, {name: inside[name].get(layer, "") for name in taken})
        for layer, taken in found.items()
    )


def precisions(candidate: Candidate) -> dict[str, str]:
    """By layer, how its weights are stored: `int8` or `int4`, else as the candidate says."""
    assert candidate.variant is not None
    bits = weight_bits(candidate.variant.model)
    kept = candidate.record.precision
    return {layer: f"int{bits[layer]}" if layer in bits else kept for layer in _operators(candidate)}


def _operators(candidate: Candidate) -> dict[str, str]:
    assert candidate.variant is not None
    return {label(n): n.op_type for n in candidate.variant.model.graph if n.op_type in LAYER_OPERATORS}
