"""From object files to a shared library, with whatever linker the machine has. No compiler is needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from graphopt.errors import TargetError

_DRIVERS = ("g++", "gcc", "cc", "clang")
_LINKERS = ("ld", "ld.lld", "lld")
REMEDY = "install a linker: `apt install binutils`, or `pip install 'graphopt[cross]'` (ziglang brings one)"


def find_linker() -> list[str] | None:
    """The command that links a shared library, without its inputs and output; None where there is none.

    In order: a compiler driver, a bare linker, and the linker of the Python package ziglang.
    """
    for name in _DRIVERS + _LINKERS:
        found = shutil.which(name)
        if found:
            return [found, "-flavor", "gnu"] if name == "lld" else [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    return None


def link_shared(output: str | Path, objects: list[str]) -> None:
    """Link `objects` into the shared library `output`. Raises TargetError."""
    command = find_linker()
    if command is None:
        raise TargetError("no linker on this machine, and TVM's object files need one", hint=REMEDY)
    line = [*command, "-shared", "-o", str(output), *objects]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError(f"the linker {command[0]} could not be run: {error}", hint=REMEDY) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise TargetError(f"the linker {command[0]} failed: {said[-1][:200] if said else done.returncode}", hint=REMEDY)
