"""Tuning without the rest of an optimize run: a model's kernels, their schedules, and the database that keeps them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graphopt import guard
from graphopt import model as models
from graphopt.calibration import random_dataset
from graphopt.candidates import specialise
from graphopt.compiling import can_go_apart
from graphopt.crashes import reproducer
from graphopt.errors import SpecError, TargetError, nearest
from graphopt.passes.base import Context
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.places import Here, place_for
from graphopt.plugins import parse_target
from graphopt.progress import SILENT, Progress
from graphopt.runtime.artifact import MODEL, is_artifact
from graphopt.schedule_database import database_path
from graphopt.targets.base import Devices, Lowered, Target, TuningReport
from graphopt.targets.llvm import LlvmTarget, load_compiler

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tuned:
    """What `tune_model` found."""

    report: TuningReport
    database: Path

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            **dataclasses.asdict(self.report),
            "kernels_us": self.report.kernels_us,
            "database": str(self.database),
        }


def resolve_target(spec: str, threads: int | None = None, precision: str | None = None) -> Target:
    """The target of a spec, with `threads` and `precision` in place of its own where given. Raises SpecError."""
    target = parse_target(spec)
    for name, value in (("threads", threads), ("precision", precision)):
        if value is None:
            continue
        if not hasattr(target, name):
            raise SpecError(f"the target {target.name} has no {name}")
        if name == "threads" and not 1 <= cast(int, value) <= (os.cpu_count() or 1):
            raise SpecError(f"--threads {value} is not between 1 and this machine's {os.cpu_count()}")
        target = dataclasses.replace(target, **{name: value})  # pyright: ignore[reportArgumentType]
    return target


def lower_model(path: str | os.PathLike[str], target: Target, shapes: Shapes, seed: int = 0) -> Lowered:
    """A model (an ONNX file, or the one in an artifact) as `optimize` would compile it: after the exact passes.

    Raises ModelError, DataError (a dynamic dimension that `shapes` leaves open), PassError, TargetError.
    """
    file = Path(path) / MODEL if is_artifact(path) else Path(path)
    model = models.fix_inputs(models.load(file), shapes)
    (sample,) = random_dataset(models.signature(model), 1, seed).batches(1)
    rewritten, _ = Pipeline.parse(PRESETS["exact"]).run(model, Context(capabilities=target.capabilities, seed=seed))
    return target.lower(specialise(rewritten, sample))


def tune_model(
    path: str | os.PathLike[str],
    target: Target,
    seconds: float,
    *,
    shapes: Shapes | None = None,
    database: Path | None = None,
    seed: int = 0,
    fresh: bool = False,
    remote: str | None = None,
    progress: Progress = SILENT,
) -> Tuned:
    """Search the schedules of a model's kernels, time every kernel, and keep what was found in the database.

    `remote`: the devices that time them, in this machine's place. KeyboardInterrupt is raised again with the best so
    far kept. Raises what `lower_model`, `place_for` and `Target.tune` raise.
    """
    if seconds < 0:
        raise SpecError(f"--tune-seconds {seconds:g} must not be negative")
    database = database or database_path()
    place = Here() if remote is None else place_for(target, remote)
    target = place.completed(target)
    if place.devices is not None or not can_go_apart(target):
        report = _search(path, target, seconds, shapes or {}, database, seed, fresh, progress, place.devices)
        return Tuned(report, database)
    file = Path(path) / MODEL if is_artifact(path) else Path(path)
    models.load(file)  # what is wrong with it is told as that
    arguments = {
        "path": os.fspath(path), "target": str(target), "seconds": seconds, "database": str(database), "seed": seed,
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()}, "fresh": fresh,
    }  # fmt: skip
    try:
        found = guard.guarded(_search_apart, arguments, progress, preload=load_compiler)
    except guard.CrashError as crash:
        what = f"tuning {path} crashed ({crash})"
        small = file.stat().st_size < models.PROTOBUF_LIMIT_BYTES
        command = f"graphopt tune model.onnx --target '{target}' --tune-seconds {seconds:g}"
        saved = reproducer(file.read_bytes(), f"{what}\n\n{command}") if small else None
        hint = "what was found so far is kept" + (f"; please report it with {saved}" if saved else "")
        raise TargetError(what, hint=hint) from crash
    return Tuned(TuningReport.from_dict(found), database)


def _search(
    path: str | os.PathLike[str],
    target: Target,
    seconds: float,
    shapes: Shapes,
    database: Path,
    seed: int,
    fresh: bool,
    progress: Progress,
    devices: Devices | None,
) -> TuningReport:
    return target.tune(
        lower_model(path, target, shapes, seed),
        seconds=seconds,
        database=database,
        seed=seed,
        progress=progress,
        fresh=fresh,
        everything=True,
        devices=devices,
    )


def _search_apart(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    shapes = {name: tuple(shape) for name, shape in arguments["shapes"].items()}
    report = _search(
        arguments["path"],
        parse_target(arguments["target"]),
        arguments["seconds"],
        shapes,
        Path(arguments["database"]),
        arguments["seed"],
        arguments["fresh"],
        progress,
        None,
    )
    return dataclasses.asdict(report)


def model_keys(path: str | os.PathLike[str], target: Target, shapes: Shapes) -> set[Any]:
    """The database keys of a model's kernels on a CPU target. Raises TargetError for other targets."""
    from graphopt.targets.llvm import LoweredModel
    from graphopt.targets.tuning.tasks import find_tasks

    if not isinstance(target, LlvmTarget):
        raise TargetError(f"the target {target.name} keeps no schedules")
    lowered = cast(LoweredModel, lower_model(path, target, shapes))
    return {task.key for task in find_tasks(lowered, target, None, everything=True)}


def select(records: Mapping[Any, Any], isa: Iterable[str], keys: set[Any] | None) -> dict[Any, Any]:
    """The records of these instruction sets (all, where none is named) and these keys (all, where None).

    Raises SpecError for an instruction set that no record has.
    """
    wanted = set(isa)
    known = {key.isa for key in records}
    for name in sorted(wanted - known):
        near = nearest(name, known)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"
        raise SpecError(f"no record is for the instruction set {name!r}", hint=hint)
    return {
        key: record
        for key, record in records.items()
        if (not wanted or key.isa in wanted) and (keys is None or key in keys)
    }
