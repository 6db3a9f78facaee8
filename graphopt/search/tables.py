"""What a search knows before it evaluates whole models: the offers, their effects, and what layers cost.

Everything that was measured goes to a ledger, so that an interrupted search goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.candidates import Compiler, specialise
from graphopt.errors import ModelError, PassError
from graphopt.passes.base import Context, Offer, Pass
from graphopt.search.choices import Choice
from graphopt.search.clock import Clock
from graphopt.search.latency_table import LatencyTable
from graphopt.search.layers import Amounts, amounts, differing, labels
from graphopt.search.ledger import Ledger
from graphopt.search.sensitivity import Sensitivity

LEVELS = (0.5, 1.0)
"""At which parts of each site's list of offers whole models are timed."""
GAIN = 0.99
"""Layers that a pass only stores otherwise must together take less than this of the whole time for that to be true."""
WORTH = 0.001
"""An offer must be predicted to save this share of the whole cost for its effect to be measured."""


@dataclass(frozen=True)
class Workbench:
    """The model and everything that measures. `exact` has the passes before the first lossy one behind it."""

    exact: ir.Model
    context: Context
    compiler: Compiler
    ledger: Ledger
    deadline: float
    """`time.perf_counter()` at which tables must be done."""

    @property
    def sample(self):
        return self.compiler.data.samples[0]

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    def amounts(self, model: ir.Model) -> dict[str, Amounts]:
        """By layer of `exact`."""
        return amounts(specialise(model, self.sample), labels(self.exact))


Offers = Mapping[Pass, Sequence[Offer]]


def list_offers(bench: Workbench, offering: Sequence[Pass]) -> dict[Pass, list[Offer]]:
    """By pass. A pass that cannot make offers for this model is noted and left out."""
    found: dict[Pass, list[Offer]] = {}
    for each in offering:
        try:
            found[each] = list(each.offers(bench.exact, bench.context))
        except (PassError, ModelError) as error:
            bench.context.progress.note(f"{each.name} makes no offers: {error}")
    return found


def time_layers(bench: Workbench, offering: Sequence[Pass], offers: Offers, clock: Clock) -> LatencyTable | None:
    """Times of the unchanged model's layers and, for each pass, of versions in which it has taken offers everywhere.

    None where the unchanged model cannot be compiled. Passes that the deadline leaves no time for are left out.
    """
    before = bench.amounts(bench.exact)
    base = clock.time(bench.exact)
    if base is None:
        return None
    table = LatencyTable(
        {n: a.macs for n, a in before.items()}, {n: s for n, s in base.items() if n}, base.get("", 0.0)
    )
    plans = [(each, level) for level in reversed(LEVELS) for each in offering if offers.get(each)]
    done: set[tuple[str, ...]] = set()
    with bench.context.progress.task("time layers", len(plans)) as advance:
        for each, level in plans:
            values = _at_level(offers[each], level)
            if not bench.late and values not in done:
                done.add(values)
                model = _structure(bench, each, values)
                seconds = None if model is None else clock.time(model)
                if model is not None and seconds is not None:
                    table.add(each.name, differing(before, bench.amounts(model)), seconds)
            advance(1)
    for each in offering:
        if each.quantizes and offers.get(each):
            _time_stored(bench, each, offers[each], clock, table)
    return table


def _time_stored(bench: Workbench, each: Pass, offers: Sequence[Offer], clock: Clock, table: LatencyTable) -> None:
    """Time again the layers that were faster as the pass stores them, now alone among the others as these are.

    Where all layers are stored one way nothing is converted between them. What is not faster as a whole is forgotten.
    """
    faster = [offer for offer in offers if not table.useless(each.name, offer.nodes)]
    model = _structure(bench, each, tuple(offer.value for offer in faster)) if faster and not bench.late else None
    seconds = None if model is None else clock.time(model)
    if seconds is not None and sum(seconds.values()) < GAIN * table.total:
        table.store(each.name, {node: seconds.get(node, 0.0) for offer in faster for node in offer.nodes})
    else:
        table.forget(each.name)


def weigh(
    bench: Workbench,
    offers: Offers,
    sensitivity: Sensitivity,
    saved: Callable[[Choice], float],
) -> list[Choice]:
    """Build each offer alone and measure what it does to the outputs, the mildest of every site first.

    Offers are left out that save less than WORTH by `saved`, the share of the whole cost that a choice alone saves,
    and those that the deadline leaves no time for.
    """
    before = bench.amounts(bench.exact)
    found: list[Choice] = []
    rounds = _rounds(offers)
    with bench.context.progress.task("measure sensitivity", len(rounds)) as advance:
        for each, offer in rounds:
            choice = _weighed(bench, each, offer, before, sensitivity, saved)
            found += [] if choice is None else [choice]
            advance(1)
    return found


def _weighed(
    bench: Workbench,
    each: Pass,
    offer: Offer,
    before: Mapping[str, Amounts],
    sensitivity: Sensitivity,
    saved: Callable[[Choice], float],
) -> Choice | None:
    key = f"{each.name} {offer.value}"
    known = bench.ledger.find("offer", key)
    if known is None:
        if bench.late:
            return None
        model = offer.build()
        after = differing(before, bench.amounts(model))
        choice = Choice(
            each.name, offer.site, offer.value, offer.nodes, after, math.inf, None, each.renames, each.quantizes
        )
        if saved(choice) >= WORTH:
            effect = sensitivity.of(model)
            choice = dataclasses.replace(choice, noise=effect.noise, agreement=effect.agreement)
        bench.ledger.add("offer", key, choice.to_dict())
    else:
        choice = Choice.from_dict(each, offer, known)
    return choice if math.isfinite(choice.noise) else None


def _rounds(offers: Offers) -> list[tuple[Pass, Offer]]:
    """All offers: first the mildest of each site, then the next of each."""
    numbered: list[tuple[int, Pass, Offer]] = []
    for each, made in offers.items():
        seen: dict[str, int] = {}
        for offer in made:
            seen[offer.site] = seen.get(offer.site, -1) + 1
            numbered.append((seen[offer.site], each, offer))
    return [(each, offer) for _, each, offer in sorted(numbered, key=lambda entry: entry[0])]


def _at_level(offers: Sequence[Offer], level: float) -> tuple[str, ...]:
    """For each site the value at this part of its offers."""
    sites: dict[str, list[str]] = {}
    for offer in offers:
        sites.setdefault(offer.site, []).append(offer.value)
    return tuple(values[round(level * (len(values) - 1))] for values in sites.values())


def _structure(bench: Workbench, each: Pass, values: tuple[str, ...]) -> ir.Model | None:
    """The model in which the pass has taken these offers, fitted to nothing."""
    taking = dataclasses.replace(each, **{each.takes: values})  # pyright: ignore[reportArgumentType]
    try:
        return taking.run(bench.exact.clone(), dataclasses.replace(bench.context, data=None)).model
    except (PassError, ModelError) as error:
        bench.context.progress.note(f"{each.name} everywhere: {error}")
        return None
