"""One function of a library that TVM compiled: arrays go in by name, and come out by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.errors import DataError

ALIGNMENT = 64
"""Bytes: compiled code loads whole vectors from the start of its arguments."""


class EntryPoint:
    """A function of one set of shapes; `inputs` and `outputs` are as engine.json describes them."""

    def __init__(self, function: Any, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]):
        self._function = function
        self.slots = [Slot(spec) for spec in inputs]
        self.output_names = tuple(str(spec["name"]) for spec in outputs)
        self._borrowed: list[bool] | None = None

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by input name."""
        return {slot.name: slot.shape for slot in self.slots}

    @property
    def input_dtypes(self) -> dict[str, np.dtype]:
        """Element type by input name."""
        return {slot.name: slot.dtype for slot in self.slots}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, which belong to the caller. Raises DataError as `TvmEngine.run` does."""
        arguments = [slot.tensor_of(feeds) for slot in self.slots]
        if len(feeds) != len(self.slots):
            unknown = sorted(set(feeds) - {slot.name for slot in self.slots})
            raise DataError(
                f"the model has no input {unknown[0]!r}", hint=f"its inputs: {', '.join(self.input_shapes)}"
            )
        return self._called(arguments)

    def run_padded(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `run`, of arrays that may be smaller than the function's: they are filled up with zeros, behind what they
        hold. The outputs have the function's shapes. The feeds must be all inputs, and of their types and ranks.
        """
        return self._called([slot.padded(feeds[slot.name]) for slot in self.slots])

    def _called(self, arguments: list[Any]) -> dict[str, np.ndarray]:
        tensors = self._tensors(self._function(*arguments))
        if self._borrowed is None:
            again = self._tensors(self._function(*arguments))
            self._borrowed = _borrowed(tensors, again, arguments)
        outputs = {}
        for name, tensor, borrowed in zip(self.output_names, tensors, self._borrowed, strict=True):
            array = np.from_dlpack(tensor)  # an older numpy makes it read-only
            outputs[name] = array.copy() if borrowed or not array.flags.writeable else array
        return outputs

    def _tensors(self, result: Any) -> Any:
        return [result] if len(self.output_names) == 1 and hasattr(result, "numpy") else result


def _borrowed(first: Any, second: Any, arguments: list[Any]) -> list[bool]:
    """Which outputs are not memory of their own; `first` and `second` are the results of two calls, both alive.

    A memory that both calls gave is the library's: a constant. One that lies in an argument is the caller's, and two
    outputs may be views of one memory. What code does for one set of shapes, it does at every call.
    """
    taken = [_span(tensor) for tensor in (*arguments, *second)]
    found = []
    for tensor in first:
        begin, end = _span(tensor)
        found.append(any(begin < other_end and other_begin < end for other_begin, other_end in taken))
        taken.append((begin, end))
    return found


def _span(tensor: Any) -> tuple[int, int]:
    """First address of a tensor, and the one after its last."""
    array = np.from_dlpack(tensor)
    return array.ctypes.data, array.ctypes.data + array.nbytes


class Slot:
    """One input, and a tensor of its own for feeds that the compiled code cannot read where they lie."""

    def __init__(self, spec: Mapping[str, Any]):
        import tvm_ffi

        self.name = str(spec["name"])
        self.shape = tuple(int(d) for d in spec["shape"])
        self.dtype = np.dtype(spec["dtype"])
        self.copy = aligned_empty(self.shape, self.dtype)
        self.tensor: Any = tvm_ffi.from_dlpack(self.copy)
        self._as_tensor: Any = tvm_ffi.from_dlpack

    def tensor_of(self, feeds: Mapping[str, np.ndarray]) -> Any:
        """The feed as a tensor: a view where that is possible, else a copy."""
        array = feeds.get(self.name)
        if array is None:
            raise DataError(f"input {self.name!r} is missing")
        array = np.asarray(array)
        if array.shape != self.shape:
            raise DataError(f"input {self.name!r} has shape {list(array.shape)}, the model takes {list(self.shape)}")
        if array.dtype == self.dtype:
            flags = array.flags
            if flags.c_contiguous and flags.writeable and array.dtype.isnative:
                view = self._as_tensor(array)
                if view.data_ptr() % ALIGNMENT == 0:
                    return view
        elif not np.can_cast(array.dtype, self.dtype, "same_kind"):
            raise DataError(f"input {self.name!r} is {array.dtype}, the model takes {self.dtype}")
        np.copyto(self.copy, array, casting="same_kind")
        return self.tensor

    def padded(self, array: np.ndarray) -> Any:
        """A tensor of a feed that may be smaller, followed by zeros along each axis."""
        if array.shape != self.shape:
            self.copy.fill(0)
        self.copy[tuple(map(slice, array.shape))] = array
        return self.tensor


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that starts at a multiple of 64 bytes: as an input it is read without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
