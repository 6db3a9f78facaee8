"""The parent's side of the workers: contenders alive at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import MeasurementError
from graphopt.measure import wire
from graphopt.measure.contenders import Contender

BURST_S = 0.06
BURST_RUNS = 3
KEEP = 256
WARM_UP_S = 2.0
_PROCESS_BYTES = 150 << 20
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent


class Racer:
    """One contender in its process. Not for use from a thread that ends before `close`: its end ends the worker.

    Every method raises MeasurementError when the worker crashes, refuses, or takes longer than `timeout_s`.
    """

    def __init__(self, contender: Contender, threads: int, folder: Path, number: int, timeout_s: float) -> None:
        self.contender = contender
        self.timeout_s = timeout_s
        self._log = folder / f"{number}.log"
        self._pending = bytearray()
        search = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search),
            "OMP_NUM_THREADS": str(threads),
            "TVM_NUM_THREADS": str(threads),
        }
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "graphopt.measure.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,  # "-m" imports from the current folder first; this one holds no modules
                env=environment,
                start_new_session=True,  # a process group to kill whole; ctrl-C reaches the parent only
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._requests, self._answers = self._child.stdin, self._child.stdout
        os.set_blocking(self._answers.fileno(), False)

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, **request: Any) -> None:
        try:
            self._requests.write(wire.encode(request))
            self._requests.flush()
        except OSError:
            raise self._death() from None

    def receive(self, doing: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while True:
                if (message := self._take()) is not None:
                    if "error" in message:
                        raise MeasurementError(f"{self.contender.name}: {message['error']}")
                    return message
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.close()
                    raise MeasurementError(
                        f"{self.contender.name}: no answer within {self.timeout_s:g} s while {doing}; it was ended"
                    )
                part = os.read(self._answers.fileno(), 1 << 16)
                if not part:
                    raise self._death()
                self._pending += part

    def burst(self) -> tuple[float, ...]:
        """Latencies in seconds of one turn."""
        self.send(do="burst", seconds=BURST_S, at_least=BURST_RUNS, keep=KEEP)
        return tuple(self.receive("timing")["samples_s"])

    def warm_up(self, limit_s: float = WARM_UP_S) -> None:
        self.send(do="warm up", seconds=limit_s)
        self.receive("warming up")

    def close(self) -> None:
        """End the worker and whatever it started. May be called again."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        with contextlib.suppress(OSError):
            self._requests.close()
        self._answers.close()

    def _take(self) -> dict[str, Any] | None:
        head = wire.LENGTH.size
        if len(self._pending) < head:
            return None
        end = head + wire.LENGTH.unpack(self._pending[:head])[0]
        if len(self._pending) < end:
            return None
        message = wire.decode(bytes(self._pending[head:end]))
        del self._pending[:end]
        return message

    def _death(self) -> MeasurementError:
        """Why the worker is gone, in one line."""
        try:
            code = self._child.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        lines = self._log.read_text(errors="replace").split("\n") if self._log.is_file() else []
        said = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        what, hint = f"{self.contender.name} closed its pipe", None
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
            what, hint = f"{self.contender.name} was killed by {name}", _REMEDIES.get(name)
        elif code is not None:
            what = f"{self.contender.name} ended with exit code {code}"
        return MeasurementError(f"{what}: {said}" if said else what, hint=hint)


_REMEDIES = {
    "SIGILL": "it was built for another processor: build it with this machine's mcpu",
    "SIGKILL": "most likely out of memory: time fewer contenders at once",
    "SIGBUS": "most likely out of memory or disk: time fewer contenders at once",
}


class Lineup:
    """Contenders open, warmed up and ready to take turns; a context manager that ends them all.

    `failed` tells why others are not among `racers`. Raises MeasurementError when memory cannot hold them all.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        feeds: Mapping[str, np.ndarray],
        *,
        threads: int,
        timeout_s: float,
        warm_up_s: float = WARM_UP_S,
    ) -> None:
        self.racers: dict[str, Racer] = {}
        self.failed: dict[str, str] = {}
        _check_memory(contenders)
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-measure-")
        try:
            self._open(contenders, feeds, threads, timeout_s, warm_up_s)
        except BaseException:
            self.close()
            raise

    def _open(self, contenders, feeds, threads, timeout_s, warm_up_s) -> None:
        folder = Path(self._folder.name)
        feeds_file = folder / "feeds.npz"
        wire.save_feeds(feeds, feeds_file)
        for number, contender in enumerate(contenders):  # all at once: importing takes each a second or two
            self.racers[contender.name] = Racer(contender, threads, folder, number, timeout_s)
        steps = (
            lambda racer: racer.send(
                do="open",
                engine=racer.contender.engine,
                path=str(racer.contender.path.absolute()),
                threads=threads,
                feeds=str(feeds_file),
                trust=racer.contender.trust,
            ),
            lambda racer: racer.receive("opening"),
            lambda racer: racer.warm_up(warm_up_s),
        )
        for step in steps:
            for name, racer in list(self.racers.items()):
                try:
                    step(racer)
                except MeasurementError as error:
                    self.drop(name, error)

    def drop(self, name: str, error: MeasurementError) -> None:
        """Leave a contender out from here on."""
        self.racers.pop(name).close()
        self.failed[name] = str(error)

    def close(self) -> None:
        for racer in self.racers.values():
            racer.close()
        self._folder.cleanup()

    def __enter__(self) -> Lineup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_memory(contenders: Sequence[Contender]) -> None:
    """Refuse what would drive the machine into swapping, and its latencies with it."""
    import psutil

    # Weights are held about twice: as read, and as packed for the kernels.
    needed = sum(_PROCESS_BYTES + 2 * contender.size_bytes for contender in contenders)
    available = psutil.virtual_memory().available
    if needed > available:
        raise MeasurementError(
            f"timing {len(contenders)} contenders at once needs about {needed >> 20} MB, {available >> 20} MB are free",
            hint="time fewer of them in one run",
        )
