"""The client's side: start the server, hand it a job, listen."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from graphopt import errors
from graphopt.errors import GraphoptError
from graphopt.guard import work
from graphopt.progress import SILENT, Progress

INTERRUPT_S = 60.0
"""So long the work may take to end after Ctrl-C: the tuner keeps what it has found."""
SWITCH = "GRAPHOPT_ISOLATE"
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[3]); from graphopt.guard import server; "
    "server.main(int(sys.argv[1]), int(sys.argv[2]))"
)


class UnexpectedError(Exception):
    """The work raised what is no error of graphopt's; its text is the trace."""


class TimeLimitError(Exception):
    """The work took longer than it may and was ended; `at` is where it was, '' if unknown."""

    def __init__(self, limit_s: float, at: str):
        self.at = at
        super().__init__(f"over {limit_s:g} s" + (f" at {at}" if at else ""))


class CrashError(Exception):
    """The process of the work was ended by a signal; `at` is where it was, '' if unknown."""

    def __init__(self, signal_name: str, at: str):
        self.signal_name = signal_name
        self.at = at
        super().__init__(f"{signal_name} at {at}" if at else signal_name)


def isolates() -> bool:
    """Whether `guarded` uses another process."""
    return sys.platform == "linux" and os.environ.get(SWITCH) != "0" and not work.is_worker()


def guarded(
    function: work.Work,
    arguments: Mapping[str, Any],
    progress: Progress = SILENT,
    *,
    preload: Callable[[], object] | None = None,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """What `function(arguments, progress)` returns; the function must be one that its module's name leads to, and
    arguments and result of JSON's types.

    `preload` is called in the server once: it imports what would take each job time, and starts no thread.

    Raises what the function raises (of graphopt's errors, KeyboardInterrupt and MemoryError; UnexpectedError with the
    trace for any other), CrashError, and TimeLimitError after `limit_s`.
    """
    if not isolates():
        plain = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(function(plain, progress)))
    job = {
        "function": work.name_of(function),
        "arguments": arguments,
        "preload": None if preload is None else work.name_of(preload),
        "environ": dict(os.environ),
        "path": _import_path(),
        "processors": sorted(os.sched_getaffinity(0)),
        "cwd": _current_folder(),
    }
    outcome = _Outcome()
    for _ in range(2):  # a server that has died is started again, once
        with _sent(job) as lines:
            outcome = _listen(lines, progress, limit_s)
        if not outcome.is_nothing:
            break
    if outcome.is_nothing:
        outcome.ended = _stopped(job["preload"])
    return outcome.result()


class _Outcome:
    """What was heard of a job."""

    pid: int | None = None
    place = ""
    answer: dict[str, Any] | None = None
    ended: int | None = None

    @property
    def is_nothing(self) -> bool:
        """The server died before it forked."""
        return self.pid is None and self.answer is None and self.ended is None

    def hear(self, message: Mapping[str, Any]) -> None:
        self.pid = message.get("pid", self.pid)
        self.place = message.get("at", self.place)
        self.answer = message.get("answer", self.answer)
        self.ended = message.get("ended", self.ended)

    def result(self) -> dict[str, Any]:
        answer = self.answer
        if answer is None:
            code = -signal.SIGKILL if self.ended is None else self.ended
            raise CrashError(signal.Signals(-code).name if code < 0 else f"exit code {code}", self.place)
        if "value" in answer:
            return answer["value"]
        name = answer["error"]
        if name == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if name == "MemoryError":
            raise MemoryError
        kind = getattr(errors, name, None) if name else None
        if kind is None:
            raise UnexpectedError(answer.get("what") or name)
        raise kind(answer["what"], node=answer["node"], hint=answer["hint"])


class _Lines:
    """Messages out of a pipe."""

    def __init__(self, descriptor: int):
        self._descriptor, self._kept = descriptor, bytearray()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def next(self, until: float | None = None) -> dict[str, Any] | None:
        """The next message; None when there is no more. Raises TimeoutError at `until` of the monotonic clock."""
        while True:
            end = self._kept.find(b"\n")
            if end >= 0:
                line = bytes(self._kept[:end])
                del self._kept[: end + 1]
                with contextlib.suppress(ValueError):  # one that was cut off
                    return json.loads(line)
                continue
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._poll.poll(None if left is None else left * 1000):
                raise TimeoutError
            found = os.read(self._descriptor, 1 << 16)
            if not found:
                return None
            self._kept += found


def _listen(lines: _Lines, progress: Progress, limit_s: float | None) -> _Outcome:
    outcome = _Outcome()
    until = None if limit_s is None else time.monotonic() + limit_s
    with ExitStack() as tasks:
        opened: dict[int, tuple[ExitStack, Any]] = {}
        try:
            while outcome.ended is None and (message := lines.next(until)) is not None:
                outcome.hear(message)
                _told(message, progress, opened, tasks)
        except TimeoutError:
            _kill(outcome, lines)
            raise TimeLimitError(limit_s or 0.0, outcome.place) from None
        except BaseException:
            _interrupt(outcome, lines)
            raise
    return outcome


def _told(message: Mapping[str, Any], progress: Progress, opened: dict[int, Any], tasks: ExitStack) -> None:
    if "note" in message:
        progress.note(message["note"])
    elif "task" in message:
        stack = tasks.enter_context(ExitStack())
        opened[message["task"]] = (stack, stack.enter_context(progress.task(message["label"], message["total"])))
    elif "steps" in message:
        opened[message["of"]][1](message["steps"])
    elif "ended_task" in message:
        opened.pop(message["ended_task"])[0].close()


def _interrupt(outcome: _Outcome, lines: _Lines) -> None:
    """Interrupt the work, which may have things to keep, and wait for it; a second Ctrl-C ends it."""
    until = time.monotonic() + INTERRUPT_S
    try:
        _signal(outcome, lines, signal.SIGINT, until)
        _hear_out(outcome, lines, until)
    except BaseException as error:
        _kill(outcome, lines)
        if not isinstance(error, TimeoutError):
            raise


def _kill(outcome: _Outcome, lines: _Lines) -> None:
    until = time.monotonic() + INTERRUPT_S
    with contextlib.suppress(TimeoutError):
        _signal(outcome, lines, signal.SIGKILL, until)
        _hear_out(outcome, lines, until)


def _signal(outcome: _Outcome, lines: _Lines, number: signal.Signals, until: float) -> None:
    """Once its worker is known: the server may be importing yet."""
    while outcome.pid is None and outcome.ended is None:
        message = lines.next(until)
        if message is None:
            return
        outcome.hear(message)
    if outcome.pid is not None and outcome.ended is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(outcome.pid, number)


def _hear_out(outcome: _Outcome, lines: _Lines, until: float) -> None:
    while outcome.ended is None and (message := lines.next(until)) is not None:
        outcome.hear(message)


def _import_path() -> list[str]:
    """For a process with another current folder. There may be entries that are no folders, for import hooks."""
    here = _current_folder()
    return [os.path.join(here, each) if here and (not each or os.path.exists(each)) else each for each in sys.path]


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody has removed it
        return None


@contextlib.contextmanager
def _sent(job: Mapping[str, Any]):
    """What is told of a job that was handed to the server."""
    with ExitStack() as closing:
        reader, writer = os.pipe()
        closing.callback(os.close, reader)
        with ExitStack() as theirs:
            theirs.callback(os.close, writer)
            content = os.memfd_create("graphopt-job")
            theirs.callback(os.close, content)
            with open(content, "wb", closefd=False) as file:
                file.write(json.dumps(job).encode())
            _hand_over(job["preload"], [content, writer, theirs.enter_context(_stderr())])
        yield _Lines(reader)


@contextlib.contextmanager
def _stderr():
    try:
        descriptor = os.dup(2)
    except OSError:  # it is closed
        descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


_lock = threading.Lock()
_servers: dict[str | None, tuple[subprocess.Popen[bytes], socket.socket]] = {}
"""By what they have preloaded: a process is forked the slower the more it has."""


def _hand_over(preload: str | None, descriptors: list[int]) -> None:
    with _lock:
        for attempt in range(2):
            if preload not in _servers:
                _servers[preload] = _start()
            try:
                socket.send_fds(_servers[preload][1], [b"j"], descriptors)
                return
            except OSError:
                _stop(preload)
                if attempt:
                    raise


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = json.dumps(_import_path())
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid()), path],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # else it starts its pool when it is imported
            )
        except OSError as error:
            ours.close()
            raise GraphoptError(f"no process can be started for native code: {error.strerror or error}") from error
    return process, ours


def _stop(preload: str | None) -> int:
    """End a server, and with it what it forked. Returns its exit code."""
    process, ours = _servers.pop(preload)
    ours.close()
    process.kill()
    return process.wait()


def _stopped(preload: str | None) -> int | None:
    """The exit code of a server that has died."""
    with _lock:
        return _stop(preload) if preload in _servers else None


def _stop_all() -> None:
    for each in list(_servers):
        _stop(each)


def _forget() -> None:
    """A process that was forked off from the client has servers of its own, if it needs any."""
    global _lock
    _lock = threading.Lock()
    for process, ours in _servers.values():
        ours.close()
        process.returncode = 0  # no child of this process: nothing to wait for
    _servers.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(_stop_all)
