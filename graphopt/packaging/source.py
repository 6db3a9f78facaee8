"""What of an artifact goes into a package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import TargetError
from graphopt.runtime.artifact import MODEL, check_files, library_folders, read_manifest
from graphopt.runtime.tvm_engine import LIBRARY, read_description

Tensors = list[dict[str, Any]]


@dataclass(frozen=True)
class Library:
    """A compiled library of the artifact, and what its engine.json says of it."""

    path: Path
    target: str
    description: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An artifact that was found whole. `libraries` are in the order in which a processor should try them; there are
    none where ONNX Runtime runs the model."""

    folder: Path
    manifest: Mapping[str, Any]
    libraries: tuple[Library, ...]

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def arch(self) -> str | None:
        """Of the libraries; None where there are none."""
        return str(self.libraries[0].description["arch"]) if self.libraries else None

    @property
    def inputs(self) -> Tensors:
        """Name, dtype and shape of each input: of the libraries, else of the model."""
        return list(self.libraries[0].description["inputs"] if self.libraries else self.manifest["signature"]["inputs"])

    @property
    def outputs(self) -> Tensors:
        return list(
            self.libraries[0].description["outputs"] if self.libraries else self.manifest["signature"]["outputs"]
        )


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read an artifact folder; its libraries need not run here. Raises ArtifactError: not one, or
    damaged; TargetError: it is for a GPU, in parts for two engines, or for several sizes."""
    folder = Path(path).absolute()
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest["engine"] == "hybrid":
        raise TargetError(
            f"{path} runs in parts, on TVM and ONNX Runtime; a package has one engine",
            hint="graphopt.load opens it; or optimize with --engine onnxruntime",
        )
    if manifest.get("sizes"):
        raise TargetError(
            f"{path} has functions for several sizes; a package is for one",
            hint="graphopt.load opens it; or optimize with --input",
        )
    libraries = tuple(
        Library(folder / name / LIBRARY, target, read_description(folder / name))
        for name, target in library_folders(manifest)
    )
    for library in libraries:
        device = library.description.get("device")
        if device is not None:
            raise TargetError(f"{path} runs on {device}; packages are for processors", hint="graphopt.load opens it")
    return Source(folder, manifest, libraries)
