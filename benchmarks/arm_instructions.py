#!/usr/bin/env python3
"""Instructions of one inference on emulated ARM cores, against ONNX Runtime's: a table of docs/results.md.

    python benchmarks/arm_instructions.py OUT MODEL.onnx ... [--cores a53,a72,a76,max] [--recipes fp32,int8]

Both engines run under QEMU on one thread, and a plugin counts what they execute (docs/arm.md): counts, no times.
graphopt compiles with its templates' first decisions, without a search. What it computes is matched first: float32
within what rounding explains (graphopt/verify.py), INT8 with at most twice the noise of the quantization itself, both
against ONNX Runtime on this machine. ONNX Runtime, from its own wheel for aarch64 of the same version, gets of each
model the forms it might like, and the fewest instructions stand: for fp32 the model as it is and as the preset
`exact` leaves it; for INT8 the same signed bytes as graphopt, and unsigned activations. Calibration: the pictures of
`shared_data`, else noise.

`max+sme` is `max` with the matrix extension, which graphopt does not use and ONNX Runtime does. What was counted is
kept in OUT and not counted again until the model changes or --fresh is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from arm_peer import CORES, Core, Peer
from engines import static
from integer_artifacts import calibration

from graphopt import capabilities
from graphopt import model as models
from graphopt.candidates import TWICE_DB, specialise
from graphopt.errors import GraphoptError, VerificationError
from graphopt.passes.base import Context, Fidelity
from graphopt.pipeline import PRESETS, Pipeline
from graphopt.remote.instructions import InstructionCounts, count_instructions
from graphopt.targets.arm import Arm
from graphopt.verify import Reference

SAMPLES = 32
RECIPES = ("fp32", "int8")


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    model: str
    core: str
    recipe: str
    matched: str
    """How far the result is off: of what rounding explains, or dB. Or why it does not match."""
    ours: int
    theirs: int

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


class Prepared:
    """A model with fixed shapes, its sample, and its variants."""

    def __init__(self, path: Path, out: Path):
        self.name, self.folder = path.stem, out / path.stem
        self.path = static(path, self.folder)
        self.model = models.load(self.path)
        self.signature = models.signature(self.model)
        (self.sample,) = calibration(self.name, self.signature, 1, out).batches(1)
        self.out = out
        self.reference = Reference(self.model, [self.sample], self.folder)

    def variant(self, preset: str, form: str) -> Path:
        """The model after a preset for a processor whose activations are `form`; made once."""
        file = self.folder / f"{preset}-{form}.onnx"
        if not file.is_file():
            able = {"signed": Arm().capabilities, "unsigned": capabilities.x86_for_mcpu("x86-64-v4")}[form]
            data = calibration(self.name, self.signature, SAMPLES, self.out) if preset == "int8" else None
            context = Context(data=data, capabilities=able)
            models.save(Pipeline.parse(PRESETS[preset]).run(self.model, context)[0], file)
        return file

    def files(self, recipe: str) -> tuple[Path, list[Path]]:
        """What graphopt compiles, and what ONNX Runtime is given."""
        if recipe == "fp32":
            exact = self.variant("exact", "signed")
            return exact, [self.path, exact]
        signed = self.variant("int8", "signed")
        return signed, [signed, self.variant("int8", "unsigned")]


def counted(prepared: Prepared, file: Path, core: Core) -> InstructionCounts:
    target = Arm(mcpu=core.llvm, threads=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.build(target.lower(specialise(models.load(file), prepared.sample)), folder)
        return count_instructions(folder, prepared.sample, core.qemu)


def matched(prepared: Prepared, file: Path, outputs: Mapping[str, np.ndarray], recipe: str) -> str:
    """Raises VerificationError."""
    if recipe == "fp32":
        errors = prepared.reference.judge_outputs([outputs], Fidelity.ROUNDING, "compiling")
        return f"{max(e.max_abs_error / e.tolerance for e in errors):.3f} of rounding"
    quantized: ir.Model = models.load(file)
    added = {e.name: e.snr_db for e in prepared.reference.judge_model(quantized, Fidelity.LOSSY, "quantizing")}
    same = Reference(quantized, [prepared.sample], prepared.folder)
    errors = same.judge_outputs([outputs], Fidelity.LOSSY, "compiling")
    for each in errors:
        if each.snr_db < added[each.name] - TWICE_DB:
            raise VerificationError(
                f"{each.name}: {each.snr_db:.1f} dB, the quantization itself {added[each.name]:.1f}"
            )
    worst = min(e.snr_db for e in errors)
    return "bit for bit" if np.isinf(worst) else f"{worst:.1f} dB"


def row(prepared: Prepared, peer: Peer, core: str, recipe: str, fresh: bool) -> Row:
    kept = prepared.folder / f"{core}-{recipe}.json"
    if kept.is_file() and not fresh and kept.stat().st_mtime > prepared.path.stat().st_mtime:
        return Row(**json.loads(kept.read_text()))
    file, forms = prepared.files(recipe)
    theirs_file = prepared.folder / f"{core}-{recipe}-onnxruntime.json"
    if theirs_file.is_file() and theirs_file.stat().st_mtime > prepared.path.stat().st_mtime:
        theirs = json.loads(theirs_file.read_text())
    else:
        theirs = {form.name: peer.count(form, prepared.sample, CORES[core])[0] for form in forms}
        theirs_file.write_text(json.dumps(theirs))
    found = counted(prepared, file, CORES[core])
    try:
        how = matched(prepared, file, found.outputs, recipe)
    except VerificationError as error:
        how = f"no: {error}"
    made = Row(prepared.name, core, recipe, how, found.total, min(theirs.values()))
    kept.write_text(json.dumps(asdict(made)))
    (prepared.folder / f"{core}-{recipe}-kernels.json").write_text(json.dumps(found.by_kernel, indent=1))
    return made


def table(rows: list[Row], cores: list[str], recipe: str) -> str:
    """A line for each model, a column for each core."""
    mine = [r for r in rows if r.recipe == recipe]
    lines = [f"| {recipe} | matched | {' | '.join(cores)} |", "|---" * (2 + len(cores)) + "|"]
    for name in dict.fromkeys(r.model for r in mine):
        cells = {r.core: r for r in mine if r.model == name}
        how = ", ".join(dict.fromkeys(r.matched for r in cells.values()))
        shown = [
            f"{r.ours / 1e6:.4g} / {r.theirs / 1e6:.4g} = {r.ratio:.2f}" if (r := cells.get(core)) else "-"
            for core in cores
        ]
        lines.append(f"| {name} | {how} | {' | '.join(shown)} |")
    ratios = {core: [r.ratio for r in mine if r.core == core] for core in cores}
    means = [f"{np.exp(np.mean(np.log(found))):.3f}" if found else "-" for found in ratios.values()]
    return "\n".join([*lines, f"| geometric mean | | {' | '.join(means)} |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--cores", default="a53,a72,a76,max", help=f"of {', '.join(CORES)}")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--fresh", action="store_true", help="count graphopt's again")
    parser.add_argument("--table-only", action="store_true", help="only what was counted before")
    args = parser.parse_args()
    cores, recipes = args.cores.split(","), args.recipes.split(",")
    unknown = (set(cores) - set(CORES)) | (set(recipes) - set(RECIPES))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows = known_rows(args.out, args.models, cores, recipes) if args.table_only else counted_rows(args, cores, recipes)
    text = "Millions of instructions an inference: graphopt's / ONNX Runtime's = ratio.\n\n"
    text += "\n".join(table(rows, cores, recipe) for recipe in recipes)
    (args.out / "arm.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def known_rows(out: Path, paths: list[Path], cores: list[str], recipes: list[str]) -> list[Row]:
    files = [out / path.stem / f"{core}-{recipe}.json" for path in paths for recipe in recipes for core in cores]
    return [Row(**json.loads(file.read_text())) for file in files if file.is_file()]


def counted_rows(args: argparse.Namespace, cores: list[str], recipes: list[str]) -> list[Row]:
    peer = Peer(args.out / "onnxruntime")
    rows: list[Row] = []
    for path in args.models:
        prepared = Prepared(path, args.out)
        for recipe in recipes:
            for core in cores:
                try:
                    rows.append(row(prepared, peer, core, recipe, args.fresh))
                except GraphoptError as error:
                    print(f"{path.stem} {core} {recipe}: {error}", file=sys.stderr, flush=True)
                else:
                    print(f"{rows[-1]} {rows[-1].ratio:.3f}", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
