"""Where schedule decisions are kept between runs."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """$GRAPHOPT_CACHE, else $XDG_CACHE_HOME/graphopt, else ~/.cache/graphopt."""
    own = os.environ.get("GRAPHOPT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def append_line(path: Path, line: str) -> None:
    """Append one line, whole or not at all, whatever others append meanwhile; the folder is made. Raises OSError.

    What a process that was killed left of its line is closed by a line break first; what a full disk took of ours is
    removed again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _lock(handle)
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        content = ("\n" if torn else "").encode() + line.encode()
        try:
            written = os.write(handle, content)
        except OSError:
            os.ftruncate(handle, size)
            raise
        if written < len(content):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):  # some network file systems have none; a single write is seldom torn
            fcntl.flock(handle, fcntl.LOCK_EX)


def database_path() -> Path:
    """The file of schedule decisions, its folder made."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "schedules.jsonl"
