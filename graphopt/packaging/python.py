"""The package for Python: one module beside the model, which needs numpy and apache-tvm-ffi, or onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.packaging.contents import FILES, copy, copy_libraries, copy_runtime
from graphopt.packaging.source import Source

RUNTIME = ("libtvm_runtime.so",)
"""Its other half comes with apache-tvm-ffi."""


def fill(source: Source, stage: Path) -> dict[str, Any]:
    """Write the files; returns what package.json says of the libraries. Raises TargetError: no runtime to be had."""
    if source.arch is None:
        copy(source.model, stage / "model.onnx")
        copy(FILES / "onnxruntime_model.py", stage / "graphopt_model.py")
        return {}
    rows = copy_libraries(source, stage)
    copy_runtime(RUNTIME, source.arch, stage)
    copy(FILES / "tvm_model.py", stage / "graphopt_model.py")
    return {"libraries": rows}
