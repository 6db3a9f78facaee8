"""Gives cases to worker processes, and finds out which of them crash or hang."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT

TIME_S = 60.0
"""A case that takes longer hangs."""


@dataclass
class Outcome:
    """What came of all cases."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.counts.values())
        lines = [f"{total} cases: " + ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))]
        return "\n".join([*lines, *self.findings])


def run_cases(seed: int, numbers: Iterable[int], jobs: int, time_s: float = TIME_S) -> Outcome:
    """Run cases in `jobs` processes at once."""
    outcome, queue, lock = Outcome(), iter(numbers), threading.Lock()

    def work() -> None:
        with tempfile.TemporaryDirectory(prefix="graphopt-fuzz-") as folder:
            inside = Path(folder) / "model"
            inside.mkdir()
            worker = _Worker(seed, inside)
            try:
                while True:
                    with lock:
                        number = next(queue, None)
                    if number is None:
                        return
                    answer = worker.run(number, time_s)
                    with lock:
                        _count(outcome, seed, number, answer)
            finally:
                worker.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _count(outcome: Outcome, seed: int, number: int, answer: dict[str, str]) -> None:
    name = answer["why"] if answer["end"] == "refused" else answer["end"]
    outcome.counts[name] += 1
    if answer["end"] == "finding":
        outcome.findings.append(f"--seed {seed} --only {number} ({answer['what']}):\n{answer['why']}")


class _Worker:
    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self._log = folder.parent / "log"
        self._start()

    def _start(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self.seed), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "GRAPHOPT_CACHE": str(self.folder.parent / "cache"), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def run(self, number: int, time_s: float) -> dict[str, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(time_s)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        why = "hang" if not ready else self._death()
        self.close()
        self._start()
        return {"end": "finding", "what": "crash" if ready else "hang", "why": why}

    def _death(self) -> str:
        code = self.process.wait()
        said = self._log.read_text(errors="replace").strip().splitlines()[-12:]
        return "\n".join([f"the process ended with {signal.Signals(-code).name if code < 0 else code}", *said])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
