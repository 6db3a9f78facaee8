"""`latency.jsonl`: a line for each commit and case, appended and never rewritten."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import DataError

SCHEMA = 1
_COMMIT_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT", "BUILD_SOURCEVERSION")


@dataclass(frozen=True)
class Entry:
    """What one commit's model took, in seconds, and its other figures by name."""

    commit: str
    time: str
    """UTC, ISO 8601: when it was measured."""
    case: str
    fingerprint: str
    """Of the machine: only entries of one machine make a series."""
    median_s: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_line(self) -> str:
        return json.dumps({"schema": SCHEMA, **self.__dict__, "figures": dict(self.figures)})


def append(path: Path, entries: Sequence[Entry]) -> None:
    """Add lines in one write that is on the disk when this returns. A line that an interruption left torn is ended
    first, so that it spoils no other. Raises DataError."""
    text = "".join(entry.to_line() + "\n" for entry in entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"cannot append to {path}: {error.strerror or error}") from error


def read(path: Path) -> tuple[list[Entry], int]:
    """All entries in their order, and how many lines are none (torn by an interruption, or of a newer graphopt).

    Raises DataError: the file cannot be read, or holds no entry at all.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", hint="`graphopt ci run` writes it, see docs/ci.md"
        ) from error
    parsed = [_parse(line) for line in lines if line.strip()]
    entries = [entry for entry in parsed if entry is not None]
    if not entries:
        raise DataError(f"{path} holds no latencies")
    return entries, len(parsed) - len(entries)


def _parse(line: str) -> Entry | None:
    try:
        data: Any = json.loads(line)
        if data["schema"] != SCHEMA or not 0 < float(data["median_s"]) < float("inf"):
            return None
        return Entry(
            str(data["commit"]),
            str(data["time"]),
            str(data["case"]),
            str(data["fingerprint"]),
            float(data["median_s"]),
            {str(k): float(v) for k, v in data["figures"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def series(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """By case and machine: an entry a commit, in the order in which commits were first measured; of several
    measurements of one commit the median."""
    grouped: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for entry in entries:
        grouped.setdefault((entry.case, entry.fingerprint), {}).setdefault(entry.commit, []).append(entry)
    return {
        key: [
            Entry(
                each[0].commit,
                each[0].time,
                each[0].case,
                each[0].fingerprint,
                statistics.median(e.median_s for e in each),
                each[-1].figures,
            )
            for each in commits.values()
        ]
        for key, commits in grouped.items()
    }


def current_commit(folder: Path) -> str:
    """The commit that CI says it runs, else the one checked out in `folder`; `unknown` outside of any."""
    for variable in _COMMIT_VARIABLES:
        if os.environ.get(variable):
            return os.environ[variable]
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
