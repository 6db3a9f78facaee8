"""Judging saved latencies: weaker than a comparison, since the two were not paired and nothing can be run again.

They are compared as they are only where the machine, its settings and the versions are the same. Asked to, figures of
two machines are divided by what the same small kernels took on each (`reference_kernels`); that a model's time scales
as theirs do is a guess, so the interval is widened by how far the kernels disagree, the result is labelled, and it
never fails a gate unless that is asked for too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from graphopt.errors import EnvironmentMismatchError, MeasurementError
from graphopt.measure.comparison import Comparison, check_bound
from graphopt.measure.paired import PairedResult
from graphopt.measure.stats import CONFIDENCE, Ratio, bootstrap_medians
from graphopt.measure.verdict import Verdict

FEWEST_ROUNDS = 8
"""The bootstrap of fewer bursts is too narrow to decide on."""
COMPARED_VERSIONS = ("tvm", "onnxruntime", "graphopt")


@dataclass(frozen=True)
class Leniency:
    """What may differ, and what follows from it."""

    any_versions: bool = False
    """The versions may be what is being compared."""
    normalise: bool = False
    """The machine may differ: divide by the reference kernels."""
    fail_normalised: bool = False
    """A normalised figure may fail the gate."""


STRICT = Leniency()


def compare_saved(
    base: PairedResult,
    new: PairedResult,
    *,
    max_regression: float = 0.05,
    base_name: str | None = None,
    new_name: str | None = None,
    leniency: Leniency = STRICT,
) -> Comparison:
    """Judge saved latencies.

    The names choose a contender of each; they may be left out where there is only one, or where both results have
    exactly one name in common. Raises EnvironmentMismatchError unless processor, cores, threads, governor, system and
    the versions of TVM, ONNX Runtime and graphopt are equal, or `leniency` allows for it; MeasurementError where there
    are no reference kernels to normalise by.
    """
    check_bound(max_regression)
    changed = _changed_versions(base, new)
    machine = base.environment.differences(new.environment)
    normalised = bool(machine) and leniency.normalise
    if (machine and not normalised) or (changed and not (normalised or leniency.any_versions)):
        raise EnvironmentMismatchError(
            f"the two were measured under different conditions ({'; '.join((*machine, *changed))})",
            hint="measure both on one machine: `graphopt compare BASE NEW` with the models themselves"
            + ("; or give --normalise" if machine else "; or give --any-versions"),
        )
    base_name, new_name = _choose(base, base_name, new), _choose(new, new_name, base)
    ratio = _ratio(base, base_name, new, new_name)
    notes = ["saved latencies are not paired: a machine that was busier for one of them looks like a difference"]
    if normalised:
        ratio, note = _normalised(ratio, base, new)
        notes += [note, f"measured under different conditions: {'; '.join(machine)}"]
    if changed:
        notes.append(f"versions differ: {', '.join(changed)}")
    verdict, reason = _judge(ratio, 1 + max_regression)
    if normalised and verdict is Verdict.SLOWER and not leniency.fail_normalised:
        verdict, reason = Verdict.INCONCLUSIVE, f"slower, but only NORMALISED figures say so: {reason}"
    return Comparison(verdict, reason, base_name, new_name, max_regression, ratio, None, (), (base, new), tuple(notes))


def _changed_versions(base: PairedResult, new: PairedResult) -> list[str]:
    ours, theirs = base.environment.versions, new.environment.versions
    return [f"{k} {ours.get(k)} -> {theirs.get(k)}" for k in COMPARED_VERSIONS if ours.get(k) != theirs.get(k)]


def _ratio(base: PairedResult, base_name: str, new: PairedResult, new_name: str) -> Ratio:
    draws = [
        bootstrap_medians(run.stats[name], np.random.default_rng(number))
        for number, (run, name) in enumerate(((base, base_name), (new, new_name)))
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(q) for q in np.quantile(draws[1] / draws[0], (tail, 1 - tail)))
    median = new.stats[new_name].median_s / base.stats[base_name].median_s
    return Ratio(median, low, high, min(base.rounds, new.rounds))


def _normalised(ratio: Ratio, base: PairedResult, new: PairedResult) -> tuple[Ratio, str]:
    """By the geometric mean of the kernels' ratios; the ends by their extremes."""
    scales = {k: new.reference[k] / base.reference[k] for k in base.reference if k in new.reference}
    if not scales:
        raise MeasurementError(
            "figures without reference kernels cannot be normalised", hint="save them again with `graphopt bench -o`"
        )
    middle = math.exp(float(np.mean(np.log(list(scales.values())))))
    told = ", ".join(f"{name} {scale:.3f}x" for name, scale in scales.items())
    narrowed = replace(
        ratio,
        median=ratio.median / middle,
        low=ratio.low / max(scales.values()),
        high=ratio.high / min(scales.values()),
    )
    return narrowed, f"NORMALISED by reference kernels, of which this machine takes: {told} the time"


def _judge(ratio: Ratio, bound: float) -> tuple[Verdict, str]:
    if ratio.rounds < FEWEST_ROUNDS:
        return Verdict.INCONCLUSIVE, f"only {ratio.rounds} rounds were saved: {FEWEST_ROUNDS} are needed"
    if ratio.low > bound:
        return Verdict.SLOWER, f"the whole interval lies above the bound {bound:.3f}x"
    if ratio.high > bound:
        return Verdict.INCONCLUSIVE, f"the interval straddles the bound {bound:.3f}x"
    if ratio.high < 1 and ratio.median < 1 / bound:
        return Verdict.FASTER, f"faster by more than the bound ({1 / bound:.3f}x), and significantly"
    return Verdict.SAME, f"the whole interval lies below the bound {bound:.3f}x"


def _choose(run: PairedResult, name: str | None, other: PairedResult) -> str:
    if name is not None:
        if name not in run.names:
            raise MeasurementError(f"no latencies of {name!r} were saved", hint=f"there are: {', '.join(run.names)}")
        return name
    if len(run.names) == 1:
        return run.names[0]
    common = [candidate for candidate in run.names if candidate in other.names]
    if len(common) == 1:
        return common[0]
    raise MeasurementError(
        f"saved latencies are of several contenders: {', '.join(run.names)}",
        hint="save each on its own (`graphopt bench MODEL -o FILE`)",
    )
