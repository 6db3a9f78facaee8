"""Arrays by name in one file, for another process to read: any dtype that models have, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 and its like by name from now on
import numpy as np

_TEXT = "text"


def save_arrays(each: Sequence[Mapping[str, np.ndarray]], path: Path) -> None:
    """Write a sequence of arrays by name. Arrays of objects must hold texts."""
    entries: dict[str, np.ndarray] = {}
    for group, arrays in enumerate(each):
        kinds = []
        for number, array in enumerate(map(np.asarray, arrays.values())):
            kind = _TEXT if array.dtype == object else array.dtype.name if array.dtype.kind == "V" else ""
            if kind == _TEXT:
                array = array.astype(np.str_)
            elif kind:  # numpy's format has no name for these: their bytes
                array = np.ascontiguousarray(array).reshape(array.shape).view(f"u{array.dtype.itemsize}")
            kinds.append(kind)
            entries[f"{group}_{number}"] = array
        entries[f"{group}"] = np.frombuffer(json.dumps([list(arrays), kinds]).encode(), np.uint8)
    with path.open("wb") as file:
        np.savez(file, count=np.array(len(each)), **entries)  # pyright: ignore[reportArgumentType]


def load_arrays(path: Path) -> list[dict[str, np.ndarray]]:
    """What `save_arrays` wrote."""
    found = []
    with np.load(path, allow_pickle=False) as archive:
        for group in range(int(archive["count"])):
            described = zip(*json.loads(archive[f"{group}"].tobytes()), strict=True)
            arrays = {name: _restored(archive[f"{group}_{n}"], kind) for n, (name, kind) in enumerate(described)}
            found.append(arrays)
    return found


def _restored(array: np.ndarray, kind: str) -> np.ndarray:
    if not kind:
        return array
    return array.astype(object) if kind == _TEXT else array.view(np.dtype(kind))
