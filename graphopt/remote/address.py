"""Where an RPC server is, or a tracker that knows servers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from graphopt.errors import SpecError

LOOPBACK = "127.0.0.1"
_FORM = re.compile(r"^(?P<tracker>tracker:)?((?P<host>[^:/\s]+):)?(?P<port>\d{1,5})/(?P<key>[^:/\s]+)$")


@dataclass(frozen=True)
class Address:
    """`key` is what a server calls itself, and a client must say the same. With `tracker`, host and port are the
    tracker's, and any server of that key is meant."""

    host: str
    port: int
    key: str
    tracker: bool = False

    def __str__(self) -> str:
        return f"{'tracker:' if self.tracker else ''}{self.host}:{self.port}/{self.key}"


def parse_address(text: str) -> Address:
    """`HOST:PORT/KEY` of a server, `tracker:HOST:PORT/KEY` or `tracker:PORT/KEY` of a tracker (the host is this machine
    where it is left out). Raises SpecError."""
    found = _FORM.match(text.strip())
    if found is None or not 0 < int(found["port"]) < 65536:
        raise SpecError(
            f"cannot read --remote {text!r}", hint="write HOST:PORT/KEY of a server, or tracker:HOST:PORT/KEY"
        )
    return Address(found["host"] or LOOPBACK, int(found["port"]), found["key"], found["tracker"] is not None)


def parse_host(text: str) -> tuple[str, int]:
    """`HOST:PORT`, or `PORT` of this machine. Raises SpecError."""
    host, _, port = text.strip().rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise SpecError(f"cannot read the address {text!r}", hint="write HOST:PORT")
    return host or LOOPBACK, int(port)
