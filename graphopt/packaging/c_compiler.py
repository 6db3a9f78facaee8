"""A C compiler that makes static executables, for this machine or another."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from graphopt.capabilities import host_arch
from graphopt.errors import TargetError
from graphopt.targets.relax.link import cross_remedy

_REMEDY = "`apt install gcc libc6-dev`, or `pip install 'graphopt[cross]'` (ziglang brings one)"


def find_c_compiler(arch: str) -> list[str] | None:
    """The command that compiles C for `arch`: GNU's or clang, else ziglang's with musl; None where there is neither."""
    names = ("gcc", "cc", "clang") if arch == host_arch() else (f"{arch}-linux-gnu-gcc",)
    for name in names:
        found = shutil.which(name)
        if found:
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl"]
    return None


def compile_c(arguments: list[str], arch: str, folder: Path) -> None:
    """Run the compiler for `arch` in `folder`. Raises TargetError: there is none, or it fails."""
    compiler = find_c_compiler(arch)
    if compiler is None:
        remedy = _REMEDY if arch == host_arch() else cross_remedy(arch)
        raise TargetError(f"a static executable wants a C compiler for {arch}, and there is none", hint=remedy)
    done = subprocess.run([*compiler, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        said = said or done.stderr.strip().splitlines()
        raise TargetError(f"{compiler[0]} failed: {said[0][:300] if said else done.returncode}")
