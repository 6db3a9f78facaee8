"""From object files to a shared library, with whatever linker the machine has. No compiler is needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from graphopt.capabilities import host_arch
from graphopt.errors import TargetError

_DRIVERS = ("g++", "gcc", "cc", "clang")
_LINKERS = ("ld", "ld.lld", "lld")
_CROSS = ("g++", "gcc", "ld")
"""Of GNU's tools for another processor, behind its name."""
_ANY = ("ld.lld", "lld")
"""These link for every processor."""
REMEDY = "install a linker: `apt install binutils`, or `pip install 'graphopt[cross]'` (ziglang brings one)"


def find_linker(arch: str | None = None) -> list[str] | None:
    """The command that links a shared library for `arch` (None: this machine's), without its inputs and output; None
    where there is none.

    In order: a compiler driver, a bare linker, and the linker of the Python package ziglang.
    """
    own = arch in (None, host_arch())
    for name in _DRIVERS + _LINKERS if own else (*(f"{arch}-linux-gnu-{tool}" for tool in _CROSS), *_ANY):
        found = shutil.which(name)
        if found:
            return [found, "-flavor", "gnu"] if name == "lld" else [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    return None


def link_shared(output: str | Path, objects: list[str], arch: str | None = None) -> None:
    """Link `objects` into the shared library `output` for `arch` (None: this machine's). Raises TargetError."""
    command = find_linker(arch)
    if command is None:
        what = "no linker" if arch in (None, host_arch()) else f"no linker for {arch}"
        remedy = REMEDY if what == "no linker" else cross_remedy(str(arch))
        raise TargetError(f"{what} on this machine, and TVM's object files need one", hint=remedy)
    line = [*command, "-shared", "-o", str(output), *objects]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError(f"the linker {command[0]} could not be run: {error}", hint=REMEDY) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise TargetError(f"the linker {command[0]} failed: {said[-1][:200] if said else done.returncode}", hint=REMEDY)


def cross_remedy(arch: str) -> str:
    """What to install to link for another processor."""
    return f"`pip install 'graphopt[cross]'` (ziglang brings one), or `apt install {cross_package(arch)}`"


def cross_package(arch: str) -> str:
    """Debian's package of GNU's compiler and C library for another processor."""
    return f"g++-{arch}-linux-gnu".replace("_", "-")
