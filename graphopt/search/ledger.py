"""What a search has measured, kept in a file line by line, so that a search that was interrupted goes on."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from graphopt.errors import DataError
from graphopt.schedule_database import append_line


class Ledger:
    """Measurements by kind and key, both text; the last one of a key counts.

    Each is one line of JSON, appended in one write, so that a crash can tear no line but the last; a line that cannot
    be read is skipped. Without a path nothing is kept. Raises DataError where the file cannot be read or written.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known: dict[tuple[str, str], Any] = {}
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.exists() else ""
        except OSError as error:
            raise DataError(f"the search's notes {path} cannot be read: {error.strerror}") from error
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                entry = json.loads(line)
                self._known[str(entry["kind"]), str(entry["key"])] = entry["value"]

    def __len__(self) -> int:
        return len(self._known)

    def find(self, kind: str, key: str) -> Any | None:
        """What was noted, as JSON gives it back; None where nothing was."""
        return self._known.get((kind, key))

    def add(self, kind: str, key: str, value: Any) -> None:
        """Note `value`, of JSON's own types."""
        self._known[kind, key] = value
        if self._path is None:
            return
        line = json.dumps({"kind": kind, "key": key, "value": value}, separators=(",", ":")) + "\n"
        try:
            append_line(self._path, line)
        except OSError as error:
            raise DataError(f"the search's notes {self._path} cannot be written: {error.strerror}") from error
