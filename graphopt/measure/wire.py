"""How parent and worker talk: messages of JSON, each behind its length, over a pipe.

Arrays never travel on the pipe: they go through one file that all workers read, so that every message is small
enough to fit the pipe's buffer and a write cannot block on a worker that has stopped reading.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graphopt.errors import MeasurementError

LENGTH = struct.Struct(">I")


def encode(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> dict[str, Any]:
    return json.loads(body)


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message, waiting for it; None when the other side has closed the pipe."""
    head = _exactly(stream, LENGTH.size)
    body = None if head is None else _exactly(stream, LENGTH.unpack(head)[0])
    return None if body is None else decode(body)


def _exactly(stream: BinaryIO, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = stream.read(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def save_feeds(feeds: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays by name. Raises MeasurementError for dtypes that a .npz cannot hold (strings, bfloat16)."""
    for name, array in feeds.items():
        if np.asarray(array).dtype.kind not in "biufc":
            raise MeasurementError(f"input {name!r} of dtype {np.asarray(array).dtype} cannot be timed")
    # Input names may hold anything, even "file", which numpy takes for its own parameter: so they are numbered.
    arrays = {f"input_{number}": np.asarray(array) for number, array in enumerate(feeds.values())}
    np.savez(path, names=np.array(list(feeds), dtype=np.str_), **arrays)  # pyright: ignore[reportArgumentType]


def load_feeds(path: Path) -> dict[str, np.ndarray]:
    """What `save_feeds` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {str(name): archive[f"input_{number}"] for number, name in enumerate(archive["names"])}
