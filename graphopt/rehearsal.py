"""The user's model runs for the first time in a process of its own: ONNX Runtime is native code, and a crash of it must
be an error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt import guard
from graphopt import model as models
from graphopt.arrays import load_arrays, save_arrays
from graphopt.checking import know_operators
from graphopt.crashes import reproducer
from graphopt.errors import TargetError
from graphopt.progress import Progress
from graphopt.verify import RUN_LIMIT_S, Feeds, Reference


def rehearse(
    path: Path,
    inputs: Mapping[str, tuple[int, ...]],
    samples: Sequence[Feeds],
    work: Path,
    limit_s: float = RUN_LIMIT_S,
) -> None:
    """Do what `Reference` will do in this process with the model in `path`, its `inputs` fixed.

    Raises what that raises, and TargetError where it crashes.
    """
    if not guard.isolates():
        return
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=work) as folder:
        save_arrays(samples, Path(folder) / "samples.npz")
        arguments = {
            "model": str(path.absolute()),
            "inputs": {name: list(shape) for name, shape in inputs.items()},
            "folder": folder,
            "limit_s": limit_s,
        }
        try:
            guard.guarded(_run, arguments, preload=know_operators)
        except guard.CrashError as crash:
            what = f"{path} crashes ONNX Runtime ({crash})"
            saved = None
            if path.stat().st_size < models.PROTOBUF_LIMIT_BYTES:
                saved = reproducer(path.read_bytes(), f"{what}\n\ngraphopt optimize model.onnx")
            raise TargetError(what, hint=f"please report it with {saved}" if saved else None) from crash
        except guard.UnexpectedError:
            return  # in this process it is raised as what it is


def _run(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    folder = Path(arguments["folder"])
    shapes = {name: tuple(shape) for name, shape in arguments["inputs"].items()}
    model = models.fix_inputs(models.read(arguments["model"]), shapes)
    Reference(model, load_arrays(folder / "samples.npz"), folder, arguments["limit_s"])
    return {}
