"""Cycles of counted code by LLVM's scheduling model of a core (`llvm-mca`): a figure of speed without the hardware.

    cycles = sum over runs of instructions of (times executed) x (cycles of the run, repeated, in the model)

How often each run of instructions is executed is counted in the emulator (`graphopt.remote.instructions`); what it
takes on the core's pipelines is LLVM's model. Loads hit the first-level cache there and branches are predicted, so
the cycles are what is left when memory never makes the core wait. LLVM has a model of its own for some cores, and a
relative's for others. Cycles of a model: never milliseconds.

Source: LLVM's `llvm-mca` command guide; Laukemann et al., Automated Instruction Stream Throughput Prediction for
Intel and AMD Microarchitectures, PMBS 2018 (in-core models of this kind).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from graphopt.errors import TargetError
from graphopt.remote.instructions import Block

REMEDY = "`apt install llvm`"
ITERATIONS = 50
"""Turns of a run of instructions in the model: enough for the pipeline to be full."""
NEGLIGIBLE = 0.005
"""Runs with a smaller share of a kernel's instructions are taken to have the speed of the others."""
_ATTRIBUTES = {"asimd": "+neon", "asimddp": "+dotprod", "i8mm": "+i8mm", "bf16": "+bf16", "asimdhp": "+fullfp16"}
"""LLVM's names of features that change which instructions there are. SVE is left out: code is NEON's."""
_PRODUCTS = {
    "float32": (("asimd", "fmla v{}.4s, v30.4s, v31.4s", 4),),
    "int8": (("i8mm", "smmla v{}.4s, v30.16b, v31.16b", 32), ("asimddp", "sdot v{}.4s, v30.16b, v31.16b", 16)),
}
"""By kind of a kernel's constants: feature, instruction, and multiply-accumulates, the widest first."""
_CHAINS = 24
"""Independent sums, more than any core needs to hide an instruction's latency."""


def find_tools() -> tuple[str, str] | None:
    """`llvm-mca` and `llvm-objdump`; None where one is missing."""
    found = shutil.which("llvm-mca"), shutil.which("llvm-objdump")
    return found if found[0] and found[1] else None  # pyright: ignore[reportReturnType]


class PipelineModel:
    """LLVM's model of `core` (its `-mcpu`), with `features`. Raises TargetError: LLVM's tools are not installed."""

    def __init__(self, arch: str, core: str, features: frozenset[str]):
        tools = find_tools()
        if tools is None:
            raise TargetError("llvm-mca is not installed, and it models the core's pipelines", hint=REMEDY)
        self.core, self.features = core, features
        self._mca, self._objdump = tools
        attributes = ",".join(flag for name, flag in _ATTRIBUTES.items() if name in features)
        self._options = [f"-mtriple={arch}-linux-gnu", f"-mcpu={core}", f"-mattr={attributes}"]

    def peak(self, kind: str) -> float | None:
        """Most multiply-accumulates a cycle, with constants of this kind; None where it has no instruction for them."""
        for feature, instruction, products in _PRODUCTS.get(kind, ()):
            if feature in self.features:
                (cycles,) = self.cycles_of([[instruction.format(i) for i in range(_CHAINS)]])
                return _CHAINS * products / cycles
        return None

    def kernel_cycles(self, library: Path, kernels: Mapping[str, Sequence[Block]]) -> dict[str, float]:
        """Cycles of each kernel of the library: all its calls together. Raises TargetError: LLVM cannot read it."""
        code = self._disassembled(library)
        weighed: list[tuple[str, Block]] = []
        for name, blocks in kernels.items():
            total = sum(block.instructions * block.times for block in blocks)
            weighed += [(name, b) for b in blocks if b.instructions * b.times >= NEGLIGIBLE * total]
        modelled = self.cycles_of([[code[b.offset + 4 * i] for i in range(b.instructions)] for _, b in weighed])
        cycles: dict[str, float] = dict.fromkeys(kernels, 0.0)
        instructions: dict[str, int] = dict.fromkeys(kernels, 0)
        for (name, block), once in zip(weighed, modelled, strict=True):
            cycles[name] += once * block.times
            instructions[name] += block.instructions * block.times
        for name, blocks in kernels.items():
            total = sum(block.instructions * block.times for block in blocks)
            cycles[name] *= total / max(instructions[name], 1)
        return cycles

    def cycles_of(self, runs: Iterable[Sequence[str]]) -> list[float]:
        """Cycles of each run of instructions (assembly), when it is repeated without end."""
        regions = [f"# LLVM-MCA-BEGIN {i}\n" + "\n".join(run) + "\n# LLVM-MCA-END\n" for i, run in enumerate(runs)]
        if not regions:
            return []
        views = ["-json", f"-iterations={ITERATIONS}", "-instruction-info=0", "-resource-pressure=0"]
        done = subprocess.run(
            [self._mca, *self._options, *views], input="".join(regions), capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no word from it"]
            raise TargetError(f"llvm-mca cannot model the code for {self.core}: {said[0][:200]}")
        found = json.loads(done.stdout)["CodeRegions"]
        by_number = {int(each["Name"]): each["SummaryView"]["TotalCycles"] / ITERATIONS for each in found}
        return [by_number[i] for i in range(len(regions))]

    def _disassembled(self, library: Path) -> dict[int, str]:
        """By address, instructions as llvm-mca reads them: what they jump to does not matter."""
        options = ["-d", "--no-show-raw-insn", *(f"-{o}" for o in self._options if o.startswith("-mattr"))]
        done = subprocess.run([self._objdump, *options, str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"llvm-objdump cannot read {library}: {done.stderr.strip()[:200]}")
        found = {}
        for address, text in re.findall(r"^\s*([0-9a-f]+):\s+(\S.*)$", done.stdout, re.MULTILINE):
            plain = re.sub(r"\s*(//|;).*$", "", text)
            found[int(address, 16)] = re.sub(r"(0x)?[0-9a-f]+\s+<[^>]*>", ".Lelsewhere", plain)
        return found
