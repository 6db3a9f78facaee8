"""The package for C++: `graphopt/runner.h` on TVM's runtime, or ONNX Runtime's own interface, with an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.packaging.contents import (
    FILES,
    PROCESSOR_HEADER,
    copy,
    copy_headers,
    copy_libraries,
    copy_runtime,
)
from graphopt.packaging.source import Source

RUNTIME = ("libtvm_runtime.so", "libtvm_ffi.so")


def fill(source: Source, stage: Path) -> dict[str, Any]:
    """Write the files; returns what package.json says of the libraries. Raises TargetError: no runtime to be had."""
    if source.arch is None:
        copy(source.model, stage / "model.onnx")
        copy(FILES / "onnxruntime_example.cc", stage / "example/main.cc")
        copy(FILES / "npy.h", stage / "example/npy.h")
        copy(FILES / "onnxruntime_CMakeLists.txt", stage / "CMakeLists.txt")
        return {}
    rows = copy_libraries(source, stage)
    copy_runtime(RUNTIME, source.arch, stage)
    copy(FILES / "runner.h", stage / "include/graphopt/runner.h")
    copy(PROCESSOR_HEADER, stage / "include/graphopt/processor.h")
    copy(FILES / "runner.cc", stage / "src/runner.cc")
    copy_headers(FILES / "runner.cc", stage)
    copy(FILES / "example.cc", stage / "example/main.cc")
    copy(FILES / "npy.h", stage / "example/npy.h")
    copy(FILES / "CMakeLists.txt", stage / "CMakeLists.txt")
    copy(FILES / "toolchain.cmake", stage / "toolchain.cmake")
    return {"libraries": rows}
