"""Files that go into packages: TVM's runtime for an architecture, the headers a source includes, files of our own."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

from graphopt.capabilities import host_arch
from graphopt.errors import ArtifactError
from graphopt.packaging.source import Source
from graphopt.remote.runtime_libraries import runtime_libraries
from graphopt.runtime import tvm_engine

FILES = Path(__file__).with_name("files")
PROCESSOR_HEADER = Path(tvm_engine.__file__).with_name("native") / "processor.h"
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def copy(source: Path, target: Path) -> None:
    """Copy a file; the folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def copy_libraries(source: Source, stage: Path) -> list[dict[str, object]]:
    """Copy the compiled libraries into `model/`; returns their rows of package.json."""
    rows = []
    for index, library in enumerate(source.libraries):
        name = f"model/model-{index}.so" if index else "model/model.so"
        copy(library.path, stage / name)
        described = library.description
        rows.append(
            {
                "file": name,
                "target": library.target,
                "mcpu": described["mcpu"],
                "features": described["features"],
                "tiles": described.get("tiles", False),
                "bytes": library.path.stat().st_size,
                "sha256": described["library_sha256"],
            }
        )
    return rows


def copy_runtime(names: tuple[str, ...], arch: str, stage: Path) -> None:
    """Copy these of TVM's runtime libraries for `arch` into `lib/`, with TVM's licence.

    Raises TargetError where they cannot be fetched, ArtifactError where TVM is not installed.
    """
    for name in names:
        copy(_runtime_library(name, arch), stage / "lib" / name)
    for name in ("LICENSE", "NOTICE"):
        copy(_installed("tvm") / name, stage / "lib" / f"{name}.tvm")


def copy_headers(of: Path, stage: Path) -> None:
    """Copy into `include/` what the source file `of` includes of tvm_ffi and dlpack, directly or not."""
    root = _installed("tvm_ffi") / "include"
    found: set[Path] = set()
    waiting = [of]
    while waiting:
        file = waiting.pop()
        for name in _INCLUDE.findall(file.read_text(encoding="utf-8")):
            for header in (root / name, file.parent / name):
                if header.is_file() and header.is_relative_to(root) and header not in found:
                    found.add(header)
                    waiting.append(header)
    for header in sorted(found):
        copy(header, stage / "include" / header.relative_to(root))


def _runtime_library(name: str, arch: str) -> Path:
    if arch != host_arch():
        return runtime_libraries(arch) / name
    return _installed("tvm_ffi" if "ffi" in name else "tvm") / "lib" / name


def _installed(package: str) -> Path:
    """The folder of an installed Python package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ArtifactError(f"{package} is not installed, and the package needs its files", hint="pip install graphopt")
    return Path(found.submodule_search_locations[0])
