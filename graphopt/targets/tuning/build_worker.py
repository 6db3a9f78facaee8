"""The process that builds candidates: `python -m graphopt.targets.tuning.build_worker PARENT_PID [CPU]`.

Requests and answers are pickles between two processes of one program, each after its length. The answer goes to the
original stdout; what libraries print goes to stderr. The process ends when its parent does, even while it is stopped.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

from graphopt.errors import GraphoptError
from graphopt.targets.schedules import Choice
from graphopt.targets.tuning.measure import Parameter

_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Order:
    """A candidate to build: a workload, a choice, and the library to write."""

    workload: Any
    choice: Choice
    constants: tuple[int, ...]
    target: Any
    library: str
    arch: str | None = None
    """Of the processor it is for, if not this machine's."""


@dataclass(frozen=True)
class Built:
    """A library that holds one kernel, `main`, and its parameters; or the reason why there is none."""

    library: str
    parameters: tuple[Parameter, ...] = ()
    problem: str = ""


def send(stream: BinaryIO, content: Any) -> None:
    data = pickle.dumps(content)
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


def receive(stream: BinaryIO) -> Any | None:
    """The next message; None where the other side has ended."""
    head = _exactly(stream, _LENGTH.size)
    if head is None:
        return None
    data = _exactly(stream, _LENGTH.unpack(head)[0])
    return None if data is None else pickle.loads(data)


def _exactly(stream: BinaryIO, count: int) -> bytes | None:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def build(order: Order) -> Built:
    """Schedule, compile and link one candidate."""
    from tvm.error import InternalError
    from tvm.s_tir.schedule import ScheduleError

    from graphopt.targets import schedules
    from graphopt.targets.relax import executable, link
    from graphopt.targets.tuning.measure import parameters

    try:
        kernel = schedules.schedule(order.workload, order.choice)
        stray = sorted(set(kernel.repack) - set(order.constants))
        if stray:
            return Built(order.library, problem=f"argument {stray[0]} is no constant and cannot be repacked")
        module = executable.compile_function(kernel.func.with_attr("global_symbol", "main"), order.target)
        compiled = f"{order.library}.o"
        module.write_to_file(compiled, "o")
        link.link_shared(order.library, [compiled], order.arch)
        os.unlink(compiled)
        return Built(order.library, tuple(parameters(kernel.func, order.constants)))
    except (InternalError, ScheduleError, GraphoptError, RuntimeError, ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Built(order.library, problem=f"{type(error).__name__}: {lines[-1][:160] if lines else ''}")


def main(parent: int, processor: int | None) -> int:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the parent, which then closes our stdin
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if processor is not None:
            os.sched_setaffinity(0, {processor})
    if os.getppid() != parent:
        return 0
    import tvm  # noqa: F401 - before the first order, so that the first answer does not wait for it

    from graphopt.targets.relax import bfloat16, lookup, rounding

    bfloat16.register()  # workloads arrive with these operators
    lookup.register()
    rounding.register()
    while (order := receive(sys.stdin.buffer)) is not None:
        send(answers, build(order))
    return 0


if __name__ == "__main__":
    # Under its own name, so that what is pickled here is what the parent knows.
    from graphopt.targets.tuning import build_worker

    sys.exit(build_worker.main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
