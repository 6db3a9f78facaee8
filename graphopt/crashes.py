"""Where models that crashed something are kept, with how to see it again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from graphopt import guard
from graphopt.schedule_database import cache_folder


def reproducer(model: bytes, text: str) -> Path | None:
    """Keep what crashed in the cache folder; None where that cannot be written."""
    folder = cache_folder() / "crashes" / hashlib.sha256(model).hexdigest()[:16]
    try:
        return guard.save_reproducer(folder, model, text)
    except OSError:
        return None
