"""ONNX Runtime's own wheel for aarch64, in the emulator: what it takes to run it there, and its instructions.

The wheel carries `libonnxruntime.so`, which a small program (`onnxruntime_counted.c`) calls: neither Python nor a
system for ARM is needed. Its CPU detection reads /proc/cpuinfo, which in the emulator is this machine's, and crashes
on it: QEMU looks for files of the emulated program below its `-L` folder first, so such a folder is made, with a
cpuinfo of the core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from graphopt import model as models
from graphopt.errors import TargetError
from graphopt.remote import emulator, server_program
from graphopt.remote.instructions import run_counted, write_inputs

ARCH = "aarch64"
SOURCE = Path(__file__).with_name("onnxruntime_counted.c")


@dataclass(frozen=True)
class Core:
    """A core as QEMU, LLVM and /proc/cpuinfo name it."""

    qemu: str
    llvm: str
    part: str


CORES = {
    "a53": Core("cortex-a53", "cortex-a53", "0xd03"),
    "a72": Core("cortex-a72", "cortex-a72", "0xd08"),
    "a76": Core("cortex-a76", "cortex-a76", "0xd0b"),
    "max": Core("max,sme=off,sve-default-vector-length=16", "neoverse-n2", "0xd49"),
    "max+sme": Core("max,sve-default-vector-length=16", "neoverse-n2", "0xd49"),
}
"""`max` has all that QEMU knows but SME; it is compiled for as the Neoverse N2, whose SVE has 128 bits too."""


class Peer:
    """ONNX Runtime in `folder`, fetched and compiled where it is not there yet. Raises TargetError."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        library = self.folder / "libonnxruntime.so.1"
        if not library.is_file():
            self._fetch(library)
        self.program = self.folder / "onnxruntime_counted"
        if not self.program.is_file() or self.program.stat().st_mtime < SOURCE.stat().st_mtime:
            compiler = server_program.find_compiler(ARCH)
            if compiler is None:
                raise TargetError(f"no C compiler for {ARCH}", hint=emulator.remedy(ARCH))
            flags = ["-O2", "-x", "c", "-std=c11", str(SOURCE), "-x", "none", str(library), "-Wl,-rpath,$ORIGIN"]
            server_program.compiled([*compiler, *flags], self.program, SOURCE.name)

    def count(self, model: Path, feeds: Mapping[str, np.ndarray], core: Core) -> tuple[int, dict[str, np.ndarray]]:
        """Instructions of one inference on one thread, all graph optimizations on, and its outputs."""
        signature = models.signature(models.load(model))
        specs = [{"name": s.name, "shape": feeds[s.name].shape, "dtype": s.dtype} for s in signature.inputs]
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            listed = write_inputs(specs, feeds, work)
            program = [str(each) for each in (self.program, model.resolve(), listed, work / "output")]
            marking, inference = run_counted(program, ARCH, core.qemu, work, system=self._system(core))
            outputs = {
                s.name: np.fromfile(work / f"output.{i}", s.dtype).reshape(
                    [-1 if isinstance(d, str) else d for d in s.shape]
                )
                for i, s in enumerate(signature.outputs)
            }
        return inference.total - marking.total, outputs

    def _fetch(self, library: Path) -> None:
        """The wheel of the version that is installed here."""
        with tempfile.TemporaryDirectory(dir=self.folder) as wheels:
            platforms = [f"--platform=manylinux_2_{minor}_{ARCH}" for minor in (28, 27, 24, 17)]
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                *platforms,
            ]
            version = f"onnxruntime=={onnxruntime.__version__}"
            done = subprocess.run([*command, "--python-version=3.11", "--dest", wheels, version], check=False)
            if done.returncode:
                raise TargetError(f"{version} for {ARCH} cannot be fetched")
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (n for n in archive.namelist() if Path(n).name.startswith("libonnxruntime.so"))
                library.write_bytes(archive.read(member))

    def _system(self, core: Core) -> Path:
        """A folder for QEMU's -L: the C library, and files that describe a machine with one such core."""
        system = emulator.find_system(ARCH)
        if system is None:
            raise TargetError(f"the C library of {ARCH} is not installed", hint=emulator.remedy(ARCH))
        folder = self.folder / f"system-{core.part}"
        described = folder / "sys" / "devices" / "system" / "cpu"
        described.mkdir(parents=True, exist_ok=True)
        (folder / "proc").mkdir(exist_ok=True)
        if not (folder / "lib").exists():
            (folder / "lib").symlink_to(system / "lib")
        for name in ("possible", "present"):
            (described / name).write_text("0\n")
        lines = {"processor": "0", "CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x0",
                 "CPU part": core.part, "CPU revision": "0"}  # fmt: skip
        (folder / "proc" / "cpuinfo").write_text("".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n")
        return folder
