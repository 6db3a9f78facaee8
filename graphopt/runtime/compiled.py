"""Open whatever TVM compiled: for this machine's processor, or for its GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import ArtifactError
from graphopt.runtime import cuda_engine
from graphopt.runtime.sized_engine import SizedEngine
from graphopt.runtime.tvm_engine import SIZED, TvmEngine, check_processor, read_description


def open_compiled(folder: str | os.PathLike[str], threads: int | None = None) -> Any:
    """The engine of a folder: `TvmEngine`, or `CudaEngine` or `SizedEngine`, which run the same way.

    Raises ArtifactError as these do, and TargetError where the folder needs a GPU and there is none.
    """
    described = read_description(Path(folder))
    if described.get("device") == cuda_engine.DEVICE:
        return cuda_engine.CudaEngine(folder, threads)
    if described["format"] == SIZED:
        return SizedEngine(folder, threads)
    return TvmEngine(folder, threads)


def open_first(folders: Sequence[Path], threads: int | None = None) -> tuple[Path, Any]:
    """The first of several libraries of one model that this processor has all instructions for, and its engine.

    Raises ArtifactError where there is none, naming what is lacking, and as `open_compiled` does.
    """
    refused = []
    for folder in folders[:-1]:
        description = read_description(folder)
        try:
            check_processor(description, folder)
        except ArtifactError as error:
            refused.append(error)
        else:
            return folder, open_compiled(folder, threads)
    try:
        return folders[-1], open_compiled(folders[-1], threads)
    except ArtifactError as error:
        if not refused:
            raise
        whats = "; ".join(each.what for each in (*refused, error))
        raise ArtifactError(whats, hint=error.hint) from error
