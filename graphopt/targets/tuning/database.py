"""Decisions that were measured: one JSON object a line, appended whole, read leniently.

A key is (workload digest, mcpu, threads); the last line of a key counts. A line that
cannot be read (a crash while writing, a hand edit) is skipped and counted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import TargetError


@dataclass(frozen=True)
class Key:
    """What a decision was measured for."""

    workload: str
    """sha256 of the workload's text."""
    mcpu: str
    threads: int


@dataclass(frozen=True)
class Record:
    """The best decision found for a key. `complete` says that the whole space was searched."""

    template: str
    version: int
    """The template's, when this was measured."""
    decision: dict[str, Any]
    time_us: float
    trials: int
    complete: bool


class Database:
    """A JSON-lines file of decisions. Raises TargetError where the file cannot be read or written."""

    def __init__(self, path: Path):
        self.path = path
        self.skipped = 0
        self._records: dict[Key, Record] = {}
        try:
            text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise TargetError(f"the schedule database {path} cannot be read: {error.strerror}") from error
        for line in text.splitlines():
            entry = _parse(line)
            if entry is None:
                self.skipped += bool(line.strip())
            else:
                self._records[entry[0]] = entry[1]
        self._torn = bool(text) and not text.endswith("\n")

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: Key) -> Record | None:
        return self._records.get(key)

    def add(self, key: Key, record: Record) -> None:
        """Append one line in one write, so that a crash can tear no line but the last."""
        self._records[key] = record
        line = json.dumps({**asdict(key), **asdict(record)}, sort_keys=True) + "\n"
        if self._torn:
            line, self._torn = "\n" + line, False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            raise TargetError(f"the schedule database {self.path} cannot be written: {error.strerror}") from error


def _parse(line: str) -> tuple[Key, Record] | None:
    try:
        entry = json.loads(line)
        key = Key(str(entry["workload"]), str(entry["mcpu"]), int(entry["threads"]))
        template, version = str(entry["template"]), int(entry["version"])
        decision = entry["decision"]
        if not isinstance(decision, dict):
            return None
        time_us, trials = float(entry["time_us"]), int(entry["trials"])
        return key, Record(template, version, decision, time_us, trials, bool(entry["complete"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
