"""Text files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it; its folder is made. Raises DataError: what was there stays."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
