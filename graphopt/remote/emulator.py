"""A processor emulated by QEMU in user mode, with an RPC server on it.

Nothing of it is installed in the emulated system: the server is one program with three libraries beside it. Times under
emulation say nothing about a device.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from graphopt.arm_cores import ARM_FEATURES
from graphopt.errors import TargetError
from graphopt.remote.address import Address
from graphopt.remote.server_program import server_program
from graphopt.targets.relax.link import cross_package

QEMU_CPUS = {"generic": "cortex-a53", "cortex-a73": "cortex-a72", "cortex-a75": "cortex-a76"}
"""For cores that QEMU does not know: one with the same extensions."""
_KNOWN = {
    "max": frozenset().union(*ARM_FEATURES.values()),
    **{core: ARM_FEATURES[core] for core in ("a64fx", "cortex-a35", "cortex-a53", "cortex-a57", "cortex-a72",
                                             "cortex-a76", "neoverse-n1")},
}  # fmt: skip
"""QEMU 7.2's cores, and their features."""
_KEY = "emulated"


def find_emulator(arch: str) -> str | None:
    """QEMU's command for `arch`; None where it is not installed."""
    return shutil.which(f"qemu-{arch}") or shutil.which(f"qemu-{arch}-static")


def find_system(arch: str) -> Path | None:
    """The folder with the C library of `arch`; None where there is none."""
    folder = Path(f"/usr/{arch}-linux-gnu")
    return folder if (folder / "lib").is_dir() else None


def qemu_cpu(core: str, features: frozenset[str]) -> str:
    """QEMU's name for a core by LLVM's name; for one that QEMU does not know, a core that has its `features`."""
    if core in _KNOWN or core in QEMU_CPUS:
        return QEMU_CPUS.get(core, core)
    return next(cpu for cpu in ("cortex-a72", "cortex-a76", "max") if features <= _KNOWN[cpu])


def remedy(arch: str) -> str:
    """What to install."""
    return f"`apt install qemu-user {cross_package(arch)}`"


@contextmanager
def emulated(arch: str, cpu: str, key: str = _KEY, options: Sequence[str] = ()) -> Iterator[Address]:
    """Start a server on an emulated `cpu` (QEMU's name); it ends with the context. `options` are more of the server's.

    Raises TargetError: QEMU, a C library or a compiler for `arch` is missing, or the server does not start.
    """
    with emulated_process(arch, cpu, key, options) as (_, address):
        yield address


@contextmanager
def emulated_process(
    arch: str, cpu: str, key: str, options: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], Address]]:
    """`emulated`, with the server's process, which leads a group of its own."""
    emulator, system = find_emulator(arch), find_system(arch)
    if emulator is None or system is None:
        what = "QEMU" if emulator is None else f"the C library of {arch}"
        raise TargetError(f"{what} is not installed", hint=remedy(arch))
    program = server_program(arch)
    with tempfile.TemporaryDirectory(prefix="graphopt-emulated-") as folder:
        server = subprocess.Popen(
            [emulator, "-cpu", cpu, "-L", str(system), "-E", f"LD_LIBRARY_PATH={program.parent}",
             "-E", f"GRAPHOPT_EMULATED={cpu}", str(program), "0", key, *options],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield server, Address("127.0.0.1", _port(server, cpu), key)
        finally:
            _end(server)


def _port(server: subprocess.Popen[str], cpu: str) -> int:
    assert server.stdout is not None
    word, _, number = server.stdout.readline().partition(" ")
    if word != "listening":
        _end(server)
        said = server.stderr.read().strip().splitlines() if server.stderr is not None else []
        raise TargetError(f"the emulated {cpu} did not start: {said[-1][:200] if said else 'no word from it'}")
    return int(number)


def _end(server: subprocess.Popen[str]) -> None:
    """With the processes of its sessions."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
