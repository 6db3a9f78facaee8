"""The process whose instructions are counted: `python -m graphopt.ci.counted_process HOW ENGINE PATH FEEDS RUNS`.

HOW says who counts: `marks` (QEMU with `graphopt.remote`'s plugin, which sees the marks), `events` (this process, by
the processor's counter; it prints a number a run) or `whole` (whoever watches the process from outside).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

from graphopt.ci.performance_events import Counter
from graphopt.measure.worker import Run, open_contender

WARM_UP = 3
MARK = 0x67726F70
START, STOP = 1, 0
_MARKING_CALL = 141
"""What the plugin watches for: getpriority on aarch64, setpriority on x86-64. Either refuses the mark."""


def main(how: str, engine: str, path: str, feeds: str, runs: str) -> int:
    run = open_contender(engine, path, 1, Path(feeds), trust=True)  # whoever starts this process has asked
    for _ in range(WARM_UP):
        run()
    {"marks": _with_marks, "events": _with_events, "whole": _whole}[how](run, int(runs))
    return 0


def _with_marks(run: Run, runs: int) -> None:
    libc = ctypes.CDLL(None)

    def mark(what: int) -> None:
        libc.syscall(ctypes.c_long(_MARKING_CALL), ctypes.c_long(MARK), ctypes.c_long(what), ctypes.c_long(0))

    if platform.machine() not in ("x86_64", "aarch64"):
        raise OSError("marks are known on x86-64 and aarch64 only")
    for work in (lambda: None, *[run] * runs):  # nothing comes first: what marking costs by itself
        mark(START)
        work()
        mark(STOP)


def _with_events(run: Run, runs: int) -> None:
    counter = Counter()
    nothing = counter.count(lambda: None)
    sys.stdout.write("\n".join(str(counter.count(run) - nothing) for _ in range(runs)) + "\n")
    counter.close()


def _whole(run: Run, runs: int) -> None:
    for _ in range(runs):
        run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
