"""What can be timed: a model and the engine that runs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import MeasurementError

Engine = Literal["onnxruntime", "tvm", "hybrid", "artifact"]


@dataclass(frozen=True)
class Contender:
    """`path` is an ONNX file (`onnxruntime`), a compiled folder (`tvm`), a folder of parts
    (`hybrid`) or a folder that `graphopt.load` opens."""

    name: str
    path: Path
    engine: Engine
    trust: bool = False
    """Whether an artifact's library may be loaded that was not built here."""

    @classmethod
    def onnx(cls, path: str | os.PathLike[str], name: str | None = None) -> Contender:
        """An ONNX file in ONNX Runtime, all its optimisations on."""
        return cls(name or Path(path).name, Path(path), "onnxruntime")

    @classmethod
    def compiled(cls, folder: str | os.PathLike[str], name: str | None = None) -> Contender:
        """A folder that `graphopt.runtime.tvm_engine.TvmEngine` opens."""
        return cls(name or Path(folder).name, Path(folder), "tvm")

    @classmethod
    def hybrid(cls, folder: str | os.PathLike[str], name: str | None = None) -> Contender:
        """A folder that `graphopt.runtime.hybrid_engine.HybridEngine` opens."""
        return cls(name or Path(folder).name, Path(folder), "hybrid")

    @classmethod
    def artifact(cls, folder: str | os.PathLike[str], name: str | None = None, trust: bool = False) -> Contender:
        """An artifact folder, run as its user would."""
        return cls(name or Path(folder).name, Path(folder), "artifact", trust)

    @classmethod
    def of(cls, path: str | os.PathLike[str], name: str | None = None, trust: bool = False) -> Contender:
        """By what is there: a folder is an artifact, a file an ONNX model. Raises MeasurementError if nothing is."""
        if Path(path).is_dir():
            return cls.artifact(path, name, trust)
        if Path(path).is_file():
            return cls.onnx(path, name)
        raise MeasurementError(f"no such file or folder: {path}")

    @property
    def size_bytes(self) -> int:
        """Bytes on disk; external data of an ONNX file lies beside it and counts."""
        if self.path.is_dir():
            return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        beside = self.path.with_name(f"{self.path.name}.data")
        return sum(file.stat().st_size for file in (self.path, beside) if file.is_file())

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "path": str(self.path.absolute()), "engine": self.engine}


def check_names(contenders: Sequence[Contender]) -> None:
    """Raises MeasurementError when there is none, or two have one name."""
    names = [contender.name for contender in contenders]
    if not names:
        raise MeasurementError("nothing to time")
    for name in names:
        if names.count(name) > 1:
            raise MeasurementError(f"two contenders are named {name!r}", hint="give each its own name")
