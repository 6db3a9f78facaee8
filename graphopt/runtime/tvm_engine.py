"""Run a model that TVM compiled: `model.so` and `engine.json` of an artifact folder.

Nothing here needs TVM's compiler, only its runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.capabilities import host_arch, host_features
from graphopt.errors import ArtifactError
from graphopt.runtime import amx_permission
from graphopt.runtime.entry_point import EntryPoint

LIBRARY = "model.so"
DESCRIPTION = "engine.json"
FORMAT, SIZED = 1, 2
"""Of an engine.json with the function `main`, and of one with a function for each of several sizes."""
SPIN_COUNT = 2000
"""How often an idle worker yields before it sleeps: about half a millisecond, longer than most serial kernels take.

TVM's own 300000 keep a processor busy for 60 to 100 ms after every call. Waking a sleeping worker costs 2 us.
"""


class TvmEngine:
    """A loaded model. One engine may be used by one thread at a time.

    `threads` None or 0: all processors this process may use.
    Raises ArtifactError when a file is missing or damaged, or the library needs instructions this processor lacks.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.folder = Path(folder)
        description = read_description(self.folder, (FORMAT,))
        self.threads = threads or available_processors()
        self._machine = open_machine(self.folder, description)
        self._entry = EntryPoint(self._machine["main"], description["inputs"], description["outputs"])
        self.layer_calls: tuple[tuple[str, str], ...] = tuple((k, layer) for k, layer in description.get("layers", ()))
        """The calls of kernels in a run, in order: the kernel, and the layer whose weights it reads, or ''."""

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by input name."""
        return self._entry.input_shapes

    @property
    def input_dtypes(self) -> dict[str, np.dtype]:
        """Element type by input name."""
        return self._entry.input_dtypes

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._entry.output_names

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name. They belong to the caller: a later call does not touch them.

        An input is read where it lies if it is a writable, contiguous array of the model's type that starts at a
        multiple of 64 bytes (numpy's readiness to export it asks for the first, the vector loads for the last);
        others are copied. Raises DataError for a missing or unknown input, a wrong shape, or an element type that
        does not convert without loss.
        """
        use_threads(self.threads)
        return self._entry.run(feeds)

    def watch(self, function: Any) -> None:
        """Have TVM call `function` before and after each call of a kernel, for as long as the engine lives.

        Its arguments are those of `VirtualMachine.set_instrument`.
        """
        self._machine.set_instrument(function)


def open_machine(folder: Path, description: Mapping[str, Any]) -> Any:
    """TVM's virtual machine with the library of `folder`, whose engine.json is `description`.

    Raises ArtifactError: missing or damaged, or of instructions that this processor lacks.
    """
    check_processor(description, folder)
    library = folder / LIBRARY
    check_whole(library, description)
    _prepare_pool()

    import tvm
    from tvm.runtime.vm import VirtualMachine

    try:
        module: Any = load_library(library, description["library_sha256"])
        processor: Any = tvm.cpu()
        return VirtualMachine(module, processor)
    except (RuntimeError, OSError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{library} cannot be loaded: {last_line(error)}", hint="build the artifact again"
        ) from error


_loaded: dict[str, str] = {}
"""Digest of the library first loaded from a path, for the life of the process."""


def load_library(library: Path, digest: str):
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
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPIN_COUNT))
    asked = os.environ.get("TVM_NUM_THREADS", "")
    if not asked.isdigit() or int(asked) < available_processors():
        os.environ["TVM_NUM_THREADS"] = str(available_processors())


_pool = threading.local()
"""`threads`: what the calling thread's pool is set to. TVM has one pool a thread, shared by all engines in it."""


def use_threads(threads: int) -> None:
    """`set_threads`, where the calling thread's pool is set to another number."""
    if getattr(_pool, "threads", None) != threads:
        set_threads(threads)


def set_threads(threads: int) -> None:
    """How many threads of TVM's pool work for the calling thread; 0: all processors."""
    _prepare_pool()
    import tvm_ffi

    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(1, threads or available_processors())  # 1: the fast cores first
    _pool.threads = threads


def library_digest(path: Path) -> str:
    """sha256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def read_description(folder: Path, formats: Collection[int] = (FORMAT, SIZED)) -> dict[str, Any]:
    """The content of an engine.json. Raises ArtifactError: missing, unreadable, damaged, of another format."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint="is this an artifact that TVM compiled?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint="build the artifact again") from error
    if not isinstance(description, dict) or not {"format", "arch", "features", "library_sha256"} <= set(description):
        raise ArtifactError(f"{path} is damaged", hint="build the artifact again")
    if description["format"] not in formats:
        read = " or ".join(map(str, formats))
        raise ArtifactError(f"{path} has format {description['format']}, this reads {read}")
    if not ({"inputs", "outputs"} if description["format"] == FORMAT else {"entries"}) <= set(description):
        raise ArtifactError(f"{path} is damaged", hint="build the artifact again")
    return description


def check_processor(description: Mapping[str, Any], folder: Path) -> None:
    """Raises ArtifactError where a library needs instructions, or registers, that this processor or system lacks: code
    that used them would end the process."""
    here = host_arch()
    if description["arch"] != here:
        raise ArtifactError(f"{folder} was built for {description['arch']}, this machine is {here}")
    missing = sorted(set(description["features"]) - host_features())
    if missing:
        raise ArtifactError(
            f"{folder} was built for a processor ({description.get('mcpu', '?')}) with {', '.join(missing)}, "
            "which this one lacks",
            hint="build it here, or with --target 'cpu{mcpu=x86-64-v3}'",
        )
    # A description without "tiles" is of a time when only bfloat16 kernels used them.
    older = description.get("precision") == "bfloat16" and "amx_bf16" in description["features"]
    if description.get("tiles", older):
        amx_permission.require(str(folder))


def check_whole(library: Path, description: Mapping[str, Any]) -> None:
    """A truncated library would end the process when it is mapped, so its digest is checked first."""
    try:
        digest = library_digest(library)
    except FileNotFoundError:
        raise ArtifactError(f"{library} is missing", hint="build the artifact again") from None
    except OSError as error:
        raise ArtifactError(f"{library} cannot be read: {error.strerror}") from error
    if digest != description["library_sha256"]:
        raise ArtifactError(f"{library} is damaged: it is not the file that was built", hint="build the artifact again")


def last_line(error: BaseException) -> str:
    """What a library's error comes down to: TVM puts a trace before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
