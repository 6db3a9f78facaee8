"""Open whatever TVM compiled: for this machine's processor, or for its GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graphopt.runtime import cuda_engine
from graphopt.runtime.tvm_engine import TvmEngine, read_description


def open_compiled(folder: str | os.PathLike[str], threads: int | None = None) -> Any:
    """The engine of a folder: `TvmEngine`, or `CudaEngine`, which has the same methods for running.

    Raises ArtifactError as these do, and TargetError where the folder needs a GPU and there is none.
    """
    if read_description(Path(folder)).get("device") == cuda_engine.DEVICE:
        return cuda_engine.CudaEngine(folder, threads)
    return TvmEngine(folder, threads)
