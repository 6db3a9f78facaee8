"""Permission to use AMX tile registers: Linux gives it to a process that asks, once for all its threads."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

from graphopt.errors import ArtifactError

ARCH_PRCTL = 158
"""The system call's number on x86-64."""
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


@lru_cache(maxsize=1)
def granted() -> bool:
    """Ask for the tile registers; False where the kernel (before Linux 5.16) or the processor has none to give."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except OSError:
        return False
    return libc.syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def require(what: str) -> None:
    """Ask for the tile registers. Raises ArtifactError, naming `what` needs them, where they are refused.

    Code that uses tile registers without permission ends the process with an illegal instruction.
    """
    if not granted():
        raise ArtifactError(
            f"{what} uses AMX tile registers, which this system does not let a process use",
            hint="needs Linux 5.16 or newer; or build with --target 'cpu{mcpu=cooperlake}'",
        )
