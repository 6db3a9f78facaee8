"""The search: tables first, then whole models along paths of recipes, the best so far always at hand.

1. Tables: what each offer does to the outputs alone, and what layers cost with more or less arithmetic.
2. Paths: recipes from the plain pipeline down to a fraction of its cost, each the least noise for its cost: one of all
   passes together, and one of each pass alone, since noises of different kinds do not weigh the same.
3. Trials: whole models, made and evaluated. Along a path accuracy falls with cost, so a path is bisected for the
   cheapest recipe that keeps the bound, from where little noise is added.
4. The cheapest are compiled, and those whose kernels take less time than the plain pipeline's go into the race.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from graphopt.calibration import Dataset
from graphopt.candidates import Compiler
from graphopt.errors import GraphoptError
from graphopt.mixing import total
from graphopt.model import parameter_bytes
from graphopt.passes.base import Context, Pass
from graphopt.pipeline import Pipeline
from graphopt.plugins import offering_passes
from graphopt.recovery import weight_bits
from graphopt.report import OfferRecord, SearchRecord, TimedLayer, TrialRecord
from graphopt.runtime.kernel_times import kernel_times
from graphopt.search.choices import Choice, Selection, pipeline_of
from graphopt.search.clock import PARTS, Clock
from graphopt.search.latency_table import LatencyTable
from graphopt.search.layers import Amounts
from graphopt.search.ledger import Ledger
from graphopt.search.paths import Cost, Step, path
from graphopt.search.sensitivity import SAMPLES, Sensitivity
from graphopt.search.tables import Offers, Workbench, list_offers, time_layers, weigh
from graphopt.variants import Data, Judge, Source, Variant, make_lossy
from graphopt.verify import Reference

TIMES, TABLES = 0.35, 0.6
"""Of the time: when the latency table must be done, and when the sensitivity table."""
TRIALS = 0.85
"""Of the time: when the last trial must begin."""
RACING = 3
"""Recipes that are compiled at most."""
FIRST_NOISE = {"nats": 0.03, "energy": 0.01}
"""Noise added in the first recipe of a path that is tried: about what costs half a point, or leaves 20 dB."""
FITTED = 4
"""Calibration samples must be so many times SAMPLES for these to be kept from the fit: what was fitted to flatters."""
WORTH = 0.99
"""A recipe must take less than this of the plain pipeline's time: predicted, for its path to be tried, and measured, to
race against it."""
VERSIONS = 8
"""Among so many compiled models the tuning budget is shared."""


@dataclass
class Search:
    """One search. `exact` and `plain`: the variants that there are without it; `objective`: latency or size."""

    source: Source
    exact: Variant
    plain: Variant
    data: Data
    judge: Judge
    context: Context
    reference: Reference
    compiler: Compiler
    work: Path
    ledger: Ledger
    """Of this model, data and target; `times`: of any."""
    times: Ledger
    objective: str
    seconds: float
    _started: float = field(default_factory=time.perf_counter, init=False)
    _trials: dict[str, TrialRecord] = field(default_factory=dict, init=False)
    _made: dict[str, Variant] = field(default_factory=dict, init=False)

    def run(self) -> tuple[list[Variant], SearchRecord]:
        """Variants that keep the bound and cost less than `plain`, the cheapest first; and what was found out."""
        base = self._base()
        offering = [_in_one(each) for each in offering_passes()]
        fitted, watched = _apart(self._known_data, self.context.seed)
        context = replace(self.context, data=fitted)
        bench = Workbench(self.exact.model, context, self.compiler, self.ledger, self._at(TIMES))
        offers = list_offers(bench, offering)
        table = self._latency_table(bench, offering, offers, base)
        cost = self._bytes if table is None else table.predict
        whole = cost({})
        sensitivity = Sensitivity(self.exact.model, watched, self.source.signature)
        bench = replace(bench, deadline=self._at(TABLES))
        if table is not None:
            offers = {each: [o for o in made if not table.useless(each.name, o.nodes)] for each, made in offers.items()}
        choices = weigh(bench, offers, sensitivity, lambda choice: 1 - cost({choice.place: choice}) / whole)
        unit = "nats" if sensitivity.classes else "energy"
        complete = self._try_paths(choices, offering, base, cost, FIRST_NOISE[unit])
        best = self._cheapest(base, table is not None)
        record = SearchRecord(
            self.objective,
            unit,
            "bytes" if table is None else "seconds",
            whole,
            tuple(_offer_record(choice, cost, whole) for choice in choices),
            () if table is None else _timed_layers(table),
            tuple(sorted(self._trials.values(), key=lambda trial: trial.cost)),
            complete,
        )
        return best, record

    # -- tables ------------------------------------------------------------------------------------------------------

    def _base(self) -> Pipeline:
        """The lossy passes of the plain variant, with the layers that it returned to float."""
        whole = Pipeline.parse(self.plain.record.pipeline)
        return whole.split()[1]

    @property
    def _known_data(self):
        assert self.data.calibration is not None
        return self.data.calibration

    def _at(self, part: float) -> float:
        return self._started + part * self.seconds

    def _latency_table(
        self, bench: Workbench, offering: Sequence[Pass], offers: Offers, base: Pipeline
    ) -> LatencyTable | None:
        if self.objective == "size":
            return None
        share = self.compiler.settings.tune_seconds / VERSIONS
        clock = Clock(self.exact.model, base, self.context, self.compiler, self.times, share)
        table = time_layers(bench, offering, offers, clock)
        if table is None:
            self.context.progress.note("the plain pipeline cannot be compiled: bytes of parameters stand for time")
        return table

    def _bytes(self, selection: Selection) -> float:
        """Bytes of the parameters with these choices: those of float layers shrink as their weights' bits do."""
        before, least = self._amounts, min(self._bits.values(), default=32) / 32
        stored = {layer: self._bits.get(layer, 32) / 32 for layer in before}
        shares: dict[str, float] = dict.fromkeys(before, 1.0)
        new = 0.0
        for choice in selection.values():
            for layer, amount in choice.after.items():
                if layer not in before or not before[layer].bytes:
                    new += amount.bytes * least
                elif choice.quantizes:
                    stored[layer] = amount.bytes / before[layer].bytes
                else:
                    shares[layer] *= amount.bytes / before[layer].bytes
        return new + sum(before[layer].bytes * share * stored[layer] for layer, share in shares.items())

    @cached_property
    def _bits(self) -> dict[str, int]:
        return weight_bits(self.plain.model)

    @cached_property
    def _amounts(self) -> dict[str, Amounts]:
        return Workbench(self.exact.model, self.context, self.compiler, self.ledger, 0.0).amounts(self.exact.model)

    # -- trials ------------------------------------------------------------------------------------------------------

    def _try_paths(
        self, choices: Sequence[Choice], offering: Sequence[Pass], base: Pipeline, cost: Cost, first: float
    ) -> bool:
        """Bisect the path of all choices, then those of each pass alone; False when time ran out."""
        names = sorted({choice.pass_name for choice in choices})
        groups = [set(names), *({name} for name in names if len(names) > 1)]
        for group in groups:
            steps = path([choice for choice in choices if choice.pass_name in group], cost)
            if steps[-1].cost > WORTH * steps[0].cost:
                continue
            self.context.progress.note(
                f"{', '.join(sorted(group))}: {len(steps)} recipes, "
                f"down to {steps[-1].cost / steps[0].cost:.3f} of the cost"
            )
            best = self._best_cost()
            for step in _bisect([steps[0], *(step for step in steps[1:] if step.cost < best)], self._held, first):
                if not self._try(step, pipeline_of(step.selection, offering, base)):
                    return False
        return True

    def _held(self, step: Step) -> bool:
        trial = next((t for t in self._trials.values() if t.cost == step.cost and t.noise == step.noise), None)
        return trial is not None and trial.within_bound

    def _best_cost(self) -> float:
        return min((trial.cost for trial in self._trials.values() if trial.within_bound), default=math.inf)

    def _try(self, step: Step, pipeline: Pipeline) -> bool:
        """Make and evaluate a recipe, or remember what came of it; False where there is no time left for it."""
        key = str(pipeline)
        known = self.ledger.find("trial", f"{self.judge.bound} {key}")
        if known is None:
            if time.perf_counter() > self._at(TRIALS):
                return False
            try:
                variant = self._variant(pipeline)
            except GraphoptError as error:
                self.context.progress.note(f"a recipe failed: {error}")
                self._trials[key] = TrialRecord(key, step.cost, step.noise, None, None, False)
                return True
            record = variant.record
            known = {"drop": record.drop, "accuracy": record.accuracy, "within": record.within_bound}
            self.ledger.add("trial", f"{self.judge.bound} {key}", known)
        self._trials[key] = TrialRecord(key, step.cost, step.noise, known["drop"], known["accuracy"], known["within"])
        lost = "" if known["drop"] is None else f", {known['drop']:.2f} points lost"
        self.context.progress.note(f"recipe at {step.cost:.4g}, noise {step.noise:.3g}{lost}")
        return True

    def _variant(self, pipeline: Pipeline) -> Variant:
        key = str(pipeline)
        if key not in self._made:
            name = f"auto-{len(self._made) + 1}"
            self._made[key] = make_lossy(
                self.exact, pipeline, name, self.data, self.judge, self.context, self.reference, self.work
            )
        return self._made[key]

    # -- the best ----------------------------------------------------------------------------------------------------

    def _cheapest(self, base: Pipeline, timed: bool) -> list[Variant]:
        """The cheapest recipes within the bound, compiled and compared with the plain pipeline where time counts."""
        held = sorted((trial for trial in self._trials.values() if trial.within_bound), key=lambda trial: trial.cost)
        best: list[tuple[float, Variant]] = []
        for trial in [t for t in held if t.pipeline != str(base)][:RACING]:
            variant = self._variant(Pipeline.parse(trial.pipeline))
            if not timed:
                best.append((parameter_bytes(variant.model), variant))
                continue
            ratio = self._ratio(variant)
            if ratio is not None:
                self._trials[trial.pipeline] = replace(trial, measured=ratio)
                if ratio < WORTH:
                    best.append((ratio, variant))
        return [variant for _, variant in sorted(best, key=lambda entry: entry[0])]

    def _ratio(self, variant: Variant) -> float | None:
        """Seconds of its kernels over the plain variant's, in turns; None where either is not compiled."""
        settings = self.compiler.settings
        share = settings.tune_seconds / VERSIONS
        pair = [self.compiler.compile(each, "float32", share) for each in (self.plain, variant)]
        if any(each.record.status != "measured" for each in pair):
            return None
        taken = kernel_times(
            {"plain": pair[0].path, "this": pair[1].path},
            self.data.samples[0],
            settings.threads or 1,
            settings.measure_seconds / PARTS,
        )
        return total(taken["this"]) / total(taken["plain"])


def _apart(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """What offers are fitted to, and other samples to see their effect on; all for both where there are few."""
    if len(data) < FITTED * SAMPLES:
        return data, data.draw(min(SAMPLES, len(data)), seed)[0]
    watched, fitted = data.draw(SAMPLES, seed)
    return fitted, watched


def _in_one(each: Pass) -> Pass:
    """The pass without steps of its own: layers are solved again behind all passes, in as many steps as there are."""
    return replace(each, portions=1) if hasattr(each, "portions") else each  # pyright: ignore[reportCallIssue,reportArgumentType]


def _bisect(steps: Sequence[Step], held: Callable[[Step], bool], noise: float) -> Iterator[Step]:
    """Steps to try, each chosen by how those before it went (`held` says): the last that holds is among them."""
    low, high = 0, len(steps)  # holds, fails
    first = next((i for i, step in enumerate(steps) if step.noise >= noise), len(steps) - 1)
    at = max(1, min(first, len(steps) - 1))
    while high - low > 1:
        yield steps[at]
        low, high = (at, high) if held(steps[at]) else (low, at)
        at = (low + high) // 2


def _offer_record(choice: Choice, cost: Cost, whole: float) -> OfferRecord:
    share = cost({choice.place: choice}) / whole
    return OfferRecord(choice.pass_name, choice.value, share, choice.noise, choice.agreement)


def _timed_layers(table: LatencyTable) -> tuple[TimedLayer, ...]:
    points: dict[str, list[tuple[str, float, float]]] = {}
    for (name, layer), known in table.points.items():
        points.setdefault(layer, []).extend((name, macs, seconds) for macs, seconds in sorted(known.items()))
    names = [*table.seconds, *(layer for layer in points if layer not in table.seconds)]
    return tuple(
        TimedLayer(name, table.macs.get(name, 0.0), table.seconds.get(name, 0.0), tuple(points.get(name, ())))
        for name in names
    )
