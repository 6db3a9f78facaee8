"""Which pass of a recipe, and which layer's setting in it, broke the accuracy or the speed: found by halves.

The shortest prefix of the pipeline that is bad ends with the pass that is to blame, as long as a pipeline that is bad
stays so when more passes follow. Within that pass the same search runs over its settings layer by layer: of what it was
told to take (`channels`, `ranks`, `blocks`), or of the layers that it quantizes, of which the first few are, and the
others are left float.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from graphopt import model as models
from graphopt.errors import DataError
from graphopt.measure import Contender, compare
from graphopt.passes.base import Context, Pass
from graphopt.pipeline import Observations, Pipeline
from graphopt.progress import SILENT, Progress
from graphopt.recovery import quantized_layers
from graphopt.variants import Judge
from graphopt.verify import Feeds


@dataclass(frozen=True)
class Finding:
    """What a test says of one model."""

    bad: bool
    told: str


class Test(Protocol):
    """What is looked for."""

    def __call__(self, model: ir.Model, file: Path) -> Finding: ...


@dataclass(frozen=True)
class Trial:
    """One model that was made and tested."""

    what: str
    finding: Finding

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "bad": self.finding.bad, "told": self.finding.told}


@dataclass(frozen=True)
class Bisection:
    """`guilty` is None where the whole pipeline is good, or the model is bad without any pass."""

    trials: tuple[Trial, ...]
    guilty: str | None
    position: int = 0
    """Of the guilty pass, from 1."""
    setting: str | None = None
    """The guilty layer's setting, where the pass has such and one of them makes the difference."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "graphopt.bisection",
            "guilty": self.guilty,
            "position": self.position,
            "setting": self.setting,
            "notes": list(self.notes),
            "trials": [trial.to_dict() for trial in self.trials],
        }


@dataclass
class _Run:
    """Makes models and keeps the trials."""

    source: ir.Model
    context: Context
    test: Test
    work: Path
    on_trial: Callable[[Trial], None]
    observations: Observations = field(default_factory=Observations)
    trials: list[Trial] = field(default_factory=list)

    def made(self, passes: Sequence[Pass]) -> ir.Model:
        return Pipeline(tuple(passes)).run(self.source, self.context, observations=self.observations)[0]

    def bad(self, what: str, passes: Sequence[Pass]) -> bool:
        file = self.work / "trial.onnx"
        model = self.made(passes)
        models.save(model, file)
        trial = Trial(what, self.test(model, file))
        self.trials.append(trial)
        self.on_trial(trial)
        return trial.finding.bad


def bisect(
    source: ir.Model,
    pipeline: Pipeline,
    context: Context,
    test: Test,
    *,
    layers: bool = True,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Bisection:
    """Find the pass, and with `layers` the setting, with which `test` turns bad. Raises what the passes raise."""
    with tempfile.TemporaryDirectory(prefix="graphopt-bisect-") as folder:
        run = _Run(source, context, test, Path(folder), on_trial)
        passes = pipeline.passes
        if not run.bad(f"all {len(passes)} passes", passes):
            fine = "nothing is broken: all passes together are within the bound"
            return Bisection(tuple(run.trials), None, notes=(fine,))
        if run.bad("no pass", ()):
            return Bisection(tuple(run.trials), None, notes=("the model that came in is outside the bound by itself",))
        position = first_bad(len(passes), lambda k: run.bad(f"the first {k}: up to {passes[k - 1].name}", passes[:k]))
        guilty = passes[position - 1]
        setting, notes = _blame(run, passes[: position - 1], guilty) if layers else (None, ())
        return Bisection(tuple(run.trials), str(guilty), position, setting, notes)


def first_bad(count: int, bad: Callable[[int], bool]) -> int:
    """The least k of 1 .. `count` with bad(k), where bad(0) is false and bad(`count`) true are known, and neither is
    asked again; log2(count) questions. Where `bad` is not monotone: some k with bad(k) and not bad(k - 1)."""
    good, known_bad = 0, count
    while known_bad - good > 1:
        middle = (good + known_bad) // 2
        if bad(middle):
            known_bad = middle
        else:
            good = middle
    return known_bad


def _blame(run: _Run, before: Sequence[Pass], guilty: Pass) -> tuple[str | None, tuple[str, ...]]:
    """The setting of `guilty` that makes the difference, and what else there is to say."""
    if guilty.takes and getattr(guilty, guilty.takes):
        option = guilty.takes
        items = tuple(getattr(guilty, option))

        def taking(k: int) -> bool:
            fewer = with_options(guilty, {option: items[:k]})
            return run.bad(f"{guilty.name} with the first {k} of {len(items)} {option}", (*before, fewer))

        if len(items) == 1:
            return f"{option}: {items[0]}", ()
        return f"{option}: {items[first_bad(len(items), taking) - 1]}", ()
    if not guilty.quantizes:
        return None, (f"{guilty.name} has no settings of single layers",)
    names = quantized_layers(run.made((*before, guilty)))
    own: tuple[str, ...] = tuple(getattr(guilty, "exclude", ()))

    def quantizing(k: int) -> bool:
        """The first k layers quantized, the others left float."""
        fewer = with_options(guilty, {"exclude": (*own, *names[k:])})
        return run.bad(f"{guilty.name} on the first {k} of {len(names)} layers", (*before, fewer))

    if not names:
        return None, (f"{guilty.name} quantizes no layer that has weights",)
    if quantizing(0):
        return None, (f"{guilty.name} is outside the bound with every layer left float too",)
    return f"layer {names[first_bad(len(names), quantizing) - 1]}", ()


def with_options(each: Pass, options: Mapping[str, Any]) -> Pass:
    """The same pass with other values of some options."""
    return dataclasses.replace(each, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]


def accuracy_test(judge: Judge) -> Test:
    """Bad: more accuracy is lost than the judge's bound allows. Raises DataError without evaluation data."""
    if judge.dataset is None:
        raise DataError("accuracy is measured on data", hint="give --eval DATA, or --calib with --calib-samples")

    def test(model: ir.Model, file: Path) -> Finding:
        found = judge.accuracy(file)
        assert found is not None
        drop = judge.drop(found)
        unit = "dB" if found.metric == "snr" else "%"
        return Finding(
            not judge.bound.met(drop, found.metric), f"{found.metric} {found.value:.2f} {unit}, {drop:.2f} lost"
        )

    return test


def speed_test(
    base: Path,
    feeds: Feeds,
    max_regression: float,
    threads: int,
    seconds: float,
    seed: int,
    progress: Progress = SILENT,
) -> Test:
    """Bad: slower than `base` in ONNX Runtime by more than the bound, by the rule of `compare`; a verdict that stays
    inconclusive counts as good, and says so."""

    def test(model: ir.Model, file: Path) -> Finding:
        found = compare(
            Contender.onnx(base, "input"),
            Contender.onnx(file, "trial"),
            feeds,
            max_regression=max_regression,
            threads=threads,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
        return Finding(found.verdict.value == "slower", f"{found.verdict.value}, {found.ratio} the time")

    return test
