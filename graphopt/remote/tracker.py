"""A client of TVM's own RPC tracker: what devices there are, and one of them for a session.

The messages are those of `tvm/rpc/tracker.py`; unlike TVM's client this one waits no longer than it is told.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.errors import DeviceError, SpecError, nearest
from graphopt.remote.address import Address

ANSWER_S = 5.0
"""A tracker that is there answers within this."""


@dataclass(frozen=True)
class KeyStatus:
    """The devices of one key."""

    key: str
    devices: tuple[str, ...]
    """`host:port` of each."""
    free: int
    waiting: int
    """Clients that wait for one."""

    @property
    def busy(self) -> int:
        return max(len(self.devices) - self.free, 0)


class Tracker:
    """A connection. Raises DeviceError where no tracker answers."""

    def __init__(self, host: str, port: int):
        from tvm.rpc import base

        self.host, self.port = host, port
        self._base = base
        with self._told():
            self._socket = socket.create_connection((host, port), ANSWER_S)
            self._socket.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            (magic,) = struct.unpack("<i", base.recvall(self._socket, 4))
            if magic != base.RPC_TRACKER_MAGIC:
                raise OSError("it is no TVM tracker")

    def status(self) -> tuple[KeyStatus, ...]:
        """Every key that a device has, in order."""
        answer = self._ask([self._base.TrackerCode.SUMMARY], ANSWER_S)
        devices: dict[str, list[str]] = {}
        for each in answer[1]["server_info"]:
            key = str(each["key"]).removeprefix("server:")
            devices.setdefault(key, []).append(":".join(map(str, each["addr"])))
        queues = answer[1]["queue_info"]
        return tuple(
            KeyStatus(key, tuple(sorted(devices[key])), queue["free"], queue["pending"])
            for key in sorted(devices)
            for queue in [queues.get(key, {"free": 0, "pending": 0})]
        )

    def of_key(self, key: str) -> KeyStatus:
        """Raises SpecError where no device has this key."""
        known = {each.key: each for each in self.status()}
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"its keys: {', '.join(known) or 'none, no device is there'}"
            raise SpecError(f"no device at the tracker {self.host}:{self.port} has the key {key!r}", hint=hint)
        return known[key]

    def request(self, key: str, wait_s: float) -> Address:
        """The address of a free device, whose key is good for one session. Raises DeviceError where none became free
        within `wait_s`."""
        try:
            code, found = self._ask([self._base.TrackerCode.REQUEST, key, "", 1], wait_s)
        except TimeoutError:
            raise DeviceError(
                f"no device of the key {key!r} became free within {wait_s:g} s",
                hint="`graphopt farm status` shows them",
            ) from None
        if code != self._base.TrackerCode.SUCCESS:
            raise DeviceError(f"the tracker {self.host}:{self.port} gave no device of the key {key!r}")
        host, port, match = found
        return Address(str(host), int(port), str(match))

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: list[Any], wait_s: float) -> Any:
        with self._told(but_timeout=question[0] == self._base.TrackerCode.REQUEST):
            self._socket.settimeout(wait_s)
            self._base.sendjson(self._socket, question)
            return self._base.recvjson(self._socket)

    @contextlib.contextmanager
    def _told(self, but_timeout: bool = False):
        try:
            yield
        except OSError as error:
            if but_timeout and isinstance(error, TimeoutError):
                raise
            raise DeviceError(
                f"no tracker answers at {self.host}:{self.port}: {error.strerror or error}",
                hint="`python -m tvm.exec.rpc_tracker --host HOST --port PORT` starts one",
            ) from error


def wait_until(ready: Callable[[], bool], seconds: float, step_s: float = 0.2) -> bool:
    """Ask `ready` again and again; False where it stays false for so long."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(step_s)
    return True
