"""CUDA source to machine code, with whatever toolkit the machine has. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from graphopt.errors import TargetError

REMEDY = "`pip install 'graphopt[cuda]'` (NVIDIA's compiler as Python packages), or install the CUDA toolkit"
HOST_COMPILERS = ("g++", "c++", "clang++")
"""nvcc preprocesses with one of these."""
OPTIONS = ("-O3", "--std=c++17", "-Xptxas", "-v", "-Xptxas", "--register-usage-level=0", "--diag-suppress", "177")
"""ptxas says what each kernel needs, and does not spill a word or two to save registers that are there; 177: a variable
that nobody reads."""
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor, as ptxas reports it."""

    registers: int
    """32-bit, a thread."""
    shared_bytes: int
    """Static shared memory of a block."""
    spill_bytes: int
    """Stored to memory because registers did not suffice, a thread."""
    stack_bytes: int
    """Memory of a thread for spills, and for arrays whose indices are not known."""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Image:
    """Machine code of a few kernels."""

    form: str
    """`fatbin`: what the driver is told it is."""
    data: bytes
    kernels: dict[str, Resources]
    """By name."""


@dataclass(frozen=True)
class Toolkit:
    """A compiler, and where its headers are."""

    nvcc: Path
    include: tuple[Path, ...] = ()


def find_toolkit() -> Toolkit | None:
    """In order: `CUDA_PATH` or `CUDA_HOME`, `nvcc` on the path, the usual folder, NVIDIA's Python packages."""
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        root = Path(os.environ.get(variable) or "/nonexistent")
        if (root / "bin" / "nvcc").is_file():
            return Toolkit(root / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if found:
        return Toolkit(Path(found))
    if (usual := Path("/usr/local/cuda/bin/nvcc")).is_file():
        return Toolkit(usual)
    for root in _package_roots():
        if (nvcc := root / "bin" / "nvcc").is_file():
            return Toolkit(nvcc, (root / "include",))
    return None


def _package_roots() -> list[Path]:
    """The folders that packages of the CUDA 13 series share in a Python environment."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [Path(folder) / "cu13" for folder in folders]


def version(toolkit: Toolkit) -> str:
    """`13.0`, or what went wrong."""
    try:
        done = subprocess.run([str(toolkit.nvcc), "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found.group(1) if found else f"says no version (exit {done.returncode})"


def missing() -> str | None:
    """What is not there for compiling, in words; None where nothing is."""
    if find_toolkit() is None:
        return "no CUDA compiler (nvcc) on this machine"
    if not any(map(shutil.which, HOST_COMPILERS)):
        return "no C++ compiler on this machine, and nvcc preprocesses with one (`apt install g++`)"
    return None


def compile_source(source: str, arch: str, jobs: int = 1) -> Image:
    """Machine code of CUDA source for `arch` (`sm_90`), on `jobs` threads.

    Raises TargetError: no toolkit, or it refuses the source or the architecture.
    """
    lacking = missing()
    toolkit = find_toolkit()
    if lacking or toolkit is None:
        raise TargetError(str(lacking), hint=REMEDY)
    with tempfile.TemporaryDirectory(prefix="graphopt-nvcc-") as folder:
        code, image = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        code.write_text(source, encoding="utf-8")
        command = [str(toolkit.nvcc), "-fatbin", f"-gencode=arch=compute_{arch[3:]},code={arch}", *OPTIONS]
        command += [f"--split-compile={jobs}"] if jobs > 1 else []
        command += [f"-I{path}" for path in toolkit.include] + ["-o", str(image), str(code)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TargetError(f"{toolkit.nvcc} could not be run: {error}", hint=REMEDY) from error
        if done.returncode:
            raise TargetError(f"nvcc refuses the kernels for {arch}: {_reason(done.stderr or done.stdout)}")
        return Image("fatbin", image.read_bytes(), resources(done.stderr))


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line or "fatal" in line.lower()), lines[-1] if lines else "")[
        :200
    ]


def resources(said: str) -> dict[str, Resources]:
    """What `ptxas -v` says of each kernel."""
    found: dict[str, Resources] = {}
    entry = r"Compiling entry function '(?P<name>[^']+)' for '[^']+'(?P<rest>.*?)(?=Compiling entry function|\Z)"
    for match in re.finditer(entry, said, re.DOTALL):
        rest = match["rest"]
        found[match["name"]] = Resources(
            registers=_number(r"Used (\d+) registers", rest),
            shared_bytes=_number(r"(\d+) bytes smem", rest),
            spill_bytes=_number(r"(\d+) bytes spill stores", rest),
            stack_bytes=_number(r"(\d+) bytes stack frame", rest),
        )
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0
