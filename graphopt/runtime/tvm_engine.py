"""Run a model that TVM compiled: `model.so` and `engine.json` of an artifact folder.

Nothing here needs TVM's compiler, only its runtime.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.capabilities import host_features
from graphopt.errors import ArtifactError, DataError

LIBRARY = "model.so"
DESCRIPTION = "engine.json"
FORMAT = 1


class TvmEngine:
    """A loaded model. One engine may be used by one thread at a time.

    `threads` None or 0: all processors this process may use.
    Raises ArtifactError when a file is missing or damaged, or the library needs instructions this processor lacks.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.folder = Path(folder)
        description = _read_description(self.folder)
        _check_processor(description, self.folder)
        library = self.folder / LIBRARY
        _check_whole(library, description)
        self.threads = threads or available_processors()
        _prepare_pool()

        import tvm
        from tvm.runtime.vm import VirtualMachine

        try:
            module: Any = _load(library, description["library_sha256"])
            processor: Any = tvm.cpu()
            self._machine = VirtualMachine(module, processor)
            self._main = self._machine["main"]
        except (RuntimeError, OSError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{library} cannot be loaded: {_last_line(error)}", hint="build the artifact again"
            ) from error
        self._inputs = [_Slot(spec) for spec in description["inputs"]]
        self._outputs = [str(spec["name"]) for spec in description["outputs"]]
        self._tensors = [slot.tensor for slot in self._inputs]
        self._configured = threading.local()

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by input name."""
        return {slot.name: slot.shape for slot in self._inputs}

    @property
    def input_dtypes(self) -> dict[str, np.dtype]:
        """Element type by input name."""
        return {slot.name: slot.dtype for slot in self._inputs}

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name. They belong to the caller: a later call does not touch them.

        Raises DataError for a missing or unknown input, a wrong shape, or an element type that does not convert
        without loss.
        """
        if getattr(self._configured, "threads", None) != self.threads:
            set_threads(self.threads)
            self._configured.threads = self.threads
        for slot in self._inputs:
            slot.fill(feeds)
        if len(feeds) != len(self._inputs):
            unknown = sorted(set(feeds) - {slot.name for slot in self._inputs})
            raise DataError(
                f"the model has no input {unknown[0]!r}", hint=f"its inputs: {', '.join(self.input_shapes)}"
            )
        result = self._main(*self._tensors)
        if len(self._outputs) == 1 and hasattr(result, "numpy"):
            return {self._outputs[0]: result.numpy()}
        return {name: result[i].numpy() for i, name in enumerate(self._outputs)}


class _Slot:
    """One input: a tensor the compiled code reads, and a view of it that feeds are copied into."""

    def __init__(self, spec: Mapping[str, Any]):
        import tvm

        self.name = str(spec["name"])
        self.shape = tuple(int(d) for d in spec["shape"])
        self.dtype = np.dtype(spec["dtype"])
        self.tensor = tvm.runtime.empty(self.shape, str(self.dtype), tvm.cpu())
        self.view = _writable_view(self.tensor, self.shape, self.dtype)

    def fill(self, feeds: Mapping[str, np.ndarray]) -> None:
        array = feeds.get(self.name)
        if array is None:
            raise DataError(f"input {self.name!r} is missing")
        array = np.asarray(array)
        if array.shape != self.shape:
            raise DataError(f"input {self.name!r} has shape {list(array.shape)}, the model takes {list(self.shape)}")
        if array.dtype != self.dtype and not np.can_cast(array.dtype, self.dtype, "same_kind"):
            raise DataError(f"input {self.name!r} is {array.dtype}, the model takes {self.dtype}")
        np.copyto(self.view, array, casting="same_kind")


def _writable_view(tensor, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """numpy's own view of a DLPack tensor may be read-only; the address is the same."""
    if 0 in shape:
        return np.empty(shape, dtype)
    address = np.from_dlpack(tensor).ctypes.data
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    view: Any = memory
    return np.frombuffer(view, dtype).reshape(shape)


_loaded: dict[str, str] = {}
"""Digest of the library first loaded from a path, for the life of the process."""


def _load(library: Path, digest: str):
    """Load a library.

    The dynamic linker knows libraries by path and would hand out an older file of the same path again, so one that was
    built anew is loaded from a copy.
    """
    import tvm

    path = os.path.realpath(library)
    if _loaded.setdefault(path, digest) == digest:
        return tvm.runtime.load_module(path)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        copy = shutil.copy(path, Path(folder) / library.name)
        return tvm.runtime.load_module(str(copy))


def available_processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare_pool() -> None:
    """TVM reads these when a thread first uses its pool; by itself it takes half of the processors and pins them."""
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    asked = os.environ.get("TVM_NUM_THREADS", "")
    if not asked.isdigit() or int(asked) < available_processors():
        os.environ["TVM_NUM_THREADS"] = str(available_processors())


def set_threads(threads: int) -> None:
    """How many threads of TVM's pool work for the calling thread; 0: all processors."""
    _prepare_pool()
    import tvm_ffi

    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(1, threads or available_processors())  # 1: the fast cores first


def library_digest(path: Path) -> str:
    """sha256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint="is this an artifact that TVM compiled?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="build the artifact again") from error
    wanted = {"format", "arch", "features", "library_sha256", "inputs", "outputs"}
    if not isinstance(description, dict) or not wanted <= set(description):
        raise ArtifactError(f"{path} is damaged", hint="build the artifact again")
    if description["format"] != FORMAT:
        raise ArtifactError(f"{path} has format {description['format']}, this graphopt reads {FORMAT}")
    return description


def _check_processor(description: Mapping[str, Any], folder: Path) -> None:
    here = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if description["arch"] != here:
        raise ArtifactError(f"{folder} was built for {description['arch']}, this machine is {here}")
    missing = sorted(set(description["features"]) - host_features())
    if missing:
        raise ArtifactError(
            f"{folder} was built for a processor ({description.get('mcpu', '?')}) with {', '.join(missing)}, "
            "which this one lacks",
            hint="build it here, or with --target 'cpu{mcpu=x86-64-v3}'",
        )


def _check_whole(library: Path, description: Mapping[str, Any]) -> None:
    """A truncated library would end the process when it is mapped, so its digest is checked first."""
    try:
        digest = library_digest(library)
    except FileNotFoundError:
        raise ArtifactError(f"{library} is missing", hint="build the artifact again") from None
    except OSError as error:
        raise ArtifactError(f"{library} cannot be read: {error.strerror}") from error
    if digest != description["library_sha256"]:
        raise ArtifactError(f"{library} is damaged: it is not the file that was built", hint="build the artifact again")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
