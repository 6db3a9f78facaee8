"""Run a model that was compiled for a GPU: `model.so` and `engine.json` of an artifact folder.

Inputs are copied to the GPU and outputs back, each call; constants are copied when the engine is made.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.capabilities import host_arch
from graphopt.errors import ArtifactError, DataError, TargetError
from graphopt.runtime import gpu
from graphopt.runtime.tvm_engine import LIBRARY, check_whole, last_line, load_library, read_description

DEVICE = "cuda"
"""The `device` of an engine.json that this engine runs."""


class CudaEngine:
    """A loaded model on the first GPU. One engine may be used by one thread at a time.

    Raises ArtifactError when a file is missing or damaged or was built for something else, and TargetError where there
    is no GPU to run on.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None):
        self.folder = Path(folder)
        description = read_description(self.folder)
        if description.get("device") != DEVICE:
            raise ArtifactError(f"{self.folder} was not built for a GPU")
        if description["arch"] != host_arch():
            raise ArtifactError(f"{self.folder} was built for {description['arch']}, this machine is {host_arch()}")
        lacking = gpu.missing()
        if lacking is not None:
            raise TargetError(f"{self.folder} runs on a GPU: {lacking}", hint=gpu.REMEDY)
        library = self.folder / LIBRARY
        check_whole(library, description)
        _check_gpu(description["gpu"], library, self.folder)

        import tvm
        from tvm.runtime.vm import VirtualMachine

        load_runtime()
        self._tvm = tvm
        try:
            device: Any = tvm.cuda(0)
            module: Any = load_library(library, description["library_sha256"])
            self._device = device
            self._machine = VirtualMachine(module, device)
            self._main = self._machine["main"]
        except (RuntimeError, OSError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{library} cannot be loaded: {last_line(error)}", hint="build the artifact again"
            ) from error
        self._specs = {str(s["name"]): (tuple(s["shape"]), np.dtype(s["dtype"])) for s in description["inputs"]}
        self._inputs = {
            name: tvm.runtime.empty(shape, str(dtype), device) for name, (shape, dtype) in self._specs.items()
        }
        self._outputs = tuple(str(spec["name"]) for spec in description["outputs"])

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by input name."""
        return {name: shape for name, (shape, _) in self._specs.items()}

    @property
    def input_dtypes(self) -> dict[str, np.dtype]:
        """Element type by input name."""
        return {name: dtype for name, (_, dtype) in self._specs.items()}

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs, by name. They belong to the caller.

        Raises DataError for a missing or unknown input, a wrong shape, or an element type that does not convert without
        loss, and TargetError where the GPU refuses: it is out of memory, say.
        """
        try:
            self.upload(feeds)
            result = self.compute()
            return {name: tensor.numpy() for name, tensor in zip(self._outputs, result, strict=True)}
        except RuntimeError as error:
            raise TargetError(f"the GPU cannot run {self.folder}: {last_line(error)}") from error

    def upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs to the GPU. Raises DataError as `run` does."""
        unknown = sorted(set(feeds) - set(self._specs))
        if unknown:
            raise DataError(f"the model has no input {unknown[0]!r}", hint=f"its inputs: {', '.join(self._specs)}")
        for name, (shape, dtype) in self._specs.items():
            if name not in feeds:
                raise DataError(f"input {name!r} is missing")
            array = np.asarray(feeds[name])
            if array.shape != shape:
                raise DataError(f"input {name!r} has shape {list(array.shape)}, the model takes {list(shape)}")
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise DataError(f"input {name!r} is {array.dtype}, the model takes {dtype}")
            self._inputs[name].copyfrom(np.ascontiguousarray(array, dtype))

    def compute(self) -> list[Any]:
        """Run with the inputs that were uploaded last; the outputs as tensors on the GPU, perhaps not yet computed."""
        result = self._main(*self._inputs.values())
        return [result] if len(self._outputs) == 1 and hasattr(result, "numpy") else list(result)

    def wait(self) -> None:
        """Return when everything that was asked of the GPU is done."""
        self._device.sync()


def load_runtime() -> None:
    """Load TVM's part for GPUs, once. Raises TargetError where that or CUDA's runtime library is not there."""
    import tvm

    runtime = gpu.find_runtime()
    if runtime is None:
        raise TargetError(f"CUDA's runtime library ({gpu.RUNTIME}) is not on this machine", hint=gpu.REMEDY)
    part = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(
            f"TVM's part for GPUs cannot be loaded: {error}", hint="is this TVM 0.27 from PyPI?"
        ) from error


def _check_gpu(built_for: str, library: Path, folder: Path) -> None:
    """Raises ArtifactError for another GPU's machine code, TargetError where the constants alone exceed its memory."""
    if not gpu.runs(built_for):
        here = gpu.architecture()
        raise ArtifactError(
            f"{folder} was built for {built_for}, this machine's GPU is {here}",
            hint=f"build it with --target 'cuda{{arch={here}}}'",
        )
    there, needed = gpu.memory_bytes(), library.stat().st_size
    if there is not None and needed > there:
        raise TargetError(f"{folder} takes {needed >> 20} MB of the GPU's memory at least, which has {there >> 20} MB")
