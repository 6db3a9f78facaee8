"""Run a library that has a function for each of several sizes: `graphopt optimize --sizes`.

A call goes to the smallest function that holds it. Where a dimension may be padded (see `graphopt.sizes.padding`), the
inputs are filled up with zeros and what the zeros made is cut off the outputs; else sizes must be equal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.errors import ArtifactError, DataError
from graphopt.runtime.entry_point import EntryPoint
from graphopt.runtime.tvm_engine import SIZED, available_processors, open_machine, read_description, use_threads


@dataclass(frozen=True)
class _Entry:
    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    """By dimension, the sizes that the function is used for; its own size is the largest."""
    function: EntryPoint

    def holds(self, sizes: tuple[int, ...]) -> bool:
        return all(low <= n <= high for low, n, high in zip(self.smallest, sizes, self.largest, strict=True))


class SizedEngine:
    """A loaded model, with the interface of `TvmEngine`. One engine may be used by one thread at a time.

    Raises ArtifactError as `TvmEngine` does.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.folder = Path(folder)
        described = read_description(self.folder, (SIZED,))
        self.threads = threads or available_processors()
        machine = open_machine(self.folder, described)
        try:
            self._dimensions: dict[str, list[tuple[str, int]]] = {
                name: [(str(tensor), int(axis)) for tensor, axis in places]
                for name, places in described["dimensions"].items()
            }
            names = list(self._dimensions)
            self._cut = {
                str(tensor): [(int(axis), names.index(dimension)) for axis, dimension in axes]
                for tensor, axes in described["outputs"].items()
            }
            self._guards = [(str(tensor), int(axis), bool(first)) for tensor, axis, first in described["guards"]]
            entries = [
                _Entry(
                    tuple(int(each["sizes"][name][0]) for name in names),
                    tuple(int(each["sizes"][name][1]) for name in names),
                    EntryPoint(machine[each["function"]], each["inputs"], each["outputs"]),
                )
                for each in described["entries"]
            ]
            self._inputs = {
                name: (dtype, len(entries[0].function.input_shapes[name]))
                for name, dtype in entries[0].function.input_dtypes.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ArtifactError(f"{self.folder} is damaged", hint="build the artifact again") from error
        self._entries = sorted(entries, key=lambda each: math.prod(each.largest))
        self._chosen: dict[tuple[int, ...], _Entry | None] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `TvmEngine.run`. Raises DataError also where no function is for these sizes."""
        outputs = self.run_if_held(feeds)
        if outputs is None:
            shapes = ", ".join(f"{name}{list(np.shape(array))}" for name, array in feeds.items())
            raise DataError(f"nothing was compiled for {shapes}")
        return outputs

    def run_if_held(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """The outputs; None where the feeds are not what some function is for."""
        sizes = self._sizes(feeds)
        if sizes is None:
            return None
        if sizes not in self._chosen:
            self._chosen[sizes] = next((entry for entry in self._entries if entry.holds(sizes)), None)
        entry = self._chosen[sizes]
        if entry is None or not self._fits(feeds, entry):
            return None
        use_threads(self.threads)
        if sizes == entry.largest:
            return entry.function.run(feeds)
        if not self._is_guarded(feeds):
            return None
        outputs = entry.function.run_padded(feeds)
        for name, axes in self._cut.items():
            whole = [slice(None)] * outputs[name].ndim
            for axis, dimension in axes:
                whole[axis] = slice(sizes[dimension])
            outputs[name] = np.ascontiguousarray(outputs[name][tuple(whole)])
        return outputs

    def _sizes(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """The size of each dimension; None for feeds that lack an input, or contradict one another."""
        if len(feeds) != len(self._inputs):
            return None
        found = []
        for places in self._dimensions.values():
            size = None
            for name, axis in places:
                array = feeds.get(name)
                if array is None or array.ndim <= axis or size not in (None, array.shape[axis]):
                    return None
                size = array.shape[axis]
            found.append(size)
        return tuple(found)

    def _fits(self, feeds: Mapping[str, np.ndarray], entry: _Entry) -> bool:
        """Types, ranks, and the sizes that are none of a dimension."""
        moving = {place for places in self._dimensions.values() for place in places}
        for name, shape in entry.function.input_shapes.items():
            array = feeds.get(name)
            if array is None or array.dtype != self._inputs[name][0] or array.ndim != len(shape):
                return False
            if any(have != want for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True))
                   if (name, axis) not in moving):  # fmt: skip
                return False
        return True

    def _is_guarded(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """Whether each row of the masks that padding relies on leaves something, or its first element."""
        return all(
            bool(np.take(feeds[name], 0, axis).all() if first else feeds[name].any(axis).all())
            for name, axis, first in self._guards
        )
