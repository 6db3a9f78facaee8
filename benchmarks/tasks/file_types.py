"""File types: files whose type their ending tells, from this project, Python's library and what is installed."""

from __future__ import annotations

import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from shared_data import SHARED

from tasks.base import Outcome, Run, Task, arrays_file, from_arrays

ENDINGS = {
    ".c": "c", ".cc": "cpp", ".cmake": "cmake", ".cpp": "cpp", ".css": "css", ".csv": "csv", ".gif": "gif",
    ".gz": "gzip", ".html": "html", ".jpg": "jpeg", ".js": "javascript", ".json": "json", ".md": "markdown",
    ".npy": "npy", ".npz": "npz", ".onnx": "onnx", ".pdf": "pdf", ".png": "png", ".proto": "proto", ".py": "python",
    ".pyc": "pythonbytecode", ".rst": "rst", ".sh": "shell", ".so": "elf", ".svg": "svg", ".toml": "toml",
    ".ttf": "ttf", ".wav": "wav", ".yaml": "yaml", ".yml": "yaml", ".zip": "zip",
}  # fmt: skip
EACH, SMALLEST = 24, 64
"""Files of one ending at most; bytes of a file at least."""
HALF, PADDING = 1024, 256


@dataclass(frozen=True)
class FileTypes(Task):
    """Magika: 2048 bytes of a file into 214 labels."""

    def arguments(self, work: Path) -> list[str]:
        file = arrays_file(work, self.name, lambda: _labelled(_files()[::2]))
        return from_arrays(file, len(np.load(file)["labels"]) // 2)

    def outcome(self, run: Run, work: Path) -> Outcome:
        data = np.load(arrays_file(work, "file-types", lambda: _labelled(_files()[1::2])))
        found = [int(run({"bytes": each[None]})["target_label"].argmax()) for each in data["bytes"]]
        return {"classes": np.array(found), "labels": data["labels"]}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        right = outcome["classes"] == outcome["labels"]
        return {f"% right by ending of {len(right)} files": 100 * float(right.mean())}

    def against(self, outcome: Outcome, reference: Outcome) -> dict[str, float]:
        return {"% same label": 100 * float((outcome["classes"] == reference["classes"]).mean())}


@cache
def _files() -> list[Path]:
    """Up to EACH of every ending, in the order of their names."""
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in (Path(__file__).resolve().parents[2], SHARED, *map(sysconfig.get_path, ("stdlib", "purelib"))):
        for file in sorted(Path(folder).rglob("*")):
            if file.suffix in ENDINGS and file.is_file() and file.stat().st_size >= SMALLEST:
                found[file.suffix].append(file)
    spaced = [[files[i * len(files) // EACH] for i in range(EACH)] if len(files) > EACH else files
              for _, files in sorted(found.items())]  # fmt: skip
    return [file for files in spaced for file in files]


def _labelled(files: list[Path]) -> dict[str, np.ndarray]:
    labels = (SHARED / "models" / "magika.labels.txt").read_text().split()
    return {
        "bytes": np.stack([_features(file) for file in files]),
        "labels": np.array([labels.index(ENDINGS[file.suffix]) for file in files]),
    }


def _features(file: Path) -> np.ndarray:
    """int32 (2048,): the beginning, stripped on the left, and the end, stripped on the right, each filled up."""
    data = file.read_bytes()
    head, tail = data[: 4 * HALF].lstrip()[:HALF], data[-4 * HALF :].rstrip()[-HALF:]
    row = np.full(2 * HALF, PADDING, np.int32)
    row[: len(head)] = np.frombuffer(head, np.uint8)
    row[2 * HALF - len(tail) :] = np.frombuffer(tail, np.uint8)
    return row
