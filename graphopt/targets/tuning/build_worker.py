"""The process that builds candidates: `python -m graphopt.targets.tuning.build_worker PARENT_PID [CPU]`.

Requests and answers are JSON, each after its length (`graphopt.measure.wire`); functions and targets are in TVM's own
JSON. The answer goes to the original stdout; what libraries print goes to stderr. The process ends when its parent
does, even while it is stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from graphopt.errors import GraphoptError
from graphopt.measure import wire
from graphopt.targets.schedules import Choice
from graphopt.targets.schedules.workload import Machine, Workload
from graphopt.targets.tuning.measure import Parameter

_PR_SET_PDEATHSIG = 1


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


def send(stream: BinaryIO, content: Order | Built) -> None:
    rest = memoryview(wire.encode(_plain(content)))
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


def receive(stream: BinaryIO) -> Any | None:
    """The next Order or Built; None where the other side has ended."""
    message = wire.read(stream)
    if message is None:
        return None
    return _order(message) if "choice" in message else _built(message)


def _plain(content: Order | Built) -> dict[str, Any]:
    if isinstance(content, Built):
        return asdict(content)
    from tvm.ir import save_json

    machine = content.workload.machine
    return {
        "function": save_json(content.workload.func),
        "machine": {**asdict(machine), "features": sorted(machine.features), "without": sorted(machine.without)},
        "choice": asdict(content.choice),
        "constants": content.constants,
        "target": save_json(content.target),
        "library": content.library,
        "arch": content.arch,
    }


def _order(message: Mapping[str, Any]) -> Order:
    from tvm.ir import load_json

    known = message["machine"]
    machine = Machine(**{**known, "features": frozenset(known["features"]), "without": frozenset(known["without"])})
    return Order(
        Workload(load_json(message["function"]), machine),
        Choice(**message["choice"]),
        tuple(message["constants"]),
        load_json(message["target"]),
        message["library"],
        message["arch"],
    )


def _built(message: Mapping[str, Any]) -> Built:
    parameters = tuple(Parameter(tuple(p["shape"]), p["dtype"], p["constant"]) for p in message["parameters"])
    return Built(message["library"], parameters, message["problem"])


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

    from graphopt.targets.relax import bfloat16, lookup, normal_share, rounding

    bfloat16.register()  # workloads arrive with these operators
    lookup.register()
    normal_share.register()
    rounding.register()
    while (order := receive(sys.stdin.buffer)) is not None:
        send(answers, build(order))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
