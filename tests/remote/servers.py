"""Servers that are not as they should be: this module is sent whole to the process of a `tvm.rpc.Server`."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from contextlib import contextmanager

import cloudpickle

from graphopt.remote import python_server
from graphopt.remote.address import Address
from graphopt.remote.device import DESCRIBE

cloudpickle.register_pickle_by_value(sys.modules[__name__])
KEY = "box"


@contextmanager
def server(prepare: Callable[[], None] = python_server.prepare):
    """A loopback server; `prepare` is called in its process."""
    from tvm import rpc

    port = python_server.free_port("127.0.0.1")
    running = rpc.Server(
        "127.0.0.1", port, port + 1, key=KEY, silent=True, server_init_callback=prepare
    )  # fmt: skip
    try:
        yield Address("127.0.0.1", running.port, KEY)
    finally:
        running.terminate()


def saying(**changes: object) -> Callable[[], None]:
    """Describes itself with these changes."""

    def prepare() -> None:
        import tvm_ffi

        python_server.prepare()
        said = {**json.loads(python_server.describe()), **changes}
        tvm_ffi.register_global_func(DESCRIBE, lambda: json.dumps(said), override=True)

    return prepare


def silent() -> None:
    """TVM's own server, as it comes."""


def cramped() -> None:
    """Its sessions may hold little more memory than there is now, and it does not know."""
    python_server.prepare()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + (300 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
