"""Libraries for several processors in one artifact: `--target 'cpu{mcpu=sapphirerapids},cpu{mcpu=haswell}'`.

Who opens the artifact loads the first whose every instruction the processor has. Candidates are compiled and measured
for one of the targets, the first that this machine can run; what was chosen is then built for the others too, and
verified and measured as far as this machine or an emulator can run it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt import capabilities
from graphopt.candidates import Candidate, Compiler
from graphopt.errors import SpecError, TargetError
from graphopt.measure import Counts
from graphopt.places import place_for
from graphopt.plugins import parse_target
from graphopt.remote.emulator import find_emulator, find_system
from graphopt.report import LibraryRecord
from graphopt.spec import parse_list
from graphopt.targets.base import Target
from graphopt.targets.llvm import LlvmTarget
from graphopt.verify import Feeds


@dataclass(frozen=True)
class Library:
    """A folder with a compiled library, or the reason why there is none."""

    record: LibraryRecord
    path: Path


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets in the order in which a processor should try their libraries.

    Raises SpecError: none, one twice, several that are not processors, or of several architectures.
    """
    targets = tuple(parse_target(str(each)) for each in parse_list(text))
    if not targets:
        raise SpecError("no target was given", hint="--target cpu")
    if len(targets) == 1:
        return targets
    for target in targets:
        if not isinstance(target, LlvmTarget):
            raise SpecError(f"{target} has no place among several targets", hint="several libraries are for processors")
        if targets.count(target) > 1:
            raise SpecError(f"the target {target} is given twice")
    archs = sorted({target.capabilities.arch for target in targets})
    if len(archs) > 1:
        raise SpecError(
            f"one artifact cannot hold libraries for {' and '.join(archs)}", hint="make an artifact for each"
        )
    return targets


def leading(targets: Sequence[Target]) -> Target:
    """The target for which candidates are compared: the first that this machine can run, or else the first."""
    return next((target for target in targets if _runs_here(target)), targets[0])


def make_libraries(
    chosen: Candidate, targets: Sequence[Target], compiler: Compiler, feeds: Sequence[Feeds]
) -> list[Library]:
    """What was chosen, for each of `targets`, of which `compiler` has one; empty where ONNX Runtime runs it."""
    if chosen.record.engine != "tvm" or chosen.variant is None:
        return []
    found = []
    for target in targets:
        if target == compiler.target:
            record = LibraryRecord(str(target), "chosen", size_bytes=chosen.record.size_bytes)
            record = dataclasses.replace(record, latency=chosen.record.latency, instructions=chosen.record.instructions)
            found.append(Library(record, chosen.path))
        elif _can_run(target):
            found.append(_measured(chosen, target, compiler, feeds))
        else:
            found.append(_unmeasured(chosen, target, compiler))
    return found


def _measured(chosen: Candidate, target: Target, compiler: Compiler, feeds: Sequence[Feeds]) -> Library:
    """Verified, and compared with nothing: where this library is loaded, the chosen one is not."""
    settings, variant = compiler.settings, chosen.variant
    assert variant is not None
    with place_for(target) as place:
        own = dataclasses.replace(compiler, target=_in_float32(target), place=place)
        made = own.compile(variant, _precision(chosen, target), settings.tune_seconds)
        record = LibraryRecord(str(target), made.record.status, made.record.reason, made.record.size_bytes)
        if made.record.status != "measured":
            return Library(record, made.path)
        seconds, threads = settings.measure_seconds / 3, settings.threads or 1
        race = place.race(
            [made.contender], feeds, threads=threads, seconds=seconds, seed=settings.seed, progress=compiler.progress
        )
        if isinstance(race, Counts):
            record = dataclasses.replace(record, instructions=race.totals[made.name], where=place.label)
        else:
            record = dataclasses.replace(record, latency=race.stats[made.name].to_dict(), where=place.label)
    return Library(record, made.path)


def _unmeasured(chosen: Candidate, target: Target, compiler: Compiler) -> Library:
    """Built with the decisions that the schedule database has, and the templates' first for the others."""
    assert chosen.variant is not None
    folder = Path(tempfile.mkdtemp(prefix="library-", dir=compiler.work))
    own = dataclasses.replace(compiler, target=_in_float32(target), place=place_for(target))
    try:
        own.build(chosen.variant.model, folder, _precision(chosen, target), 0)
    except TargetError as error:
        return Library(LibraryRecord(str(target), "unavailable", str(error)), folder)
    size = sum(each.stat().st_size for each in folder.iterdir())
    return Library(LibraryRecord(str(target), "not run", _why_not(target), size), folder)


def _precision(chosen: Candidate, target: Target) -> str:
    """bf16 or fp16 where it was chosen and the target has it; float32 is no less accurate."""
    precision = chosen.record.precision
    return precision if isinstance(target, LlvmTarget) and target.computes_in(precision) else "float32"


def _in_float32(target: Target) -> Target:
    """The target without a precision of its own: the compiler is told which."""
    return dataclasses.replace(target, precision="float32")  # pyright: ignore[reportCallIssue]


def _runs_here(target: Target) -> bool:
    return target.runs_here and getattr(target, "features", frozenset()) <= capabilities.host_features()


def _can_run(target: Target) -> bool:
    """Here, or in an emulator of another architecture."""
    if target.runs_here:
        return _runs_here(target)
    arch = target.capabilities.arch
    return find_emulator(arch) is not None and find_system(arch) is not None


def _why_not(target: Target) -> str:
    if not target.runs_here:
        return "there is no emulator of its processor here"
    lacking = getattr(target, "features", frozenset()) - capabilities.host_features()
    return f"this machine lacks {', '.join(sorted(lacking))}"
