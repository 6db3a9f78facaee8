"""TVM's own RPC server on a device with Python, which says what machine it is as graphopt's C++ server does."""

from __future__ import annotations

import ctypes
import importlib.metadata
import ipaddress
import json
import os
import platform
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from graphopt.capabilities import host_features
from graphopt.errors import DeviceError
from graphopt.remote.tracker import Tracker
from graphopt.runtime import amx_permission, gpu

_PR_SET_PDEATHSIG = 1
_BOARD = Path("/sys/firmware/devicetree/base/model")


def start(host: str, port: int, key: str, tracker: tuple[str, int] | None = None, advertise: str | None = None) -> Any:
    """Start it in a process of its own, which ends with this one: a `tvm.rpc.Server`, whose `port` says where it
    listens. `port` 0: any that is free.

    Raises DeviceError: no tracker answers, or the port is taken.
    """
    from tvm import rpc

    if tracker is not None:
        Tracker(*tracker).close()
    port = port or free_port(host)
    try:
        return rpc.Server(
            host, port, port + 1, key=key, tracker_addr=tracker, custom_addr=advertise, silent=True,
            server_init_callback=prepare,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError) as error:
        raise DeviceError(f"cannot listen on {host}:{port}: {str(error).splitlines()[-1]}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare() -> None:
    """Called in the server's process: clients may ask `graphopt.describe_device`, and it ends with its parent."""
    import tvm_ffi

    from graphopt.remote.device import DESCRIBE

    tvm_ffi.register_global_func(DESCRIBE, describe, override=True)
    amx_permission.granted()  # asked once, for all sessions
    if gpu.has_driver() and gpu.find_runtime() is not None:
        from graphopt.runtime.cuda_engine import load_runtime

        load_runtime()  # the driver starts in the process of a session, which is forked
    if sys.platform == "linux":
        end_with_parent()
        os.register_at_fork(after_in_child=end_with_parent)


def end_with_parent() -> None:
    """Whoever kills the server ends its sessions, too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def describe() -> str:
    """What `device_description.h` says, of this machine."""
    memory = _values(Path("/proc/meminfo"))
    cpu = _values(Path("/proc/cpuinfo"))
    if "CPU part" in cpu:
        pairs = zip(cpu["CPU implementer"], cpu["CPU part"], strict=True)
        cores = [f"{implementer}:{part}" for implementer, part in pairs]
    else:
        cores = cpu.get("model name", [])
    return json.dumps(
        {
            "arch": platform.machine(),
            "cores": cores,
            "features": sorted(host_features()),
            "board": _BOARD.read_text().rstrip("\0\n") if _BOARD.is_file() else "",
            "system": f"{platform.system()} {platform.release()}",
            "memory_bytes": _bytes(memory, "MemTotal"),
            "available_bytes": _bytes(memory, "MemAvailable"),
            "gpus": gpu.describe(),
            "emulated": "",
            "tvm": importlib.metadata.version("apache-tvm"),
            "tvm_ffi": importlib.metadata.version("apache-tvm-ffi"),
        }
    )


def _values(file: Path) -> dict[str, list[str]]:
    """What stands behind each name of a file of `name : value` lines."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def _bytes(memory: dict[str, list[str]], name: str) -> int:
    return int(memory[name][0].split()[0]) * 1024 if name in memory else 0


def free_port(host: str) -> int:
    """One that nobody listens on. Raises DeviceError."""
    try:
        with socket.create_server((host, 0)) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        raise DeviceError(f"cannot listen on {host}: {error.strerror or error}") from error
