"""Run a model that is cut into parts for two engines: the folder with a `hybrid.json`.

Parts run one after another. Values go from one to the next without a copy: what ONNX Runtime writes lies where
compiled code can read it, and the other way round. A value is let go after its last reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError, DataError
from graphopt.runtime.entry_point import aligned_empty
from graphopt.runtime.onnxruntime_part import OnnxRuntimePart
from graphopt.runtime.tvm_engine import TvmEngine

DESCRIPTION = "hybrid.json"
FORMAT = 1

TensorType = tuple[np.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class PartFiles:
    """A part in a hybrid folder. `path`: of the ONNX file or the compiled folder in it."""

    engine: str
    path: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class HybridEngine:
    """A loaded model, with the interface of `TvmEngine`. One engine may be used by one thread at a time.

    `threads` None: all processors this process may use.
    Raises ArtifactError when a file is missing or damaged, or a library needs instructions this processor lacks.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.folder = Path(folder)
        inputs, outputs, fixed, parts = read_description(self.folder)
        self._inputs, self._outputs = inputs, outputs
        self._final = set(outputs)
        self._steps: list[_Step] = []
        last = {name: number for number, part in enumerate(parts) for name in part.inputs}
        for number, part in enumerate(parts):
            mine = {name: fixed[name] for name in part.outputs if name in fixed}
            done = tuple(n for n, reader in last.items() if reader == number and n not in self._final)
            self._steps.append(_Step(part, self.folder / part.path, mine, self._final, done, threads))

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by input name."""
        return {name: shape for name, (_, shape) in self._inputs.items()}

    @property
    def input_dtypes(self) -> dict[str, np.dtype]:
        """Element type by input name."""
        return {name: dtype for name, (dtype, _) in self._inputs.items()}

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name. They belong to the caller: a later call does not touch them.

        Raises DataError for a missing or unknown input, a wrong shape, or an element type that does not convert without
        loss; TargetError when an operator fails.
        """
        values: dict[str, Any] = self._checked(feeds)
        for step in self._steps:
            step.run(values)
            for name in step.done:
                values.pop(name, None)
        found = {name: _array(values[name]) for name in self._outputs}
        return {name: array.copy() if name in self._inputs else array for name, array in found.items()}

    def inputs_of(self, feeds: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """Copies of what part `number` reads in a run, for timing it alone."""
        values: dict[str, Any] = self._checked(feeds)
        for step in self._steps[:number]:
            step.run(values)
        return {name: np.array(_array(values[name])) for name in self._steps[number].part.inputs}

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {}
        for name, (dtype, shape) in self._inputs.items():
            array = feeds.get(name)
            if array is None:
                raise DataError(f"input {name!r} is missing")
            array = np.asarray(array)
            if array.shape != shape:
                raise DataError(f"input {name!r} has shape {list(array.shape)}, the model takes {list(shape)}")
            if array.dtype != dtype:
                if not np.can_cast(array.dtype, dtype, "same_kind"):
                    raise DataError(f"input {name!r} is {array.dtype}, the model takes {dtype}")
                array = array.astype(dtype)
            values[name] = array
        if len(feeds) != len(self._inputs):
            unknown = sorted(set(feeds) - set(self._inputs))
            raise DataError(f"the model has no input {unknown[0]!r}", hint=f"its inputs: {', '.join(self._inputs)}")
        return values


class _Step:
    """A part, opened. `done`: names of values that nobody reads after it."""

    def __init__(
        self,
        part: PartFiles,
        path: Path,
        fixed: Mapping[str, TensorType],
        final: set[str],
        done: Sequence[str],
        threads: int | None,
    ):
        self.part, self.done = part, done
        self._compiled = self._model = None
        if part.engine == "tvm":
            self._compiled = TvmEngine(path, threads)
            return
        self._model = OnnxRuntimePart(path, part.inputs, part.outputs, fixed, threads)
        # What stays inside the engine has one place for all runs; what is given to the caller, a new one each time.
        self._kept = {name: aligned_empty(shape, dtype) for name, (dtype, shape) in fixed.items() if name not in final}
        self._given = {name: kind for name, kind in fixed.items() if name in final}

    def run(self, values: dict[str, Any]) -> None:
        if self._compiled is not None:
            values.update(self._compiled.run({name: values[name] for name in self.part.inputs}))
            return
        assert self._model is not None
        given = {name: aligned_empty(shape, dtype) for name, (dtype, shape) in self._given.items()}
        self._model.run(values, {**self._kept, **given})


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()


def write_description(
    folder: Path,
    inputs: Mapping[str, TensorType],
    outputs: Sequence[str],
    fixed: Mapping[str, TensorType],
    parts: Sequence[PartFiles],
) -> None:
    """Write hybrid.json. `fixed`: types of those values between parts and outputs that have static shapes."""
    described = {
        "format": FORMAT,
        "inputs": [_described(name, kind) for name, kind in inputs.items()],
        "outputs": list(outputs),
        "values": [_described(name, kind) for name, kind in fixed.items()],
        "parts": [{**vars(part), "inputs": list(part.inputs), "outputs": list(part.outputs)} for part in parts],
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _described(name: str, kind: TensorType) -> dict[str, Any]:
    return {"name": name, "dtype": str(kind[0]), "shape": list(kind[1])}


def read_description(
    folder: Path,
) -> tuple[dict[str, TensorType], tuple[str, ...], dict[str, TensorType], list[PartFiles]]:
    """What `write_description` was given. Raises ArtifactError: missing, unreadable, damaged, of another format."""
    path = folder / DESCRIPTION
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint="is this a model cut into parts?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="build the artifact again") from error
    try:
        if read["format"] != FORMAT:
            raise ArtifactError(f"{path} has format {read['format']}, this graphopt reads {FORMAT}")
        parts = [PartFiles(p["engine"], p["path"], tuple(p["inputs"]), tuple(p["outputs"])) for p in read["parts"]]
        return _types(read["inputs"]), tuple(read["outputs"]), _types(read["values"]), parts
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged", hint="build the artifact again") from error


def compiled_parts(folder: Path) -> list[Path]:
    """The folders of the compiled parts. Raises ArtifactError as `read_description` does."""
    return [folder / part.path for part in read_description(folder)[3] if part.engine == "tvm"]


def _types(described: Sequence[Mapping[str, Any]]) -> dict[str, TensorType]:
    return {each["name"]: (np.dtype(each["dtype"]), tuple(each["shape"])) for each in described}
