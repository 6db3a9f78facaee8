"""What the tests of `graphopt.guard` have done in another process."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphopt import guard
from graphopt.errors import ModelError
from graphopt.progress import Progress


def whereabouts(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    return {
        "pid": os.getpid(),
        "parents": parents(os.getpid()),
        "cwd": os.getcwd(),
        "value": os.environ.get(arguments.get("name", "")),
        "processors": sorted(os.sched_getaffinity(0)),
        "threads": len(os.listdir("/proc/self/task")),
        "infinite": math.inf,
    }


def parents(pid: int) -> list[int]:
    """The processes above one."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def threads_above(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    """The threads of the server that this was forked from."""
    server = parents(os.getpid())[1]
    return {"threads": len(os.listdir(f"/proc/{server}/task")), "modules": sorted(sys.modules)}


def refuse(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    raise ModelError("what", node="n", hint="do this")


def divide(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    return {"x": 1 // arguments["by"]}


def allocate(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    raise MemoryError


def end(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    guard.at("node 'conv0'")
    guard.at("node 'conv1'")
    how = arguments["how"]
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "exit":
        os._exit(7)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def tell(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    progress.note("a line")
    with progress.task("outer", 3) as outer:
        outer(1)
        with progress.task("inner", 2) as inner:
            inner(2)
        outer(2)
    return {}


def print_much(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    sys.stdout.write("to stdout\n")
    os.write(2, b"to stderr\n")
    return {"text": "x" * (1 << 22)}


def keep(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    """Goes on until it is interrupted, and then keeps something."""
    folder = Path(arguments["folder"])
    try:
        (folder / "started").touch()
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        time.sleep(0.3)
        (folder / "kept").touch()
        raise


def sleep(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    guard.at("asleep")
    pids = [os.getpid(), *parents(os.getpid())[:2]]
    part = Path(arguments["file"]).with_suffix(".part")
    part.write_text(" ".join(map(str, pids)))
    part.rename(arguments["file"])
    time.sleep(arguments["seconds"])
    return {}


def nested(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    return {"own": os.getpid(), **guard.guarded(whereabouts, {})}


def sleep_deaf(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    """As `sleep`, and an interrupt does not end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return sleep(arguments, progress)
