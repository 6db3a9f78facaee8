"""The process that forks: it has one thread and does nothing but import, fork and wait for the next job.

It reads jobs from a socket: one byte, with a memfd (the job as JSON), the pipe for what is told, and the client's
stderr. It ends when the socket is closed, or when the client has ended though somebody else still holds the other end;
what it forked ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any

from graphopt.guard import work

DESCRIPTORS = 3
_PR_SET_PDEATHSIG = 1


def main(descriptor: int, client: int) -> None:
    """Serve the process `client` over the socket `descriptor`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the client sends its own to whom it concerns
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    with socket.socket(fileno=descriptor) as jobs:
        ready = select.poll()
        ready.register(jobs, select.POLLIN)
        with contextlib.suppress(OSError):  # an old kernel: the socket alone tells
            ready.register(os.pidfd_open(client), select.POLLIN)
        while os.getppid() == client:
            if jobs.fileno() not in (found := {each for each, _ in ready.poll()}):
                if found:
                    return
                continue
            said, descriptors, _, _ = socket.recv_fds(jobs, 1, DESCRIPTORS)
            if not said:
                return
            if len(descriptors) == DESCRIPTORS:  # fewer where this process may not open so many
                _serve(jobs, *descriptors)
            for each in descriptors:
                os.close(each)


def _serve(jobs: socket.socket, job_file: int, pipe: int, stderr: int) -> None:
    job = json.loads(os.pread(job_file, os.fstat(job_file).st_size, 0))
    _import(job)
    server = os.getpid()
    try:
        if os.fork() == 0:
            jobs.close()
            _supervise(job, pipe, stderr, server)
    except OSError:  # no memory, or too many processes
        work.Pipe(pipe).tell(answer={"error": "", "what": traceback.format_exc()}, ended=0)


def _import(job: dict[str, Any]) -> None:
    """What fails here fails again in the worker, which tells it."""
    before = len(sys.modules)
    sys.path[:] = job["path"]
    try:
        work.find(job["function"])
        if job["preload"] is not None:
            work.find(job["preload"])()
    except Exception:  # noqa: BLE001 - see above
        pass
    if len(sys.modules) != before:
        gc.collect()
        gc.freeze()  # so that the collector of a forked process leaves these pages shared


def _supervise(job: dict[str, Any], pipe: int, stderr: int, server: int) -> None:
    """Fork the worker, wait for it, and tell how it ended. Does not return."""
    try:
        _end_with(server)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        supervisor = os.getpid()
        worker = os.fork()
        if worker == 0:
            _work(job, pipe, stderr, supervisor)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        work.Pipe(pipe).tell(ended=code)
    finally:
        os._exit(0)


def _work(job: dict[str, Any], pipe: int, stderr: int, supervisor: int) -> None:
    """Does not return."""
    code = 1
    try:
        _end_with(supervisor)
        os.dup2(stderr, 1)  # what libraries print is no output of graphopt's
        os.dup2(stderr, 2)
        work.run(job, pipe)
        sys.stdout.flush()
        sys.stderr.flush()
        code = 0
    except BrokenPipeError:
        code = 1  # the client listens no more
    finally:
        os._exit(code)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
