"""Where schedule decisions are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$GRAPHOPT_CACHE, else $XDG_CACHE_HOME/graphopt, else ~/.cache/graphopt."""
    own = os.environ.get("GRAPHOPT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphopt"


def append_line(path: Path, line: str) -> None:
    """Append in one write, so that a crash can tear no line but the last; the folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def database_path() -> Path:
    """The file of schedule decisions, its folder made."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "schedules.jsonl"
