"""Native code that may crash, in a process of its own: a crash there is an error here, and the run goes on.

Compilers and runtimes are C++: an odd model can end their process. `guarded` runs a function in another one, and says
what it returned or raised, or that it crashed and where. A process that has threads cannot be forked safely (a lock
that one of them holds stays locked for ever in the child), and this one has: pools of BLAS, ONNX Runtime and TVM. So
the process is forked from a server that was started fresh and has none:

    client -- job: memfd, pipe --> server --fork--> supervisor --fork--> worker
    client <-- pid, progress, places, the answer -- pipe --------------- worker
    client <-- how the worker ended -- the same pipe -- supervisor

A server (`server`; one for each thing that jobs want preloaded) imports what they need once and forks for each, so a
job costs some 10 ms, with TVM loaded 20; it never waits for one, so any number may run at once. All of them end with
their client, whatever ends it. Only JSON goes to and fro. A job has its client's current folder, environment, import
path, processors and stderr.

Only Linux has what this takes; elsewhere, and with GRAPHOPT_ISOLATE=0 in the environment, the function runs in this
process. So it does inside of a worker.
"""

from __future__ import annotations

from pathlib import Path

from graphopt.guard.client import CrashError, TimeLimitError, UnexpectedError, guarded, isolates
from graphopt.guard.work import at, is_worker

__all__ = [
    "CrashError",
    "TimeLimitError",
    "UnexpectedError",
    "at",
    "guarded",
    "is_worker",
    "isolates",
    "save_reproducer",
]


def save_reproducer(folder: Path, model: bytes, text: str) -> Path:
    """Keep what crashed: the model, and how to see it again. Returns the model's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "README.txt").write_text(text + "\n", encoding="utf-8")
    return folder / "model.onnx"
