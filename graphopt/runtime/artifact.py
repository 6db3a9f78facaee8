"""Opening and running an artifact: the folder that `graphopt optimize` writes. No compiler is needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError, DataError, nearest
from graphopt.runtime import trust as trusts

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
MODEL = "model.onnx"
GENERAL = "general.onnx"
"""What ONNX Runtime runs instead of the model where no function of the library is for a size."""
COMPILED = "compiled"
HYBRID = "hybrid"
LIBRARY_FILES = ("model.so", "engine.json")
"""What a library's folder holds."""

Outputs = dict[str, np.ndarray]


class Artifact:
    """A model ready to run: `artifact.run({"x": array}) -> {"y": array}`.

    The engine is the one that measured fastest. Of several libraries the first is loaded whose every instruction this
    processor has. A library compiled by TVM holds for one set of input shapes, or with `--sizes` for several, and so
    does a model in parts; calls with other shapes that the model allows (a larger batch, say) go to ONNX Runtime and
    `model.onnx`, or to the model that came in where that is faster there (`general.onnx`).
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int | None):
        self.folder = folder
        self.manifest = manifest
        self.threads = threads
        self.engine: str = manifest["engine"]
        self.target: str = str(manifest.get("target", ""))
        """What the library was built for that runs here, where the artifact has several."""
        self._inputs = {i["name"]: i for i in manifest["signature"]["inputs"]}
        self._compiled_run: Callable[[Mapping[str, np.ndarray]], Outputs] | None = None
        self._compiled_shapes: tuple[tuple[str, tuple[int, ...], np.dtype], ...] = ()
        self._flexible_run: Callable[[Mapping[str, np.ndarray]], Outputs] | None = None
        self._sized_run: Callable[[Mapping[str, np.ndarray]], Outputs | None] | None = None
        if self.engine == "tvm" and manifest.get("sizes"):
            from graphopt.runtime.sized_engine import SizedEngine

            self._sized_run = SizedEngine(folder / COMPILED, threads).run_if_held
        elif self.engine == "tvm":
            from graphopt.runtime.compiled import open_first

            folders = {folder / name: target for name, target in library_folders(manifest)}
            chosen, engine = open_first(list(folders), threads)
            self.target = folders[chosen]
            self._compiled_run = engine.run
        elif self.engine == "hybrid":
            from graphopt.runtime.hybrid_engine import HybridEngine

            self._compiled_run = HybridEngine(folder / HYBRID, threads).run
        else:
            self._open_flexible()
        if self._compiled_run is not None:
            self._compiled_shapes = tuple(
                (name, tuple(shape), np.dtype(self._inputs[name]["dtype"]))
                for name, shape in manifest["compiled_shapes"].items()
            )

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(o["name"] for o in self.manifest["signature"]["outputs"])

    def run(self, feeds: Mapping[str, np.ndarray]) -> Outputs:
        """All outputs by name. Raises DataError for a missing or unknown input, wrong dtype, rank or dimension."""
        if self._compiled_run is not None and len(feeds) == len(self._compiled_shapes):
            for name, shape, dtype in self._compiled_shapes:
                array = feeds.get(name)
                if array is None or array.shape != shape or array.dtype != dtype:
                    break
            else:
                return self._compiled_run(feeds)
        elif self._sized_run is not None and (outputs := self._sized_run(feeds)) is not None:
            return outputs
        self._check(feeds)
        return self._open_flexible()(feeds)

    def _open_flexible(self) -> Callable[[Mapping[str, np.ndarray]], Outputs]:
        if self._flexible_run is None:
            from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

            name = GENERAL if GENERAL in self.manifest["files"] else MODEL
            self._flexible_run = OnnxRuntimeEngine(self.folder / name, self.threads).run
        return self._flexible_run

    def _check(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name in feeds:
            if name not in self._inputs:
                near = nearest(name, self._inputs)
                hint = f"did you mean {near!r}?" if near else f"its inputs are: {', '.join(self._inputs)}"
                raise DataError(f"the model has no input {name!r}", hint=hint)
        for name, wanted in self._inputs.items():
            if name not in feeds:
                raise DataError(f"input {name!r} is missing")
            array = feeds[name]
            described = f"it is {wanted['dtype']}{wanted['shape']}"
            if array.dtype != np.dtype(wanted["dtype"]):
                raise DataError(f"input {name!r} has dtype {array.dtype}", hint=described)
            shape = wanted["shape"]
            fits = len(shape) == array.ndim and all(
                not isinstance(d, int) or d == n for d, n in zip(shape, array.shape, strict=True)
            )
            if not fits:
                raise DataError(f"input {name!r} has shape {list(array.shape)}", hint=described)

    def __repr__(self) -> str:
        return f"Artifact({str(self.folder)!r}, engine={self.engine!r}, threads={self.threads})"


def load(path: str | os.PathLike[str], threads: int | None = None, trust: bool = False) -> Artifact:
    """Open an artifact folder, checking that every file is as it was written; None threads: all cores.

    A compiled library is code that runs with your rights: one that you did not build here needs `trust=True`
    (see docs/security.md).

    Raises ArtifactError: not an artifact, from a newer graphopt, a file missing or damaged, a library of somebody else.
    """
    folder = Path(path).absolute()
    content, manifest = _read(folder)
    check_files(folder, manifest)
    if manifest["engine"] != "onnxruntime":
        trusts.require(folder, content, trust)
    if threads is not None and threads < 1:
        raise ArtifactError(f"threads={threads} must be at least 1")
    return Artifact(folder, manifest, threads)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises ArtifactError: a file is missing or is not as it was written, or a library is none of the files."""
    home = folder.resolve()
    for name, wanted in manifest["files"].items():
        if not (folder / name).resolve().is_relative_to(home):
            raise ArtifactError(f"{folder / MANIFEST} is damaged: {name!r} is not in the artifact's folder")
        if sha256(folder / name) != wanted:
            raise ArtifactError(f"{folder / name} is damaged: its sha256 differs from {MANIFEST}")
    if MODEL not in manifest["files"]:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it has no sha256 of {MODEL}")
    for name in _loaded(folder, manifest):
        if name not in manifest["files"]:
            raise ArtifactError(f"{folder / MANIFEST} is damaged: it has no sha256 of {name}")


def _loaded(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The files that the engine opens, apart from the model."""
    names = [f"{name}/{file}" for name, _ in library_folders(manifest) for file in LIBRARY_FILES]
    if manifest["engine"] == "hybrid":
        from graphopt.runtime.hybrid_engine import DESCRIPTION, read_description

        names.append(f"{HYBRID}/{DESCRIPTION}")
        for part in read_description(folder / HYBRID)[3]:
            files = [f"{part.path}/{file}" for file in LIBRARY_FILES] if part.engine == "tvm" else [part.path]
            names += [f"{HYBRID}/{file}" for file in files]
    return names


def require_trust(path: str | os.PathLike[str], trust: bool) -> None:
    """Raises ArtifactError where an artifact has a library that was not built here, unless `trust`."""
    folder = Path(path).absolute()
    content, manifest = _read(folder)
    if manifest["engine"] != "onnxruntime":
        trusts.require(folder, content, trust)


def library_folders(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Folder and target of each compiled library, in the order in which a processor should try them."""
    if manifest["engine"] != "tvm":
        return []
    libraries = manifest.get("libraries", [{"folder": COMPILED, "target": manifest.get("target", "")}])
    return [(str(each["folder"]), str(each["target"])) for each in libraries]


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with a manifest in it."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder. Raises ArtifactError."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The manifest as it lies there, and what it says."""
    if not folder.is_dir():
        raise ArtifactError(f"no such artifact folder: {folder}")
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it states no schema")
    if manifest["schema"] > MANIFEST_SCHEMA:
        raise ArtifactError(f"{folder} was written by a newer graphopt", hint="update graphopt to open it")
    wrong = _wrong(manifest)
    if wrong:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {wrong}")
    return content, manifest


def _wrong(manifest: Mapping[str, Any]) -> str:
    """What a manifest lacks, or has of another kind than it should; '' where it is right."""
    missing = {"engine", "signature", "files"} - manifest.keys()
    if manifest.get("engine") in ("tvm", "hybrid"):
        missing |= {"compiled_shapes"} - manifest.keys()
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    if manifest["engine"] not in ("tvm", "hybrid", "onnxruntime"):
        return f"its engine is {manifest['engine']!r}"[:80]
    try:
        for end in ("inputs", "outputs"):
            for tensor in manifest["signature"][end]:
                np.dtype(str(tensor["dtype"]))
                if not isinstance(tensor["name"], str) or not isinstance(tensor["shape"], list):
                    return f"its signature's {end}"
        names = {tensor["name"] for tensor in manifest["signature"]["inputs"]}
        for name, shape in manifest.get("compiled_shapes", {}).items():
            if name not in names or not all(isinstance(d, int) for d in shape):
                return "its compiled_shapes"
        for library in manifest.get("libraries", ()):
            if not isinstance(library["folder"], str) or not isinstance(library["target"], str):
                return "its libraries"
    except (TypeError, KeyError, AttributeError):
        return "its signature, shapes or libraries"
    files = manifest["files"]
    if not isinstance(files, dict) or not all(isinstance(v, str) and "\0" not in k for k, v in files.items()):
        return "its files"
    if manifest["engine"] == "tvm" and not manifest.get("libraries", [COMPILED]):
        return "it has no library"
    return ""


def write_manifest(folder: Path, content: Mapping[str, Any], files: list[str]) -> None:
    """Write the manifest last, a folder without one is no artifact; signed, so that it needs no word to be loaded."""
    digests = {name: sha256(folder / name) for name in files}
    text = json.dumps({"schema": MANIFEST_SCHEMA, **content, "files": digests}, indent=1) + "\n"
    trusts.sign(folder, text.encode())
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file. Raises ArtifactError: it cannot be read."""
    sha = hashlib.sha256()
    try:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                sha.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}") from error
    return sha.hexdigest()
