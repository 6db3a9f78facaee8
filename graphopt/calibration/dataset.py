"""Data in: calibration and evaluation samples, from arrays, pictures, or a random generator.

A sample is one picture, one utterance, ...: what the model takes with a batch of one. Storage decodes on demand, so
a data set can be larger than memory where its source allows it (pictures do; an `.npz` is read whole).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from graphopt.errors import DataError, nearest
from graphopt.model import Signature, TensorSpec


class Storage(Protocol):
    """Where samples come from."""

    @property
    def count(self) -> int:
        """How many samples there are."""
        ...

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The samples at these indices, stacked along axis 0."""
        ...


class Dataset:
    """Samples a model can be fed with, and their labels where there are any.

    `names`: the inputs. `labels`: int64 (len,) or None. `source`: where it came from, for reports.
    `is_random`: True for made-up data. `fixed_batch`: the batch the model insists on, or None.
    """

    def __init__(
        self,
        storage: Storage,
        signature: Signature,
        *,
        source: str,
        labels: np.ndarray | None = None,
        is_random: bool = False,
        whole: frozenset[str] = frozenset(),
        rows: np.ndarray | None = None,
    ):
        self._storage = storage
        self._signature = signature
        self._whole = whole
        self._rows = np.arange(storage.count) if rows is None else rows
        self._all_labels = labels
        self.source = source
        self.is_random = is_random
        self.names = tuple(spec.name for spec in signature.inputs)
        self.labels = None if labels is None else labels[self._rows]
        self.fixed_batch = 1 if whole else _fixed_batch(signature)

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Feeds of up to `size` samples, in order.

        A model with a fixed batch gets batches of exactly that many samples whatever `size` is; the last one is
        filled up by repeating its last sample (the first `len(dataset)` rows in all are the real ones).
        """
        step = self.fixed_batch or max(1, size)
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            if self.fixed_batch is not None and len(rows) < step:
                rows = np.concatenate([rows, np.repeat(rows[-1:], step - len(rows))])
            feeds = self._storage.read(rows)
            yield {name: array[0] if name in self._whole else array for name, array in feeds.items()}

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The samples at these positions, in the order given."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return Dataset(
            self._storage,
            self._signature,
            source=self.source,
            labels=self._all_labels,
            is_random=self.is_random,
            whole=self._whole,
            rows=rows,
        )

    def draw(self, count: int, seed: int) -> tuple[Dataset, Dataset]:
        """`count` samples drawn without replacement and the rest, both in their original order. Raises DataError."""
        if not 0 <= count <= len(self):
            raise DataError(f"cannot draw {count} of the {len(self)} samples of {self.source}")
        order = np.random.default_rng(seed).permutation(len(self))
        return self.subset(np.sort(order[:count])), self.subset(np.sort(order[count:]))

    def check_labels(self, classes: int) -> None:
        """Raises DataError where a label is not one of `classes` classes."""
        if self.labels is None:
            return
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            raise DataError(
                f"{self.source}: label {self.labels[wrong[0]]} of sample {wrong[0]} is out of range: the model has "
                f"{classes} classes",
                hint=f"labels go from 0 to {classes - 1}",
            )


def load_dataset(path: str | Path, signature: Signature, preprocess: str | Path | None = None) -> Dataset:
    """Read an `.npz` (one array an input, first axis samples, optional `labels`) or a folder of pictures.

    A folder holds `labels.csv` (columns `file`, relative to it, and `class_index` or `label`), or just pictures:
    then there are no labels. Pictures need `preprocess`: a preset's name or a TOML file (see
    `graphopt.calibration.preprocess`). An array of an input of shape (N, ...) is (samples, ...); where the model's
    batch is not axis 0, give whole inputs: (samples, *input shape). Raises DataError.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"no such file or folder: {path}", hint="give an .npz file or a folder of pictures")
    if file.is_dir() or file.suffix.lower() == ".csv":
        from graphopt.calibration.pictures import load_pictures

        return load_pictures(file, signature, preprocess)
    return _load_arrays(file, signature)


def random_dataset(signature: Signature, count: int, seed: int) -> Dataset:
    """Made-up samples: floats standard normal, uint8 uniform, other integers 0 or 1, booleans fair.

    A dynamic axis 0 is one sample; any other dynamic dimension is refused. Raises DataError.
    """
    batch_names = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        shape = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                shape.append(dim)
            elif axis == 0 or dim in batch_names:
                shape.append(1)
            else:
                raise DataError(f"input {spec} has a dynamic dimension {dim or '?'}", hint="fix it with --input")
        arrays[spec.name] = _random_array(rng, (count, *shape), spec.dtype)
    if all((spec.shape and spec.shape[0] in (1, None)) or _is_named_batch(spec) for spec in signature.inputs):
        arrays = {name: array[:, 0] for name, array in arrays.items()}
        whole: frozenset[str] = frozenset()
    else:
        whole = frozenset(arrays)
    return Dataset(_Arrays(arrays), signature, source=f"random (seed {seed})", is_random=True, whole=whole)


def _is_named_batch(spec: TensorSpec) -> bool:
    return bool(spec.shape) and isinstance(spec.shape[0], str) and spec.shape[0] not in spec.shape[1:]


def _random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, 256 if dtype == np.uint8 else 2, shape).astype(dtype)
    raise DataError(f"no random data can be made of type {dtype}", hint="give an .npz")


def _fixed_batch(signature: Signature) -> int | None:
    fixed = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise DataError(
            f"the model's inputs have different first dimensions {sorted(fixed)}",
            hint="give whole inputs: arrays of shape (samples, *input shape)",
        )
    return fixed.pop() if fixed else None


class _Arrays:
    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        self.count = len(next(iter(self.arrays.values())))

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.ascontiguousarray(array[rows]) for name, array in self.arrays.items()}


def _load_arrays(file: Path, signature: Signature) -> Dataset:
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{file} is a single array, not an .npz", hint="save it with numpy.savez(file, name=x)")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot read {file} as .npz: {text}", hint="arrays of plain numbers only") from error
    labels = arrays.pop("labels", None) if all(spec.name != "labels" for spec in signature.inputs) else None
    known = [spec.name for spec in signature.inputs]
    for name in arrays:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"the model's inputs are: {', '.join(known)}"
            raise DataError(f"{file} has an array {name!r}, which is no input of the model", hint=hint)
    ready: dict[str, np.ndarray] = {}
    whole: set[str] = set()
    for spec in signature.inputs:
        if spec.name not in arrays:
            raise DataError(f"{file} has no array for input {spec}", hint=f"it has: {', '.join(arrays) or 'nothing'}")
        array = arrays[spec.name]
        if array.ndim == len(spec.shape) + 1 and _fits(array.shape[1:], spec.shape):
            whole.add(spec.name)
        elif not (array.ndim == len(spec.shape) >= 1 and _fits(array.shape[1:], spec.shape[1:])):
            raise DataError(
                f"{file}: array {spec.name!r} has shape {list(array.shape)}, the input is {spec}",
                hint="the first axis counts samples, the others are those of the input",
            )
        ready[spec.name] = _cast(array, spec, file)
    counts = {name: len(array) for name, array in ready.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{file}: arrays have different numbers of samples: {counts}")
    count = next(iter(counts.values()))
    if count == 0:
        raise DataError(f"{file} holds no samples")
    dataset = Dataset(
        _Arrays(ready),
        signature,
        source=file.name,
        labels=None if labels is None else _checked_labels(labels, count, file),
        whole=frozenset(whole),
    )
    check_against_outputs(dataset, signature)
    return dataset


def check_against_outputs(dataset: Dataset, signature: Signature) -> None:
    """Check labels where the first output says how many classes there are."""
    first = signature.outputs[0].shape if signature.outputs else ()
    if len(first) == 2 and isinstance(first[1], int):
        dataset.check_labels(first[1])


def _fits(shape: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(w, int) or w == s for s, w in zip(shape, wanted, strict=True)
    )


def _cast(array: np.ndarray, spec: TensorSpec, file: Path) -> np.ndarray:
    if array.dtype.kind not in "fiub" or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
        raise DataError(f"{file}: array {spec.name!r} is {array.dtype}, the input is {spec}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"{file}: array {spec.name!r} has NaN or infinity, first in sample {where}")
    if array.dtype == spec.dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(spec.dtype)
    lost = not np.isfinite(cast).all() if cast.dtype.kind == "f" else bool((cast != array).any())
    if lost:
        raise DataError(f"{file}: array {spec.name!r} ({array.dtype}) has values outside the input's {spec.dtype}")
    return cast


def _checked_labels(labels: np.ndarray, count: int, file: Path) -> np.ndarray:
    flat = labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else labels
    if flat.dtype.kind not in "iu" or flat.ndim != 1:
        raise DataError(f"{file}: labels must be class indices: integers of shape ({count},), not {labels.dtype}"
                        f"{list(labels.shape)}")  # fmt: skip
    if len(flat) != count:
        raise DataError(f"{file}: {len(flat)} labels for {count} samples")
    return flat.astype(np.int64)
