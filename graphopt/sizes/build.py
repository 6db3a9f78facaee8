"""The stage of `--sizes`: the variant that was chosen, compiled for each size, verified there, and compared with the
model that came in. A size for which nothing gets faster stays with ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt import model as models
from graphopt import samples
from graphopt.candidates import INPUT, Candidate, Compiler, verify
from graphopt.errors import SpecError, TargetError, VerificationError
from graphopt.gate import LEVEL, TIE
from graphopt.measure import Contender, PairedResult
from graphopt.report import SizeRecord
from graphopt.runtime.tvm_engine import DESCRIPTION
from graphopt.schedule_database import database_path
from graphopt.sizes.compiling import How, compile_sizes
from graphopt.sizes.plan import Entry, SizePlan
from graphopt.targets.llvm import LlvmTarget
from graphopt.variants import Source, Variant
from graphopt.verify import Feeds, Reference

LEAST_SECONDS = 2.0
"""For the race of one size."""


@dataclass(frozen=True)
class SizedLibrary:
    """`path` is None where no size got faster. `by_input`: sizes without a function go to the model that came in; they
    go to the chosen variant where that is at least as fast in ONNX Runtime."""

    records: tuple[SizeRecord, ...]
    variant: Variant
    path: Path | None
    by_input: bool


def make_sized(
    chosen: Candidate, fallback: Variant, plan: SizePlan, source: Source, compiler: Compiler
) -> SizedLibrary:
    """Of the chosen variant, or of `fallback` where the input itself was chosen."""
    variant = chosen.variant or fallback
    try:
        plan = plan.proved(variant.model, compiler.work)
        folder = Path(tempfile.mkdtemp(prefix="sizes-", dir=compiler.work))
        feeds = {entry.function: _feeds(entry, plan, source, compiler) for entry in plan.entries}
        flat = [feed for each in feeds.values() for feed in each]
        target = compiler.target
        assert isinstance(target, LlvmTarget)
        how = How(target, compiler.settings.tune_seconds, database_path(), compiler.settings.seed)
        outputs = iter(compile_sizes(variant.model, plan, how, folder, flat, compiler.progress))
    except (SpecError, TargetError) as error:  # a lossy pass may have made what is not provable any more
        missing = tuple(SizeRecord(str(entry), "unavailable", str(error)) for entry in plan.entries)
        return SizedLibrary(missing, variant, None, chosen.variant is None)
    records: list[SizeRecord] = []
    races: dict[str, PairedResult] = {}
    for entry in plan.entries:
        own = feeds[entry.function]
        results = [next(outputs) for _ in own]
        try:
            reference = Reference(source.model, own, compiler.work)
            errors = verify(results, variant, reference)
        except VerificationError as error:
            records.append(SizeRecord(str(entry), "wrong", str(error)))
            continue
        record, race = _raced(entry, own, folder, variant, source, compiler)
        records.append(dataclasses.replace(record, errors=errors))
        races[str(entry)] = race
    by_input = chosen.variant is None or not all(_as_fast(race) for race in races.values())
    records = [_settled(record, races.get(record.sizes), by_input) for record in records]
    kept = {e.function for e, r in zip(plan.entries, records, strict=True) if r.status == "compiled"}
    if not kept:
        return SizedLibrary(tuple(records), variant, None, by_input)
    _keep(folder, kept)
    return SizedLibrary(tuple(records), variant, folder, by_input)


VARIANT, COMPILED = "variant · onnxruntime", "variant · tvm"


def _raced(
    entry: Entry, feeds: Sequence[Feeds], folder: Path, variant: Variant, source: Source, compiler: Compiler
) -> tuple[SizeRecord, PairedResult]:
    settings = compiler.settings
    contenders = [
        Contender.onnx(source.path, INPUT),
        Contender.onnx(variant.file, VARIANT),
        Contender.compiled(folder, COMPILED),
    ]
    seconds = max(LEAST_SECONDS, settings.measure_seconds / len(feeds))
    race = compiler.place.race(
        contenders,
        feeds,
        threads=settings.threads or 1,
        seconds=seconds,
        seed=settings.seed,
        progress=compiler.progress,
    )
    assert isinstance(race, PairedResult)
    if COMPILED in race.failed:
        return SizeRecord(str(entry), "unavailable", race.failed[COMPILED]), race
    speedups = tuple((r.median, r.low, r.high) for r in race.session_ratios(INPUT, COMPILED))
    return SizeRecord(str(entry), "compiled", speedups=speedups), race


def _as_fast(race: PairedResult) -> bool:
    """Whether the variant is, in ONNX Runtime, at least as fast as the input."""
    return VARIANT not in race.failed and all(r.median <= LEVEL for r in race.session_ratios(VARIANT, INPUT))


def _settled(record: SizeRecord, race: PairedResult | None, by_input: bool) -> SizeRecord:
    """The record; where the compiled function is slower than what its sizes go to otherwise, it is left out."""
    if record.status != "compiled" or race is None:
        return record
    for other in (INPUT,) if by_input else (INPUT, VARIANT):
        ratios = race.session_ratios(COMPILED, other)
        if not all(r.median <= LEVEL and r.low <= TIE for r in ratios):
            return dataclasses.replace(record, status="onnxruntime", reason=f"not faster than {other}")
    return record


def _keep(folder: Path, functions: set[str]) -> None:
    """Make engine.json name these functions only: the others' code stays, and is never called."""
    path = folder / DESCRIPTION
    described = json.loads(path.read_text(encoding="utf-8"))
    described["entries"] = [each for each in described["entries"] if each["function"] in functions]
    path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _feeds(entry: Entry, plan: SizePlan, source: Source, compiler: Compiler) -> list[Feeds]:
    """Inputs of the smallest size that the function is for, and of the largest: the user's, cut, or made up."""
    sizes = [entry.smallest, entry.largest] if entry.is_padded else [entry.largest]
    return [_sample(plan, each, source, compiler.data.samples, compiler.settings.seed) for each in sizes]


def _sample(plan: SizePlan, sizes: Mapping[str, int], source: Source, known: Sequence[Feeds], seed: int) -> Feeds:
    shapes = plan.input_shapes(sizes)
    for sample in known:
        if all(name in sample and _holds(sample[name].shape, shape) for name, shape in shapes.items()):
            cut = {n: np.ascontiguousarray(a[tuple(map(slice, shapes[n]))]) for n, a in sample.items()}
            if all(np.take(cut[name], 0, axis).all() for name, axis in plan.masks | plan.first):
                return cut
    made = samples.random_feeds(models.signature(models.fix_inputs(source.model, shapes)), seed)
    for name, axis in plan.masks | plan.first:
        np.moveaxis(made[name], axis, 0)[0] = 1  # a mask leaves something
    return made


def _holds(have: Sequence[int], want: Sequence[int]) -> bool:
    return len(have) == len(want) and all(h >= w for h, w in zip(have, want, strict=True))
