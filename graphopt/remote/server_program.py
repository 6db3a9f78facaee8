"""The RPC server for devices without Python (`rpc_server.cc`), compiled for them once and kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from graphopt.errors import TargetError
from graphopt.remote.runtime_libraries import LIBRARIES, runtime_libraries
from graphopt.targets.llvm import FFI_PIN, TVM_PIN
from graphopt.targets.relax.link import cross_remedy

SOURCE = Path(__file__).with_name("rpc_server.cc")
_GLIBC = "2.28"
"""The oldest that TVM's libraries run on."""


def find_compiler(arch: str) -> list[str] | None:
    """The command that compiles C++ for `arch` under Linux: GNU's, else ziglang's; None where there is neither."""
    found = shutil.which(f"{arch}-linux-gnu-g++")
    if found:
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-target", f"{arch}-linux-gnu.{_GLIBC}"]
    return None


def server_program(arch: str) -> Path:
    """The RPC server's executable, beside the libraries it needs. Raises TargetError: it cannot be compiled."""
    return device_program(arch, SOURCE)


def device_program(arch: str, source: Path) -> Path:
    """A C++ program of graphopt's own, compiled against TVM's runtime for `arch`, beside the libraries it needs.

    Raises TargetError: there is no compiler, or it fails.
    """
    import tvm_ffi.libinfo

    folder = runtime_libraries(arch)
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    digest = hashlib.sha256(content).hexdigest()[:12]
    program = folder / f"{source.stem}-{digest}"
    if program.is_file():
        return program
    compiler = find_compiler(arch)
    if compiler is None:
        raise TargetError(f"no C++ compiler for {arch}, and {source.name} needs one", hint=cross_remedy(arch))
    command = [
        *compiler, "-O2", "-std=c++17", f'-DGRAPHOPT_TVM="{TVM_PIN}"', f'-DGRAPHOPT_TVM_FFI="{FFI_PIN}"',
        f"-I{tvm_ffi.libinfo.find_include_path()}", str(source), f"-L{folder}",
        "-Wl,--no-as-needed", *(f"-l:{name}" for name in LIBRARIES), "-ldl", "-Wl,-rpath,$ORIGIN",
    ]  # fmt: skip
    return compiled(command, program, source.name)


def compiled(command: list[str], output: Path, what: str) -> Path:
    """Run a compiler; `output` is there whole or not at all. Raises TargetError with the compiler's last line."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise TargetError(f"{what} cannot be compiled: {said[-1][:200] if said else command[0]}")
    partial.replace(output)
    return output
