"""How many instructions one inference takes, of whatever can be timed: an ONNX file or an artifact.

By the first of these that is there: the processor's own counter (`perf`), QEMU with our plugin (`qemu`, which emulates
a processor with AVX2 but without AVX-512), valgrind's cachegrind (`valgrind`: likewise). A library for another
architecture is counted in QEMU as `graphopt.remote.instructions` does it. One thread, user space only, the fewest of a
few inferences: what else the machine does changes nothing. A count is no time: compare a model's with another's only
where the counter is the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.capabilities import host_arch
from graphopt.ci.performance_events import Counter
from graphopt.errors import TargetError
from graphopt.measure import Contender, wire
from graphopt.remote.emulator import find_emulator, qemu_cpu
from graphopt.remote.instructions import count_instructions, run_counted
from graphopt.runtime.artifact import library_folders, read_manifest
from graphopt.runtime.tvm_engine import read_description

RUNS = 5
VALGRIND_RUNS = 4
LIMIT_S = 900.0
_PROCESS = "graphopt.ci.counted_process"
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
_BEYOND_EMULATORS = ("avx512", "amx", "avx_vnni")
"""Starts of the names of extensions that neither QEMU 7.2 nor valgrind 3.19 has."""
_REFERENCES = re.compile(r"I\s+refs:\s+([\d,]+)")


@dataclass(frozen=True)
class InstructionCount:
    """Of one inference."""

    value: int
    counter: str
    """`perf`, `qemu CPU` or `valgrind`: only counts of one counter can be compared."""


def count(contender: Contender, feeds: Mapping[str, np.ndarray]) -> InstructionCount:
    """Count an inference of `contender`. Raises TargetError, saying why nothing here can count it."""
    library = _library(contender)
    description = read_description(library) if library is not None else {}
    arch = str(description.get("arch", host_arch()))
    if library is not None and arch != host_arch():
        cpu = qemu_cpu(str(description.get("mcpu", "generic")), frozenset(description["features"]))
        return InstructionCount(count_instructions(library, feeds, cpu).total, f"qemu {cpu}")
    with tempfile.TemporaryDirectory(prefix="graphopt-count-") as name:
        work = Path(name)
        wire.save_feeds(feeds, work / "feeds.npz")
        if has_perf():
            return _by_perf(contender, work)
        beyond = sorted(f for f in description.get("features", ()) if str(f).startswith(_BEYOND_EMULATORS))
        if beyond:
            raise TargetError(
                f"{contender.path} was compiled for {', '.join(beyond)}, which no emulator here has, and this machine "
                "has no instruction counter",
                hint="count a build for cpu{mcpu=x86-64-v3}",
            )
        if find_emulator(arch) is not None:
            return _by_qemu(contender, work, arch)
        if shutil.which("valgrind") is not None:
            return by_valgrind(contender, work)
    raise TargetError(
        "nothing here counts instructions: no counter of the processor, no QEMU, no valgrind",
        hint="`apt install qemu-user gcc`, or `apt install valgrind`",
    )


def has_perf() -> bool:
    """Whether the processor's counter of instructions can be used here."""
    try:
        Counter().close()
    except OSError:
        return False
    return True


def _library(contender: Contender) -> Path | None:
    """The folder of the library that would run, where there is one."""
    if contender.engine == "tvm":
        return contender.path
    if contender.engine != "artifact":
        return None
    folders = [contender.path / name for name, _ in library_folders(read_manifest(contender.path))]
    here = [f for f in folders if read_description(f)["arch"] == host_arch()]
    return next(iter(here or folders), None)


def _program(contender: Contender, how: str, work: Path, runs: int) -> list[str]:
    path = str(contender.path.absolute())
    return [sys.executable, "-m", _PROCESS, how, contender.engine, path, str(work / "feeds.npz"), str(runs)]


def _environment() -> dict[str, str]:
    search = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "TVM_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _by_perf(contender: Contender, work: Path) -> InstructionCount:
    said = _watched(_program(contender, "events", work, RUNS), work, "the processor's counter").stdout
    return InstructionCount(min(int(line) for line in said.split()), "perf")


def _by_qemu(contender: Contender, work: Path, arch: str) -> InstructionCount:
    program = _program(contender, "marks", work, RUNS)
    spans = run_counted(
        program, arch, "max", work, environment=_environment(), system=Path("/"), limit_s=LIMIT_S
    )  # fmt: skip
    if len(spans) != RUNS + 1:
        raise TargetError(f"{contender.path}: {len(spans)} of {RUNS + 1} marks were seen by QEMU")
    nothing, *inferences = (span.total for span in spans)
    return InstructionCount(min(inferences) - nothing, "qemu max")


def by_valgrind(contender: Contender, work: Path) -> InstructionCount:
    """What more inferences cost more: cachegrind counts whole processes. `work` holds feeds.npz. Raises TargetError."""
    totals = []
    for runs in (1, 1 + VALGRIND_RUNS):
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        done = _watched([*command, *_program(contender, "whole", work, runs)], work, "valgrind")
        found = _REFERENCES.search(done.stderr)
        if found is None:
            raise TargetError("valgrind did not say how many instructions it counted")
        totals.append(int(found[1].replace(",", "")))
    return InstructionCount((totals[1] - totals[0]) // VALGRIND_RUNS, "valgrind")


def _watched(command: list[str], work: Path, who: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command, cwd=work, env={**os.environ, **_environment()}, capture_output=True, text=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"counting with {who} took over {LIMIT_S:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise TargetError(f"counting with {who} failed: {said[-1][:200] if said else f'code {done.returncode}'}")
    return done
