"""A model becomes a library with a function for each size, in a process of its own where that can be."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import guard
from graphopt import model as models
from graphopt.arrays import load_arrays, save_arrays
from graphopt.compiling import can_go_apart
from graphopt.errors import TargetError
from graphopt.plugins import parse_target
from graphopt.progress import Progress
from graphopt.runtime.sized_engine import SizedEngine
from graphopt.sizes.plan import SizePlan
from graphopt.targets.base import Lowered
from graphopt.targets.llvm import LlvmTarget, load_compiler
from graphopt.verify import Feeds


@dataclasses.dataclass(frozen=True)
class How:
    """`seconds`: for the tuning of all functions together."""

    target: LlvmTarget
    seconds: float
    database: Path
    seed: int


def compile_sizes(
    model: ir.Model, plan: SizePlan, how: How, folder: Path, samples: Sequence[Feeds], progress: Progress
) -> list[dict[str, np.ndarray]]:
    """Tune and compile `model`, whose dimensions are dynamic, into `folder`; the library's outputs for `samples`.

    Raises TargetError.
    """
    shapes = {entry.function: plan.input_shapes(entry.largest) for entry in plan.entries}
    if not can_go_apart(how.target):
        _compile_here(model, shapes, plan.to_dict(), how, folder, progress)
        run = SizedEngine(folder).run
        return [run(sample) for sample in samples]
    with tempfile.TemporaryDirectory(prefix="graphopt-compile-", dir=folder.parent) as name:
        work = Path(name)
        models.save(model, work / "model.onnx")
        save_arrays(samples, work / "samples.npz")
        arguments = {
            "work": name,
            "target": str(how.target),
            "folder": str(folder),
            "seconds": how.seconds,
            "database": str(how.database),
            "seed": how.seed,
            "plan": json.dumps(plan.to_dict()),
            "shapes": {function: {k: list(v) for k, v in each.items()} for function, each in shapes.items()},
        }
        try:
            guard.guarded(_compile, arguments, progress, preload=load_compiler)
        except guard.CrashError as crash:
            raise TargetError(f"compiling for several sizes crashed ({crash})") from crash
        return load_arrays(work / "outputs.npz")


def _compile_here(
    model: ir.Model,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    plan: Mapping[str, Any],
    how: How,
    folder: Path,
    progress: Progress,
) -> None:
    """Each size starts from what the one before was best with, and has its share of the time that is left."""
    lowered: dict[str, Lowered] = {}
    hints: dict[str, Mapping[str, Any]] = {}
    left = how.seconds
    with how.target.build_pool() if left > 0 else contextlib.nullcontext() as pool:
        for number, (function, inputs) in enumerate(shapes.items(), 1):
            made = how.target.lower(models.fix_inputs(model, inputs))
            progress.note(f"size {number} of {len(shapes)}: {', '.join(f'{k}{list(v)}' for k, v in inputs.items())}")
            report = how.target.tune(
                made,
                seconds=max(left, 0.0) / (len(shapes) - len(lowered)),
                database=how.database,
                seed=how.seed,
                progress=progress,
                hints=hints,
                pool=pool,
            )
            left -= report.seconds
            hints |= {row["workload"]: row for row in report.rows}
            lowered[function] = made
    how.target.build_sized(lowered, folder, plan)


def _compile(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    work, folder = Path(arguments["work"]), Path(arguments["folder"])
    target = parse_target(arguments["target"])
    assert isinstance(target, LlvmTarget)
    how = How(target, arguments["seconds"], Path(arguments["database"]), arguments["seed"])
    shapes = {f: {k: tuple(v) for k, v in each.items()} for f, each in arguments["shapes"].items()}
    _compile_here(models.read(work / "model.onnx"), shapes, json.loads(arguments["plan"]), how, folder, progress)
    guard.at("running the compiled model")
    run = SizedEngine(folder).run
    save_arrays([run(each) for each in load_arrays(work / "samples.npz")], work / "outputs.npz")
    return {}
