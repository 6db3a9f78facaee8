"""Runs the model of this package. It needs numpy and apache-tvm-ffi; nothing of it has to be installed.

    from graphopt_model import Model

    model = Model()                      # the folder this file lies in
    outputs = model.run({"image": array})

Or once, from the command line: python graphopt_model.py INPUT.npz OUTPUT.npz
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Of package.json."""
ALIGNMENT = 64
"""Bytes: compiled code loads whole vectors from the start of its arguments."""
_SPIN_COUNT = "2000"
"""How often an idle worker yields before it sleeps; TVM's own 300000 keep a processor busy for 60 to 100 ms."""
_CPU, _POOLED = 1, 2
"""A device of DLPack, and an allocator of the virtual machine: memory of a run serves the next."""


class Error(Exception):
    """What went wrong, in a sentence."""


class Model:
    """A loaded model, for the shapes in `inputs`. It may be used by one thread at a time.

    `threads` work on a run; None or 0: all processors this process may use. Raises Error where a file is missing or
    damaged, and where this processor lacks what every library of the package was built for.
    """

    def __init__(self, folder: str | os.PathLike[str] = Path(__file__).parent, threads: int | None = None):
        self.folder = Path(folder)
        described = _read(self.folder / "package.json")
        chosen = _choose(described, self.folder)
        library = self.folder / chosen["file"]
        _check_whole(library, chosen["sha256"])
        self.threads = threads or len(os.sched_getaffinity(0))
        _prepare_pool(self.threads)
        _load_runtime(self.folder / "lib" / "libtvm_runtime.so", described["versions"])
        import tvm_ffi

        try:
            self._library: Any = tvm_ffi.load_module(str(library.absolute()))
            self._machine: Any = self._library.get_function("vm_load_executable")()
            self._machine.get_function("vm_initialization")(_CPU, 0, _POOLED)
            self._main: Any = self._machine.get_function("main")
        except (RuntimeError, OSError, ValueError, AttributeError) as error:
            raise Error(f"{library} cannot be loaded: {_last_line(error)}") from error
        self._slots = [_Slot(each) for each in described["inputs"]]
        self.inputs: dict[str, tuple[str, tuple[int, ...]]] = _signature(described["inputs"])
        """Element type and shape by name."""
        self.outputs: dict[str, tuple[str, tuple[int, ...]]] = _signature(described["outputs"])
        self.library: str = chosen["file"]
        """The file that was chosen."""
        self._borrowed: list[bool] | None = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name; they belong to the caller. An input is read where it lies if it is a writable,
        contiguous array of the model's type at a multiple of 64 bytes, and copied if not.

        Raises Error for a missing or unknown input, a wrong shape, or a type that does not convert without loss.
        """
        for name in feeds:
            if name not in self.inputs:
                raise Error(f"the model has no input {name!r}; its inputs: {', '.join(self.inputs)}")
        arguments = [slot.tensor_of(feeds) for slot in self._slots]
        _set_threads(self.threads)
        try:
            tensors = self._tensors(self._main(*arguments))
            if self._borrowed is None:
                self._borrowed = _borrowed(tensors, self._tensors(self._main(*arguments)), arguments)
        except RuntimeError as error:
            raise Error(f"the model failed: {_last_line(error)}") from error
        found = {}
        for name, tensor, borrowed in zip(self.outputs, tensors, self._borrowed, strict=True):
            array = np.from_dlpack(tensor)
            found[name] = array.copy() if borrowed or not array.flags.writeable else array
        return found

    def _tensors(self, result: Any) -> Any:
        return [result] if len(self.outputs) == 1 and hasattr(result, "__dlpack__") else list(result)


class _Slot:
    """One input, and memory of its own for arrays that cannot be read where they lie."""

    def __init__(self, described: Mapping[str, Any]):
        import tvm_ffi

        self.name = described["name"]
        self.shape = tuple(described["shape"])
        self.dtype = np.dtype(described["dtype"])
        size = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        room = np.empty(size + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.copy = room[start : start + size].view(self.dtype).reshape(self.shape)
        self.tensor: Any = tvm_ffi.from_dlpack(self.copy)
        self._as_tensor: Any = tvm_ffi.from_dlpack

    def tensor_of(self, feeds: Mapping[str, np.ndarray]) -> Any:
        if self.name not in feeds:
            raise Error(f"input {self.name!r} is missing")
        array = np.asarray(feeds[self.name])
        if array.shape != self.shape:
            raise Error(f"input {self.name!r} has shape {list(array.shape)}, the model takes {list(self.shape)}")
        if not np.can_cast(array.dtype, self.dtype, "same_kind"):
            raise Error(f"input {self.name!r} is {array.dtype}, the model takes {self.dtype}")
        flags = array.flags
        readable = array.dtype == self.dtype and array.dtype.isnative and flags.c_contiguous and flags.writeable
        if readable and array.ctypes.data % ALIGNMENT == 0:
            return self._as_tensor(array)
        np.copyto(self.copy, array, casting="same_kind")
        return self.tensor


def _borrowed(first: Any, second: Any, arguments: list[Any]) -> list[bool]:
    """Which outputs are not memory of their own: both calls gave it (a constant), or it lies in an argument or in
    another output. `first` and `second` are the results of two calls, both alive."""
    taken = [_span(tensor) for tensor in (*arguments, *second)]
    found = []
    for tensor in first:
        begin, end = _span(tensor)
        found.append(any(begin < other_end and other_begin < end for other_begin, other_end in taken))
        taken.append((begin, end))
    return found


def _span(tensor: Any) -> tuple[int, int]:
    array = np.from_dlpack(tensor)
    return array.ctypes.data, array.ctypes.data + array.nbytes


def _signature(described: list[dict[str, Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {each["name"]: (each["dtype"], tuple(each["shape"])) for each in described}


def _read(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path} cannot be read: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise Error(f"{path} is not of format {FORMAT}, which this loader reads")
    return described


def _choose(described: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The first library whose every instruction this processor has."""
    here = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if described["arch"] != here:
        raise Error(f"{folder} was built for {described['arch']}, this machine is {here}")
    has, refused = _features(), []
    for library in described["libraries"]:
        missing = sorted(set(library["features"]) - has)
        if not missing and library["tiles"] and not _allow_tiles():
            missing = ["AMX tile registers that the system lets it use"]
        if not missing:
            return library
        refused.append(f"{library['file']} is for {library['mcpu']} and needs {', '.join(missing)}")
    raise Error(f"this processor lacks what {folder} was built for: {'; '.join(refused)}")


def _features() -> set[str]:
    """What the processor can do, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )


def _allow_tiles() -> bool:
    """Ask Linux for the AMX tile registers: code that uses them unasked is ended with an illegal instruction."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data) == 0


def _check_whole(library: Path, digest: str) -> None:
    """A library that is cut short would end the process when it is mapped."""
    try:
        found = hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        raise Error(f"{library} cannot be read: {error.strerror}") from error
    if found != digest:
        raise Error(f"{library} is damaged: it is not the file that was packed")


def _load_runtime(path: Path, versions: Mapping[str, str]) -> None:
    """TVM's virtual machine, which registers itself with apache-tvm-ffi."""
    wanted = versions["apache-tvm-ffi"]
    try:
        import tvm_ffi
    except ImportError as error:
        raise Error(f"apache-tvm-ffi is not installed; pip install apache-tvm-ffi=={wanted}") from error
    try:
        if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
            ctypes.CDLL(str(path.absolute()), ctypes.RTLD_GLOBAL)
    except OSError as error:
        found = getattr(tvm_ffi, "__version__", "of another version")
        raise Error(
            f"{path} cannot be loaded: {error}; it was made for apache-tvm-ffi {wanted}, here is {found}"
        ) from error


def _prepare_pool(threads: int) -> None:
    """TVM reads these when a thread first uses its pool; by itself it takes half of the processors and pins them."""
    wanted = max(threads, len(os.sched_getaffinity(0)))
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPIN_COUNT)
    asked = os.environ.get("TVM_NUM_THREADS", "")
    if not asked.isdigit() or int(asked) < wanted:
        os.environ["TVM_NUM_THREADS"] = str(wanted)


_pool = threading.local()
"""`threads`: what the calling thread's pool is set to. TVM has one pool a thread, shared by all models in it."""


def _set_threads(threads: int) -> None:
    if getattr(_pool, "threads", None) != threads:
        import tvm_ffi

        configure: Any = tvm_ffi.get_global_func("runtime.config_threadpool")
        configure(1, threads)  # 1: the fast cores first
        _pool.threads = threads


def _last_line(error: BaseException) -> str:
    """What TVM's errors come down to: it puts a trace before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def main() -> int:
    """Run once: INPUT.npz has an array for each input."""
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python graphopt_model.py INPUT.npz OUTPUT.npz\n")
        return 2
    try:
        with np.load(sys.argv[1]) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
        np.savez(sys.argv[2], **Model().run(feeds))  # pyright: ignore[reportArgumentType]
    except (Error, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
