"""The measured-gain gate: candidates are timed against the input model in one paired run; the fastest is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from graphopt.candidates import INPUT, Candidate
from graphopt.measure import Contender, PairedResult, race_afresh
from graphopt.progress import Progress
from graphopt.report import Choice
from graphopt.verify import Feeds

TIE = 1.02
"""Candidates within 2 % of the fastest count as equally fast; smaller then wins. It also keeps the choice, and so
`model.onnx`, the same from run to run where speed does not decide."""
LEVEL = 1.01
"""A median within 1 % of the input model's is as fast as it: processes of one program differ by more."""


def time_candidates(
    candidates: Sequence[Candidate],
    feeds: Sequence[Feeds],
    threads: int,
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[list[Candidate], PairedResult]:
    """Race all measurable candidates, a session for each of `feeds`; latency and speed-up are filled in."""
    racing = [c for c in candidates if c.record.status == "measured"]
    contenders = [_contender(c) for c in racing]
    result = race_afresh(contenders, feeds, threads=threads, seconds=seconds, seed=seed, progress=progress)
    timed = []
    for candidate in candidates:
        record = candidate.record
        if record.status == "measured" and record.name in result.failed:
            record = dataclasses.replace(record, status="unavailable", reason=result.failed[record.name])
        elif record.status == "measured":
            stats = result.stats[record.name]
            ratio = result.ratio(INPUT, record.name)
            record = dataclasses.replace(record, latency=stats.to_dict(), speedup=(ratio.median, ratio.low, ratio.high))
        timed.append(dataclasses.replace(candidate, record=record))
    return timed, result


def choose(candidates: Sequence[Candidate], result: PairedResult, by_size: bool = False) -> list[Candidate]:
    """Deliverable candidates, best first: by the session in which they did worst against the input model.

    Latency may depend on the values fed (some kernels branch on them): who wins on one sample and loses on another
    has not won. Never one that is slower than the input model over all sessions, or clearly in any. Among those as
    fast as the fastest (see TIE) the smaller comes first, and float32 before bf16. With `by_size` the one that
    takes the fewest bytes to run comes first (its compiled library, or its model file), and of these the fastest.
    """
    timed = [c for c in candidates if c.record.latency is not None]

    def worst(candidate: Candidate) -> float:
        return max(r.median for r in result.session_ratios(candidate.name, INPUT))

    def deliverable(candidate: Candidate) -> bool:
        sessions = result.session_ratios(candidate.name, INPUT)
        return result.ratio(candidate.name, INPUT).median <= LEVEL and all(r.low <= TIE for r in sessions)

    able = sorted((c for c in timed if c.variant is not None and deliverable(c)), key=worst)
    if by_size:
        able.sort(key=lambda c: c.record.size_bytes)
        return able + [c for c in timed if c.variant is None]
    fastest = min([1.0, *map(worst, able)])
    tied = [c for c in able if worst(c) <= TIE * fastest]
    tied.sort(key=_delivered_bytes)
    return tied + [c for c in able if c not in tied] + [c for c in timed if c.variant is None]


def explain(candidate: Candidate) -> Choice:
    """Say in words why this one is delivered."""
    record = candidate.record
    if record.speedup is None:
        why = "only candidate"
    elif candidate.variant is None:
        why = "nothing measured faster than the model that came in, so it is delivered as it is"
    else:
        middle, low, high = record.speedup
        gain = f"{middle:.2f}x the speed of the input model in ONNX Runtime [{low:.2f}, {high:.2f}]"
        if record.precision != "float32":
            gain = f"{gain}, in {record.precision}"
        why = gain if low > 1 else f"{gain}: neither measurably faster nor slower"
    return Choice(record.name, record.variant, record.engine, why)


def _delivered_bytes(candidate: Candidate) -> tuple[int, bool, str]:
    model = candidate.variant.record.parameter_bytes if candidate.variant is not None else 0
    return model, candidate.record.precision != "float32", candidate.record.engine


def _contender(candidate: Candidate) -> Contender:
    path: Path = candidate.path
    if candidate.record.engine == "tvm":
        return Contender.compiled(path, candidate.name)
    return Contender.onnx(path, candidate.name)
