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


def database_path() -> Path:
    """The file of schedule decisions, its folder made."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "schedules.jsonl"
