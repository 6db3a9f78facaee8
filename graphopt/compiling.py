"""A model becomes a library: lowered, tuned and compiled in this process, or in one of its own, where a crash of the
compiler or of what it made is an error."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import guard
from graphopt import model as models
from graphopt.arrays import load_arrays, save_arrays
from graphopt.errors import GraphoptError, TargetError
from graphopt.plugins import parse_target
from graphopt.progress import Progress
from graphopt.runtime.compiled import open_compiled
from graphopt.targets.base import Devices, Survey, Target, TensorType, TuningReport
from graphopt.targets.llvm import LlvmTarget, load_compiler
from graphopt.verify import Feeds

Outputs = list[dict[str, np.ndarray]]


def can_go_apart(target: Target) -> bool:
    """Whether another process may compile for this target: it is told by its name and options, and a process that is
    forked for a job has no use of a GPU."""
    if not guard.isolates() or not isinstance(target, LlvmTarget):
        return False
    try:
        return parse_target(str(target)) == target
    except GraphoptError:
        return False


def compile_here(
    model: ir.Model,
    target: Target,
    folder: Path,
    seconds: float,
    database: Path,
    seed: int,
    progress: Progress,
    devices: Devices | None = None,
) -> TuningReport:
    """Tune within `seconds` and compile into `folder` a model of static shapes. Raises TargetError."""
    lowered = target.lower(model)
    tuning = target.tune(lowered, seconds=seconds, database=database, seed=seed, progress=progress, devices=devices)
    target.build(lowered, folder)
    return tuning


def compile_apart(
    model: ir.Model,
    target: Target,
    folder: Path,
    seconds: float,
    database: Path,
    seed: int,
    progress: Progress,
    samples: Sequence[Feeds] = (),
) -> tuple[TuningReport, Outputs]:
    """As `compile_here`, in a process of its own, which then runs the library on `samples`: also returns its outputs.

    Raises TargetError, and guard.CrashError.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-compile-", dir=folder.parent) as name:
        work = Path(name)
        models.save(model, work / "model.onnx")
        if samples:
            save_arrays(samples, work / "samples.npz")
        arguments = {
            "work": name,
            "target": str(target),
            "folder": str(folder),
            "seconds": seconds,
            "database": str(database),
            "seed": seed,
            "runs": bool(samples),
        }
        found = guard.guarded(_compile, arguments, progress, preload=load_compiler)
        outputs = load_arrays(work / "outputs.npz") if samples else []
    return TuningReport.from_dict(found), outputs


def run_apart(folder: Path, target: Target, samples: Sequence[Feeds]) -> None:
    """Run a model in parts, some of them compiled, for the first time: in a process of its own, where that can be.

    Raises TargetError where it crashes, and what running it raises.
    """
    if not can_go_apart(target):
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-run-", dir=folder.parent) as name:
        save_arrays(samples, Path(name) / "samples.npz")
        arguments = {"folder": str(folder), "samples": str(Path(name) / "samples.npz")}
        try:
            guard.guarded(_run, arguments, preload=load_compiler)
        except guard.CrashError as crash:
            raise TargetError(f"running it in parts crashed ({crash})") from crash


def survey_apart(model: ir.Model, target: Target, known: Mapping[str, TensorType], folder: Path) -> Survey | None:
    """`Target.survey`, in a process of its own where that can be. Raises what it raises, and TargetError for a crash.

    What is handed over is put into `folder` for a while.
    """
    if not can_go_apart(target):
        return target.survey(model, known)
    with tempfile.TemporaryDirectory(prefix="graphopt-survey-", dir=folder) as name:
        work = Path(name)
        models.save(model, work / "model.onnx")
        types = {each: [kind.dtype, [int(d) for d in kind.shape]] for each, kind in known.items()}
        try:
            found = guard.guarded(_survey, {"work": name, "target": str(target), "known": types}, preload=load_compiler)
        except guard.CrashError as crash:
            raise TargetError(f"looking for what TVM refuses crashed ({crash})") from crash
        if not found:
            return None
        (constants,) = load_arrays(work / "constants.npz")
        return Survey(found["refused"], _types(found["types"]), constants)


def _types(plain: Mapping[str, Any]) -> dict[str, TensorType]:
    return {name: TensorType(dtype, tuple(shape)) for name, (dtype, shape) in plain.items()}


def _survey(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    work = Path(arguments["work"])
    target = parse_target(arguments["target"])
    found = target.survey(models.read(work / "model.onnx"), _types(arguments["known"]))
    if found is None:
        return {}
    save_arrays([found.constants], work / "constants.npz")
    types = {name: [kind.dtype, [int(d) for d in kind.shape]] for name, kind in found.types.items()}
    return {"refused": dict(found.refused), "types": types}


def _run(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    from graphopt.runtime.hybrid_engine import HybridEngine

    run = HybridEngine(arguments["folder"]).run
    for sample in load_arrays(Path(arguments["samples"])):
        run(sample)
    return {}


def _compile(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    work, folder = Path(arguments["work"]), Path(arguments["folder"])
    tuning = compile_here(
        models.read(work / "model.onnx"),
        parse_target(arguments["target"]),
        folder,
        arguments["seconds"],
        Path(arguments["database"]),
        arguments["seed"],
        progress,
    )
    if arguments["runs"]:
        guard.at("running the compiled model")
        run = open_compiled(folder).run
        save_arrays([run(each) for each in load_arrays(work / "samples.npz")], work / "outputs.npz")
    return dataclasses.asdict(tuning)
