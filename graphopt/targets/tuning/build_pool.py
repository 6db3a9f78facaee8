"""Warm processes that build candidates, one for each processor, and stop while a kernel is timed."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from graphopt.errors import TargetError
from graphopt.targets.tuning.build_worker import Built, Order, receive, send

QUEUED = 2
"""Orders that a worker holds: the one it builds, and the next, so that it never waits for us."""


class Worker:
    """One process and the orders it holds."""

    def __init__(self, processor: int | None):
        self.processor = processor
        self.orders: deque[tuple[Any, Order]] = deque()
        self.start()

    def start(self) -> None:
        line = [sys.executable, "-m", "graphopt.targets.tuning.build_worker", str(os.getpid())]
        if self.processor is not None:
            line.append(str(self.processor))
        try:
            self.process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )  # unbuffered: what select sees is all there is
        except OSError as error:
            raise TargetError(f"no process to build candidates: {error.strerror or error}") from error

    @property
    def pipes(self) -> tuple[Any, Any]:
        return cast(Any, self.process.stdin), cast(Any, self.process.stdout)

    def submit(self, tag: Any, order: Order) -> None:
        self.orders.append((tag, order))
        with contextlib.suppress(BrokenPipeError):  # it has died: `result` finds out
            send(self.pipes[0], order)

    def result(self) -> tuple[Any, Built]:
        """The answer to the oldest order. A worker that died is replaced: the order that killed it has failed."""
        answer = receive(self.pipes[1])
        tag, order = self.orders.popleft()
        if answer is not None:
            return tag, answer
        code = self.process.wait()
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        self.start()
        for _, waiting in self.orders:
            send(self.pipes[0], waiting)
        return tag, Built(order.library, problem=f"the compiler's process ended with status {code}")

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()  # also ends one that is stopped
        self.process.wait()
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()


class BuildPool:
    """A context: workers on all `processors` this process may use.

    `submit` and `next_result` go together; `quiet` stops as many workers as the timing needs processors. One pool
    serves several searches, one after another: a worker takes seconds to load TVM.
    """

    def __init__(self, processors: list[int]):
        self.processors = processors
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-tune-")
        self._count = 0
        self.workers = [Worker(p if len(processors) > 1 else None) for p in processors]

    def __enter__(self) -> BuildPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.close()
        self._folder.cleanup()

    @property
    def in_flight(self) -> int:
        return sum(len(worker.orders) for worker in self.workers)

    @property
    def has_room(self) -> bool:
        return any(len(worker.orders) < QUEUED for worker in self.workers)

    def library(self) -> str:
        """A path for the next library."""
        self._count += 1
        return str(Path(self._folder.name) / f"{self._count}.so")

    def submit(self, tag: Any, order: Order) -> None:
        """Give an order to the least busy worker; `tag` comes back with its result."""
        min(self.workers, key=lambda worker: len(worker.orders)).submit(tag, order)

    def next_result(self, timeout_s: float | None = None) -> tuple[Any, Built] | None:
        """Wait for any result; None when `timeout_s` passes first, or nothing is in flight."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.orders:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # pyright: ignore[reportArgumentType]
            if not selector.get_map():
                return None
            ready = selector.select(timeout_s)
        return ready[0][0].data.result() if ready else None

    def drain(self) -> None:
        """Wait for what is being built and forget it: the next search shall not be given it."""
        while self.next_result() is not None:
            pass

    @contextlib.contextmanager
    def quiet(self, threads: int) -> Iterator[None]:
        """Free as many processors as timing with `threads` needs; the calling thread moves to a free one."""
        stopped = self.workers[:threads]
        before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        for worker in stopped:
            worker.signal(signal.SIGSTOP)
        try:
            if before is not None and threads == 1 and len(self.processors) > 1:
                os.sched_setaffinity(0, {self.processors[0]})
            yield
        finally:
            if before is not None:
                os.sched_setaffinity(0, before)
            for worker in stopped:
                worker.signal(signal.SIGCONT)
