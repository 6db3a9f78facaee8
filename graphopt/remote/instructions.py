"""How many instructions an inference takes on an emulated processor.

A plugin of QEMU's (`instruction_counter.c`) counts what one thread executes between two marks, and a small program
(`counted_run.cc`) sets them around an inference. The count is exact, and the same every time but for what the C library
does: it depends on neither this machine's speed nor its load. It is no time: a core may take one cycle for four
instructions, or a hundred for one that waits for memory.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError, TargetError
from graphopt.remote import emulator
from graphopt.remote.elf_functions import Function, read_functions
from graphopt.remote.server_program import compiled
from graphopt.runtime.tvm_engine import LIBRARY, read_description
from graphopt.schedule_database import cache_folder

PLUGIN = Path(__file__).with_name("instruction_counter.c")
PROGRAM = Path(__file__).with_name("counted_run.cc")
_API_CHANGED = 9
"""QEMU's first version that refuses plugins for version 1 of its interface."""
_ENTRY = "__tvm_ffi_"
"""What TVM puts before the name of a kernel; the functions behind it in the library belong to the kernel."""
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLPack's, by numpy's."""
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Block:
    """A run of instructions of the library that are executed together."""

    offset: int
    """Bytes behind where the library is loaded."""
    instructions: int
    times: int
    """How often it was executed."""


@dataclass(frozen=True)
class InstructionCounts:
    """Of one inference, on one thread."""

    total: int
    calls: tuple[tuple[str, int], ...]
    """The kernels in the order in which they ran, each with the instructions of its own code; what it calls in other
    libraries (memcpy, expf) is in `total` only."""
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    """What the counted inference computed."""
    blocks: Mapping[str, tuple[Block, ...]] = field(default_factory=dict, compare=False)
    """By kernel, what its instructions are: their sum is that of its calls."""

    @property
    def by_kernel(self) -> dict[str, int]:
        """The calls of each kernel together, the most expensive first."""
        found: dict[str, int] = {}
        for name, instructions in self.calls:
            found[name] = found.get(name, 0) + instructions
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    @property
    def elsewhere(self) -> int:
        """Instructions outside of kernels: TVM's virtual machine, the C library."""
        return self.total - sum(instructions for _, instructions in self.calls)


def count_instructions(
    folder: str | os.PathLike[str], feeds: Mapping[str, np.ndarray], cpu: str, *, limit_s: float = LIMIT_S
) -> InstructionCounts:
    """Run the model in `folder` (model.so and engine.json) on an emulated `cpu` (QEMU's name) and count.

    Raises ArtifactError: a file is missing or damaged; DataError: an input is missing or of another shape or type;
    TargetError: QEMU, its plugins or a compiler is missing, or the model does not run.
    """
    folder = Path(folder).resolve()
    description = read_description(folder)
    arch = str(description["arch"])
    functions = _functions(folder / LIBRARY)
    with tempfile.TemporaryDirectory(prefix="graphopt-counted-") as name:
        work = Path(name)
        listed = write_inputs(description["inputs"], feeds, work)
        lines = (f"{part.address:x} {part.size:x} {number} {int(entry)}\n" for part, number, entry in functions.parts)
        (work / "functions").write_text("".join(lines))
        program = [counted_program(arch), folder / LIBRARY, listed, work / "output"]
        spans = run_counted(
            [str(each) for each in program], arch, cpu, work, functions=work / "functions", limit_s=limit_s
        )
        if len(spans) != 2:
            raise TargetError(f"{folder} was not counted on an emulated {cpu}: {len(spans)} of 2 marks were seen")
        marking, inference = spans
        outputs = {
            str(spec["name"]): np.fromfile(work / f"output.{i}", spec["dtype"]).reshape(spec["shape"])
            for i, spec in enumerate(description["outputs"])
        }
    calls = tuple((functions.names[number], instructions) for number, instructions in inference.calls)
    return InstructionCounts(inference.total - marking.total, calls, outputs, functions.by_kernel(inference.blocks))


@dataclass
class Span:
    """What was counted between two marks."""

    total: int
    calls: list[tuple[int, int]] = field(default_factory=list)
    """Of the listed functions: number, and instructions."""
    blocks: list[Block] = field(default_factory=list)


def run_counted(
    program: list[str],
    arch: str,
    cpu: str,
    work: Path,
    *,
    functions: Path | None = None,
    environment: Mapping[str, str] | None = None,
    system: Path | None = None,
    limit_s: float = LIMIT_S,
) -> list[Span]:
    """Run a program for `arch` in QEMU with the counter; a span for each pair of marks.

    `functions`: a list of them, as the counter reads it. `system`: the folder with the C library, where it is not the
    usual one.

    Raises TargetError: QEMU, its plugins, a C library or a compiler is missing, or the program fails.
    """
    command = find_counting_emulator(arch)
    system = system or emulator.find_system(arch)
    if system is None:
        raise TargetError(f"the C library of {arch} is not installed", hint=emulator.remedy(arch))
    output = work / "counts"
    options = [f"output={output}"] + ([] if functions is None else [f"functions={functions}"])
    settings = {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
    line = [
        command, "-cpu", cpu, "-L", str(system), "-plugin", ",".join([str(plugin(command)), *options]),
        *(part for key, value in settings.items() for part in ("-E", f"{key}={value}")), *program,
    ]  # fmt: skip
    try:
        done = subprocess.run(line, cwd=work, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"counting on an emulated {cpu} took over {limit_s:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise TargetError(f"the emulated {cpu} stopped: {said[-1][:200] if said else f'code {done.returncode}'}")
    return _read(output.read_text())


def _read(text: str) -> list[Span]:
    """The counter's output."""
    spans: list[Span] = []
    for word, *numbers in map(str.split, text.splitlines()):
        if word == "total":
            spans.append(Span(int(numbers[0])))
        elif word == "call":
            spans[-1].calls.append((int(numbers[0]), int(numbers[1])))
        else:
            spans[-1].blocks.append(Block(int(numbers[0], 16), int(numbers[1]), int(numbers[2])))
    return spans


def find_counting_emulator(arch: str) -> str:
    """QEMU's command for `arch`, where it takes plugins. Raises TargetError where there is none."""
    command = emulator.find_emulator(arch)
    if command is None:
        raise TargetError("QEMU is not installed, and instructions are counted in it", hint=emulator.remedy(arch))
    usage = subprocess.run([command, "-h"], capture_output=True, text=True, check=False)
    if "-plugin" not in usage.stdout:
        raise TargetError(
            f"{command} takes no plugins, which count instructions", hint="`apt install qemu-user` has it"
        )
    return command


def plugin(command: str) -> Path:
    """The counter as a library for the QEMU `command`, compiled once. Raises TargetError where there is no compiler."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\d+)", version)
    interface = 2 if found is not None and int(found[1]) >= _API_CHANGED else 1
    digest = hashlib.sha256(PLUGIN.read_bytes()).hexdigest()[:12]
    library = cache_folder() / "runtime" / f"instruction_counter-{interface}-{digest}.so"
    if library.is_file():
        return library
    compiler = find_c_compiler()
    if compiler is None:
        raise TargetError(
            "no C compiler for QEMU's plugin, which counts instructions",
            hint="`apt install gcc`, or `pip install ziglang`",
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O2", "-std=c11", "-shared", "-fPIC", "-fvisibility=hidden", f"-DPLUGIN_VERSION={interface}"]
    return compiled([*compiler, *flags, str(PLUGIN)], library, "QEMU's plugin")


def find_c_compiler() -> list[str] | None:
    """The command that compiles C for this machine; None where there is none."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") is not None else None


def counted_program(arch: str) -> Path:
    """The program that runs a model with marks, beside the libraries it needs. Raises TargetError."""
    from graphopt.remote.server_program import device_program

    return device_program(arch, PROGRAM)


@dataclass(frozen=True)
class _Functions:
    """Kernels by number; the parts of their code, each with its kernel's number and whether a call enters there."""

    names: list[str]
    parts: list[tuple[Function, int, bool]]

    def by_kernel(self, blocks: Sequence[Block]) -> dict[str, tuple[Block, ...]]:
        found: dict[str, list[Block]] = {}
        starts = [part.address for part, _, _ in self.parts]
        for block in blocks:
            _, number, _ = self.parts[bisect.bisect_right(starts, block.offset) - 1]
            found.setdefault(self.names[number], []).append(block)
        return {name: tuple(each) for name, each in found.items()}


def _functions(library: Path) -> _Functions:
    found = _Functions([], [])
    inside = False
    for each in read_functions(library):
        entry = each.name.startswith(_ENTRY)
        if entry:
            found.names.append(each.name.removeprefix(_ENTRY))
            inside = True
        if inside and (entry or not each.name.startswith("__")):  # not the helpers for float16, which many share
            found.parts.append((each, len(found.names) - 1, entry))
    return found


def write_inputs(specs: Sequence[Mapping[str, Any]], feeds: Mapping[str, np.ndarray], work: Path) -> Path:
    """The list of inputs that counted programs read, with the numbers in files beside it.

    `specs` have a name, a shape and a dtype. Raises DataError: an input is missing or of another shape or type.
    """
    lines = []
    for index, spec in enumerate(specs):
        name, shape, dtype = str(spec["name"]), list(spec["shape"]), np.dtype(spec["dtype"])
        array = feeds.get(name)
        if array is None:
            raise DataError(f"input {name!r} is missing")
        if list(array.shape) != shape or array.dtype != dtype:
            raise DataError(f"input {name!r} is {array.dtype}{list(array.shape)}, the model takes {dtype}{shape}")
        file = work / f"input.{index}"
        file.write_bytes(np.ascontiguousarray(array).tobytes())
        numbers = [_TYPE_CODES[dtype.kind], dtype.itemsize * 8, len(shape), *shape]
        lines.append(" ".join(map(str, [*numbers, file])) + "\n")
    listed = work / "inputs"
    listed.write_text("".join(lines))
    return listed
