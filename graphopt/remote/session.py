"""A session with a device: one process there, which ends with it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graphopt.errors import DeviceError, SpecError, TargetError
from graphopt.remote.address import Address
from graphopt.remote.device import Device, read_device
from graphopt.remote.tracker import Tracker
from graphopt.runtime.tvm_engine import last_line

CONNECT_S = 5.0
"""A server that is there accepts within this."""
WAIT_S = 120.0
"""How long a device of a tracker may be busy with others."""
_MEMORY = ("bad_alloc", "memalign", "out of memory", "Cannot allocate memory", "failed to allocate")


@dataclass(frozen=True)
class Session:
    """`rpc` is TVM's session; `where` the server it is with."""

    rpc: Any
    where: str

    @cached_property
    def device(self) -> Device:
        """What machine it is, as it is now. Raises DeviceError: another version of TVM."""
        return read_device(self)

    @cached_property
    def processor(self) -> Any:
        """TVM's name of the device's processor, for tensors."""
        return self.rpc.cpu(0)

    @cached_property
    def gpu(self) -> Any:
        """TVM's name of the device's first GPU, for tensors."""
        return self.rpc.cuda(0)

    def load(self, library: Path, name: str) -> Any:
        """Upload a library under `name` and load it."""
        with self.told(f"load {library}"):
            self.rpc.upload(str(library), target=name)
            return self.rpc.load_module(name)

    def use_threads(self, threads: int | None) -> None:
        """How many threads of the device kernels run on from here on; None: as many as it likes."""
        if threads is not None:
            with self.told("set the number of threads"):
                self.rpc.get_function("runtime.config_threadpool")(1, threads)

    def close(self) -> None:
        """End the process there; what lies in it is lost, whoever still holds it."""
        with contextlib.suppress(RuntimeError, OSError, AttributeError):  # it is gone already
            self.rpc.get_function("CloseRPCConnection")()

    @contextlib.contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """Errors of TVM as one line: TargetError where the device said no, DeviceError where it is gone."""
        try:
            yield
        except (RuntimeError, OSError, ValueError, AttributeError) as error:
            raise explained(error, self.where, doing) from error


def explained(error: BaseException, where: str, doing: str) -> TargetError:
    """An error of TVM's RPC as one of ours."""
    said = last_line(error)
    if any(word.lower() in str(error).lower() for word in _MEMORY):
        return TargetError(f"{where} ran out of memory and cannot {doing}", hint="a smaller batch or model fits better")
    if is_lost(error):
        return DeviceError(
            f"{where} closed the connection and did not {doing}",
            hint="it has died, or its kernel has ended the session, for lack of memory perhaps",
        )
    return TargetError(f"{where} cannot {doing}: {said}")


def is_lost(error: BaseException) -> bool:
    """Whether TVM's error says that the other side has closed the connection, or its time was over."""
    # The second is kShutdown too, by its number: what a call says whose server ends while it waits.
    words = (
        "kShutdown",
        "RPCCode::kReturn) is false: code=1",
        "SockChannel",
        "RPCSessionTimeoutError",
        "Connection reset",
        "Broken pipe",
        "EOF",
    )
    return isinstance(error, DeviceError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def connected(address: Address, limit_s: float | None = None, wait_s: float = WAIT_S) -> Iterator[Session]:
    """A session with the server at `address`, or with a free one of a tracker's key; it ends with the context, or by
    the server's hand after `limit_s` seconds.

    Raises DeviceError: nobody answers, another version of TVM, no device became free within `wait_s`; SpecError: wrong
    key.
    """
    if address.tracker:
        with Tracker(address.host, address.port) as tracker:
            tracker.of_key(address.key)
            server = tracker.request(address.key, wait_s)
    else:
        _check_listening(address)
        server = address
    session = Session(_connect(server, limit_s), f"{server.host}:{server.port}/{address.key}")
    try:
        yield session
    finally:
        session.close()


def _check_listening(address: Address) -> None:
    """TVM's client would wait for minutes."""
    try:
        socket.create_connection((address.host, address.port), CONNECT_S).close()
    except OSError as error:
        raise DeviceError(
            f"no RPC server answers at {address.host}:{address.port}: {error.strerror or error}",
            hint="`graphopt rpc-server` starts one on a device",
        ) from error


def _connect(server: Address, limit_s: float | None) -> Any:
    from tvm import rpc

    try:
        return rpc.connect(server.host, server.port, server.key, session_timeout=limit_s or 0)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, OSError) as error:
        said = str(error)
        if "key" in said and ("match" in said or "find server" in said):
            raise SpecError(
                f"the RPC server at {server.host}:{server.port} does not have the key {server.key!r}",
                hint="write HOST:PORT/KEY with the key it was started with",
            ) from error
        if "protocol" in said:
            raise DeviceError(
                f"the RPC server at {server.host}:{server.port} speaks another version of TVM's protocol: "
                f"{last_line(error)}"
            ) from error
        raise DeviceError(f"the RPC server at {server.host}:{server.port} refuses: {last_line(error)}") from error
