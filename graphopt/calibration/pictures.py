"""Folders of pictures, decoded lazily."""

from __future__ import annotations

import csv
from collections import OrderedDict
from pathlib import Path

import numpy as np

from graphopt.calibration.dataset import Dataset, check_against_outputs
from graphopt.calibration.preprocess import PRESETS, PictureFormat, load_preprocess
from graphopt.errors import DataError
from graphopt.model import Signature

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
CACHE_BYTES = 256 * 2**20
"""Fitted pictures kept, as uint8: evaluation visits the same ones again and again."""


def load_pictures(path: Path, signature: Signature, preprocess: str | Path | None) -> Dataset:
    """A folder (with or without labels.csv), or a csv file itself. Raises DataError."""
    if preprocess is None:
        raise DataError(
            f"{path} is a folder of pictures: say how they become the model's input",
            hint=f"give --preprocess: one of {', '.join(PRESETS)}, or a .toml file",
        )
    if len(signature.inputs) != 1:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise DataError(f"pictures need a model with one input, this one has: {names}", hint="give the data as .npz")
    spec = signature.inputs[0]
    layout = PictureFormat.fitting(load_preprocess(preprocess), spec)
    table = path / "labels.csv" if path.is_dir() else path
    if table.is_file():
        files, labels = _read_table(table)
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        labels = None
    if not files:
        raise DataError(f"{path} holds no pictures", hint=f"looked for {', '.join(sorted(SUFFIXES))}")
    dataset = Dataset(
        _Pictures(spec.name, files, layout), signature, source=f"{path.name} ({preprocess})", labels=labels
    )
    check_against_outputs(dataset, signature)
    return dataset


def _read_table(table: Path) -> tuple[list[Path], np.ndarray]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or ()
            label = next((c for c in ("class_index", "label") if c in columns), None)
            if "file" not in columns or label is None:
                raise DataError(
                    f"{table} has columns {', '.join(columns) or 'none'}", hint="it needs: file, class_index (or label)"
                )
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {error}") from error
    files, labels = [], []
    for number, row in enumerate(rows, start=2):
        try:
            labels.append(int(row[label]))
        except (TypeError, ValueError):
            raise DataError(f"{table} line {number}: {label} {row[label]!r} is not a class index") from None
        file = table.parent / str(row["file"])
        if not file.is_file():
            raise DataError(f"{table} line {number}: no such file: {row['file']}")
        files.append(file)
    return files, np.asarray(labels, np.int64)


class _Pictures:
    def __init__(self, name: str, files: list[Path], layout: PictureFormat):
        self.name = name
        self.files = files
        self.layout = layout
        self.count = len(files)
        self.cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self.cached_bytes = 0

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: self.layout.finish(np.stack([self._picture(int(row)) for row in rows]))}

    def _picture(self, row: int) -> np.ndarray:
        if row in self.cache:
            self.cache.move_to_end(row)
            return self.cache[row]
        array = self.layout.decode(self.files[row])
        self.cache[row] = array
        self.cached_bytes += array.nbytes
        while self.cached_bytes > CACHE_BYTES:
            _, dropped = self.cache.popitem(last=False)
            self.cached_bytes -= dropped.nbytes
        return array
