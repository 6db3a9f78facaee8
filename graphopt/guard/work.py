"""What happens in the process that does the work: the function is called, and what there is to tell goes into a pipe.

Each message is JSON on a line of its own, with an empty line before it, so that one that was cut off (the process was
killed) spoils no other.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.progress import Progress

Work = Callable[[Mapping[str, Any], Progress], Mapping[str, Any]]
"""A function of a module: arguments and what it returns are of JSON's types."""

_pipe: Pipe | None = None


class Pipe:
    """The end that is written to."""

    def __init__(self, descriptor: int):
        self._descriptor, self._lock = descriptor, threading.Lock()

    def tell(self, **message: Any) -> None:
        rest = memoryview(b"\n" + json.dumps(message).encode() + b"\n")
        with self._lock:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def at(place: str) -> None:
    """Note where the work is: a node, a kernel. A crash names the last."""
    if _pipe is not None:
        _pipe.tell(at=place)


def is_worker() -> bool:
    """Whether this process was made for a job."""
    return _pipe is not None


def name_of(function: Work | Callable[[], object]) -> str:
    """`module:function`; it must be one that another process can find."""
    name = f"{function.__module__}:{function.__qualname__}"
    if function.__module__ == "__main__" or "<" in name:
        raise ValueError(f"{name} cannot be called in another process")
    return name


def find(name: str) -> Any:
    """The function of a name."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def run(job: Mapping[str, Any], descriptor: int) -> None:
    """Do a job in this process, which was forked for it, and tell what came of it."""
    global _pipe
    _pipe = Pipe(descriptor)
    answer: dict[str, Any] = {}
    try:
        signal.signal(signal.SIGINT, _interrupted_once)
        _pipe.tell(pid=os.getpid())  # from now on the client may interrupt it
        os.environ.clear()
        os.environ.update(job["environ"])
        sys.path[:] = job["path"]
        os.sched_setaffinity(0, job["processors"])
        if job["cwd"] is not None:
            os.chdir(job["cwd"])
        answer["value"] = find(job["function"])(job["arguments"], _Piped(_pipe))
    except GraphoptError as error:
        answer.update(error=type(error).__name__, what=error.what, node=error.node, hint=error.hint)
    except (KeyboardInterrupt, MemoryError) as error:
        answer["error"] = type(error).__name__
    except BaseException:  # noqa: BLE001 - told to the client, which raises it
        answer.update(error="", what=traceback.format_exc())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _pipe.tell(answer=answer)


def _interrupted_once(number: int, frame: object) -> None:
    """Ctrl-C comes from the terminal and from the client: once is enough, and what follows may be keeping results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


class _Piped:
    """The progress of a job."""

    def __init__(self, pipe: Pipe):
        self._pipe, self._count, self._lock = pipe, 0, threading.Lock()

    @contextmanager
    def task(self, label: str, total: float):
        with self._lock:
            self._count += 1
            number = self._count
        self._pipe.tell(task=number, label=label, total=total)
        try:
            yield lambda steps: self._pipe.tell(of=number, steps=steps)
        finally:
            self._pipe.tell(ended_task=number)

    def note(self, text: str) -> None:
        self._pipe.tell(note=text)
