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
    """The executable, beside the libraries it needs. Raises TargetError: it cannot be compiled."""
    import tvm_ffi.libinfo

    folder = runtime_libraries(arch)
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = folder / f"rpc_server-{digest}"
    if program.is_file():
        return program
    compiler = find_compiler(arch)
    if compiler is None:
        raise TargetError(f"no C++ compiler for {arch}, and its RPC server needs one", hint=cross_remedy(arch))
    partial = folder / f".{program.name}.{os.getpid()}"
    include = tvm_ffi.libinfo.find_include_path()
    libraries = [f"-l:{name}" for name in LIBRARIES]
    command = [
        *compiler, "-O2", "-std=c++17", f"-I{include}", str(SOURCE), "-o", str(partial), f"-L{folder}",
        "-Wl,--no-as-needed", *libraries, "-Wl,-rpath,$ORIGIN",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise TargetError(f"the RPC server cannot be compiled: {said[-1][:200] if said else compiler[0]}")
    partial.replace(program)
    return program
