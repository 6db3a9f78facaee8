"""Decisions that were measured: one JSON object a line, appended whole, read leniently.

A key is (workload digest, instruction set, threads, device); the last line of a key counts. A line that cannot be read
(a crash while writing, a hand edit) is skipped and counted. Records of another TVM version are kept in the file and
ignored. Beneath the user's file lie the records that come with the package: a user's record wins over a shipped one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import TargetError
from graphopt.schedule_database import append_line

SHIPPED = Path(__file__).parent / "data"
"""Folder of the records that come with the package."""


@cache
def compiler_version() -> str:
    """The version of TVM that builds candidates."""
    return importlib.metadata.version("apache-tvm")


@dataclass(frozen=True)
class Key:
    """What a decision was measured for."""

    workload: str
    """Digest of the computation (signature.workload_digest)."""
    isa: str
    """Instruction-set class of the generated code (signature.isa_class)."""
    threads: int
    device: str = ""
    """Fingerprint of the remote device it was measured on; empty for this machine."""


@dataclass(frozen=True)
class Record:
    """The best decision found for a key. `complete` says that the search of the space had ended by itself."""

    template: str
    version: int
    """The template's, when this was measured."""
    decision: dict[str, Any]
    time_us: float
    trials: int
    complete: bool
    kernel: str = ""
    """The kernel's name in the model it was tuned for: for people."""
    tried: tuple[int, ...] = ()
    """Positions in the space that were measured, so that a search that was interrupted goes on; empty if complete."""
    tvm: str = ""
    """The version of TVM that built it."""
    measured_on: str = ""
    """The name of the remote device: for people."""


class Database:
    """Records by key: those of a JSON-lines file over those that come with the package.

    Raises TargetError where the file cannot be read or written.
    """

    def __init__(self, path: Path, shipped: Path | None = SHIPPED):
        self.path = path
        self.skipped = 0
        self._shipped = _read_shipped(shipped) if shipped is not None else {}
        text = _text(path) if path.exists() else ""
        self._records, self.skipped = parse(text)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[tuple[Key, Record]]:
        """The file's own records."""
        return iter(self._records.items())

    def everything(self) -> dict[Key, Record]:
        """Shipped records with the file's own over them."""
        return {**self._shipped, **self._records}

    def find(self, key: Key) -> Record | None:
        """The record of a key; None where there is none, or only one of another TVM version."""
        for records in (self._records, self._shipped):
            record = records.get(key)
            if record is not None and record.tvm == compiler_version():
                return record
        return None

    def neighbours(self, key: Key) -> list[Record]:
        """Records of the same workload for other thread counts and devices, nearest first: good first guesses."""
        others = sorted(
            {k for records in (self._records, self._shipped) for k in records
             if k.workload == key.workload and k.isa == key.isa and k != key},
            key=lambda k: (k.device != key.device, abs(k.threads - key.threads), k.device),
        )  # fmt: skip
        found = (self.find(other) for other in others)
        return [record for record in found if record is not None]

    def add(self, key: Key, record: Record) -> None:
        """Append one line, whole or not at all."""
        self._records[key] = record
        try:
            append_line(self.path, encode(key, record))
        except OSError as error:
            raise TargetError(f"the schedule database {self.path} cannot be written: {error.strerror}") from error


def encode(key: Key, record: Record) -> str:
    """One line of the file."""
    content = {**asdict(key), **asdict(record)}
    for name in ("kernel", "tried", "device", "measured_on"):
        if not content[name]:
            del content[name]
    return json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n"


def parse(text: str) -> tuple[dict[Key, Record], int]:
    """Records by key, the last line of each; and how many lines were no records."""
    found: dict[Key, Record] = {}
    skipped = 0
    for line in text.splitlines():
        entry = _parse_line(line)
        if entry is None:
            skipped += bool(line.strip())
        else:
            found[entry[0]] = entry[1]
    return found, skipped


def read(path: Path) -> tuple[dict[Key, Record], int]:
    """The records of a file alone, and how many lines were skipped. Raises TargetError where it cannot be read."""
    return parse(_text(path))


def merged(several: Iterable[Mapping[Key, Record]]) -> dict[Key, Record]:
    """For each key the best record: of the newest TVM, then complete before incomplete, then the faster one."""
    best: dict[Key, Record] = {}
    for records in several:
        for key, record in records.items():
            other = best.get(key)
            if other is None or _rank(record) < _rank(other):
                best[key] = record
    return best


def compact(records: Mapping[Key, Record]) -> str:
    """The text of a database of these records, one line each, in order of key: equal records give equal text."""
    ordered = sorted(records.items(), key=lambda pair: (pair[0].isa, pair[0].device, pair[0].threads, pair[0].workload))
    return "".join(encode(key, record) for key, record in ordered)


def write(path: Path, records: Mapping[Key, Record]) -> None:
    """Write a compact database, whole or not at all. Raises TargetError."""
    staged = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(compact(records), encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise TargetError(f"the schedule database {path} cannot be written: {error.strerror}") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise TargetError(f"the schedule database {path} cannot be read: {error.strerror}") from error


@cache
def _read_shipped(folder: Path) -> dict[Key, Record]:
    return merged(read(path)[0] for path in sorted(folder.glob("*.jsonl")))


def _rank(record: Record) -> tuple[tuple[int, ...], bool, float]:
    """Smaller is better."""
    newer = tuple(-int(part) for part in record.tvm.split(".") if part.isdigit())
    return newer, not record.complete, record.time_us


def _parse_line(line: str) -> tuple[Key, Record] | None:
    try:
        entry = json.loads(line)
        key = Key(str(entry["workload"]), str(entry["isa"]), int(entry["threads"]), str(entry.get("device", "")))
        decision = entry["decision"]
        if not isinstance(decision, dict):
            return None
        record = Record(
            template=str(entry["template"]),
            version=int(entry["version"]),
            decision=decision,
            time_us=float(entry["time_us"]),
            trials=int(entry["trials"]),
            complete=bool(entry["complete"]),
            kernel=str(entry.get("kernel", "")),
            tried=tuple(int(i) for i in entry.get("tried", ())),
            tvm=str(entry["tvm"]),
            measured_on=str(entry.get("measured_on", "")),
        )
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return key, record
