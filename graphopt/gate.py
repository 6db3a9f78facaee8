"""The measured-gain gate: candidates are compared in one run with the input model, or where that does not run, with the
exact variant; the best is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from graphopt.candidates import Candidate, baseline
from graphopt.errors import TargetError
from graphopt.measure import Counts, PairedResult
from graphopt.places import Place
from graphopt.progress import Progress
from graphopt.report import CandidateRecord, Choice
from graphopt.verify import Feeds

TIE = 1.02
"""Candidates within 2 % of the fastest count as equally fast; smaller then wins. It also keeps the choice, and so
`model.onnx`, the same from run to run where speed does not decide."""
LEVEL = 1.01
"""A median within 1 % of the input model's is as fast as it: processes of one program differ by more."""


def compare_candidates(
    candidates: Sequence[Candidate],
    place: Place,
    feeds: Sequence[Feeds],
    threads: int,
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[list[Candidate], PairedResult | Counts]:
    """Race all measurable candidates, a session for each of `feeds`; figures and speed-up are filled in.

    Raises TargetError where there is nothing to compare with, MeasurementError where that cannot be measured.
    """
    reference = next(c.record for c in candidates if c.name == baseline(place))
    if reference.status != "measured":
        hint = None if place.is_here else "only on this machine could ONNX Runtime take over what TVM lacks"
        what = f"nothing can be delivered: {reference.name} is {reference.status}: {reference.reason}"
        raise TargetError(what, hint=hint)
    racing = [c.contender for c in candidates if c.record.status == "measured"]
    result = place.race(racing, feeds, threads=threads, seconds=seconds, seed=seed, progress=progress)
    compared = []
    for candidate in candidates:
        record = candidate.record
        if record.status == "measured" and record.name in result.failed:
            record = dataclasses.replace(record, status="unavailable", reason=result.failed[record.name])
        elif record.status == "measured":
            ratio = result.ratio(reference.name, record.name)
            figures = _figures(record.name, result)
            record = dataclasses.replace(record, **figures, speedup=(ratio.median, ratio.low, ratio.high))
        compared.append(dataclasses.replace(candidate, record=record))
    return compared, result


def _figures(name: str, result: PairedResult | Counts) -> dict[str, Any]:
    if isinstance(result, Counts):
        return {"instructions": result.totals[name], "kernel_instructions": result.by_kernel[name]}
    return {"latency": result.stats[name].to_dict()}


def choose(
    candidates: Sequence[Candidate], result: PairedResult | Counts, reference: str, by_size: bool = False
) -> list[Candidate]:
    """Deliverable candidates, best first: by the session in which they did worst against the `reference` candidate.

    Latency may depend on the values fed (some kernels branch on them): who wins on one sample and loses on another
    has not won. Never one that is slower than the reference over all sessions, or clearly in any. Among those as
    fast as the fastest (see TIE; counts are exact and tie when equal) the smaller comes first, float32 before
    bf16 and fp16, and one engine before two. With `by_size` the one that takes the fewest bytes to run comes first
    (its compiled library, or its model file), and of these the fastest.
    """
    compared = [c for c in candidates if c.record.speedup is not None]
    tie, level = (1.0, 1.0) if isinstance(result, Counts) else (TIE, LEVEL)

    def worst(candidate: Candidate) -> float:
        return max(r.median for r in result.session_ratios(candidate.name, reference))

    def deliverable(candidate: Candidate) -> bool:
        sessions = result.session_ratios(candidate.name, reference)
        return result.ratio(candidate.name, reference).median <= level and all(r.low <= tie for r in sessions)

    able = sorted((c for c in compared if c.name != reference and deliverable(c)), key=worst)
    last = [c for c in compared if c.name == reference]
    if last and last[0].variant is not None:  # compiled like the others
        able, last = sorted([*able, *last], key=worst), []
    if by_size:
        able.sort(key=lambda c: c.record.size_bytes)
        return able + last
    fastest = min([1.0, *map(worst, able)])
    tied = [c for c in able if worst(c) <= tie * fastest]
    tied.sort(key=_delivered_bytes)
    return tied + [c for c in able if c not in tied] + last


def explain(candidate: Candidate, place: Place) -> Choice:
    """Say in words why this one is delivered."""
    record = candidate.record
    if not place.runs:
        why = f"the last that was asked for; nothing was run or timed on {place.label}"
    elif record.speedup is None:
        why = "only candidate"
    elif candidate.variant is None:
        why = "nothing measured faster than the model that came in, so it is delivered as it is"
    elif place.unit == "instructions":
        why = _counted(record, place)
    elif record.name == baseline(place):
        why = f"nothing measured faster on {place.label} than the exact variant, compiled"
    else:
        middle, low, high = record.speedup
        against = "the input model in ONNX Runtime" if place.is_here else "the exact variant, compiled"
        gain = f"{middle:.2f}x the speed of {against} [{low:.2f}, {high:.2f}]"
        if record.precision != "float32":
            gain = f"{gain}, in {record.precision}"
        why = gain if low > 1 else f"{gain}: neither measurably faster nor slower"
    return Choice(record.name, record.variant, record.engine, why)


def _counted(record: CandidateRecord, place: Place) -> str:
    assert record.instructions is not None and record.speedup is not None
    what = f"{record.instructions / 1e6:.1f} million instructions an inference on {place.label}"
    if record.name == baseline(place):
        return f"{what}, no candidate takes fewer; it was never timed on a device"
    return f"{what}, {1 / record.speedup[0]:.2f}x those of the exact variant; it was never timed on a device"


def _delivered_bytes(candidate: Candidate) -> tuple[int, bool, bool, str]:
    model = candidate.variant.record.parameter_bytes if candidate.variant is not None else 0
    engine = candidate.record.engine
    return model, candidate.record.precision != "float32", engine == "hybrid", engine
