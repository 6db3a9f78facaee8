"""Every variant on every engine that can run it, each verified before it may be timed."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import guard
from graphopt import model as models
from graphopt.compiling import can_go_apart, compile_apart, compile_here
from graphopt.crashes import reproducer
from graphopt.errors import DeviceError, GraphoptError, TargetError, VerificationError
from graphopt.measure import Contender
from graphopt.passes.base import Fidelity
from graphopt.places import Place
from graphopt.precision import NARROW, check_noise, narrowed
from graphopt.progress import Progress
from graphopt.report import CandidateRecord
from graphopt.schedule_database import database_path
from graphopt.settings import Settings
from graphopt.targets.base import Target, TuningReport
from graphopt.variants import Data, Source, Variant
from graphopt.verify import Feeds, OutputError, Reference

TWICE_DB = 10 * math.log10(2)
INPUT = "input · onnxruntime"
"""The model as it came in, in ONNX Runtime: what every candidate has to beat."""
PLAIN = "exact · tvm"
"""The exact variant, compiled: what every candidate has to beat where ONNX Runtime does not run."""


@dataclass(frozen=True)
class Candidate:
    """Something that could be delivered: `path` is an ONNX file, or the folder of a compiled library or of parts."""

    record: CandidateRecord
    variant: Variant | None
    path: Path

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def contender(self) -> Contender:
        """What a place opens and races."""
        if self.record.engine == "tvm":
            return Contender.compiled(self.path, self.name)
        if self.record.engine == "hybrid":
            return Contender.hybrid(self.path, self.name)
        return Contender.onnx(self.path, self.name)


def baseline(place: Place) -> str:
    """The name of the candidate that all others are compared with."""
    return INPUT if place.is_here else PLAIN


def make_candidates(source: Source, variants: list[Variant], compiler: Compiler) -> list[Candidate]:
    """The input model in ONNX Runtime first, then every variant in ONNX Runtime and compiled by the target; what is to
    run elsewhere than on this machine, compiled only.

    With the setting `precision` bf16 or fp16, variants that are not lossy themselves are compiled in that too; where
    there is no evaluation data to judge these by, their noise on the verification samples does.
    """
    settings, here = compiler.settings, compiler.place.is_here
    whole = CandidateRecord(INPUT, "input", "onnxruntime", "measured", size_bytes=source.path.stat().st_size)
    candidates = [Candidate(whole, None, source.path)] if here else []
    narrow = [v for v in variants if settings.precision in NARROW and v.fidelity is not Fidelity.LOSSY]
    share = settings.tune_seconds / (len(variants) + len(narrow))
    for variant in variants:
        if not variant.record.within_bound:
            engine = "onnxruntime" if here else "tvm"
            record = _record(variant, engine, "outside bound", f"loses {variant.record.drop:.2f} points")
            candidates.append(Candidate(record, variant, variant.file))
            continue
        if here and settings.engine in ("auto", "onnxruntime"):
            record = _record(variant, "onnxruntime", "measured", size=variant.file.stat().st_size)
            candidates.append(Candidate(record, variant, variant.file))
        if settings.engine in ("auto", "tvm"):
            candidates.append(compiler.compile(variant, "float32", share))
            if variant in narrow:
                candidates.append(compiler.compile(variant, settings.precision, share))
    return candidates


def specialise(model: ir.Model, sample: Feeds) -> ir.Model:
    """A copy with every input's shape fixed to that of `sample`: what a compiler wants."""
    return models.fix_inputs(model, {name: array.shape for name, array in sample.items()})


@dataclass(frozen=True)
class Compiler:
    """Compiles variants for the target, each into a folder of its own, and verifies what came out."""

    target: Target
    place: Place
    settings: Settings
    reference: Reference
    data: Data
    work: Path
    progress: Progress
    _made: dict[tuple[int, str], Candidate] = field(default_factory=dict, init=False)
    """By id of the variant, which its candidate keeps alive, and precision."""

    def compile(self, variant: Variant, precision: str, tune_seconds: float) -> Candidate:
        """The candidate, with its status; `precision` is what images and weights in float are stored as.

        A variant that was compiled before is not compiled again.
        """
        key = id(variant), precision
        if key not in self._made:
            self._made[key] = self._compile(variant, precision, tune_seconds)
        return self._made[key]

    def build(self, model: ir.Model, folder: Path, precision: str, tune_seconds: float) -> TuningReport:
        """Tune and compile `model` into `folder`, unverified. Raises TargetError."""
        return self.build_static(specialise(model, self.data.samples[0]), folder, precision, tune_seconds)

    def build_static(self, model: ir.Model, folder: Path, precision: str, tune_seconds: float) -> TuningReport:
        """`build` of a model whose input shapes are static already."""
        return self._built(model, folder, precision, tune_seconds)[0]

    def _built(
        self,
        model: ir.Model,
        folder: Path,
        precision: str,
        tune_seconds: float,
        samples: Sequence[Feeds] = (),
        who: str = "the model",
    ) -> tuple[TuningReport, list[dict[str, np.ndarray]] | None]:
        """The tuning report, and the outputs for `samples`; None where they were not run.

        Where it can be, all this happens in a process of its own (see `compiling`): a crash there is a TargetError that
        names the node, with a reproducer in the cache folder.
        """
        target = narrowed(self.target, precision) if precision in NARROW else self.target
        seconds = tune_seconds if self.place.runs else 0
        how = folder, seconds, database_path(), self.settings.seed, self.progress
        devices = self.place.devices
        if devices is not None or not can_go_apart(target):
            return compile_here(model, target, *how, devices=devices), None
        try:
            tuning, outputs = compile_apart(model, target, *how, samples=samples)
        except guard.CrashError as crash:
            what = f"compiling {who} crashed ({crash})"
            command = f"graphopt tune model.onnx --target '{target}' --tune-seconds {seconds:g}"
            small = models.parameter_bytes(model) < models.PROTOBUF_LIMIT_BYTES // 2
            saved = reproducer(models.to_bytes(model), f"{what}\n\n{command}") if small else None
            raise TargetError(what, hint=f"please report it with {saved}" if saved else None) from crash
        return tuning, outputs if samples else None

    def _compile(self, variant: Variant, precision: str, tune_seconds: float) -> Candidate:
        folder = Path(tempfile.mkdtemp(prefix=f"{variant.name}-{precision}-", dir=self.work))
        try:
            tuning, errors = self._made_and_verified(variant, folder, precision, tune_seconds)
        except VerificationError as error:
            return Candidate(_record(variant, "tvm", "wrong", str(error), precision=precision), variant, folder)
        except GraphoptError as error:
            if not isinstance(error, TargetError) or isinstance(error, DeviceError):
                raise
            return Candidate(_record(variant, "tvm", "unavailable", str(error), precision=precision), variant, folder)
        size = sum(f.stat().st_size for f in folder.iterdir())
        status = "measured" if self.place.runs else "not run"
        record = _record(variant, "tvm", status, size=size, precision=precision)
        record = dataclasses.replace(record, errors=errors, tuning=tuning)
        made = Candidate(record, variant, folder)
        noise_counts = self.place.runs and precision != "float32" and variant.fidelity is not Fidelity.LOSSY
        return _bounded(made, self.settings.min_snr) if noise_counts and self.data.evaluation is None else made

    def _made_and_verified(
        self, variant: Variant, folder: Path, precision: str, tune_seconds: float
    ) -> tuple[dict[str, Any], tuple[OutputError, ...]]:
        """The tuning report, as JSON has it, and the errors of the outputs."""
        who = f"the {variant.name} variant"
        samples = self.reference.samples if self.place.is_here else ()
        model = specialise(variant.model, self.data.samples[0])
        tuning, outputs = self._built(model, folder, precision, tune_seconds, samples=samples, who=who)
        if not self.place.runs:
            return dataclasses.asdict(tuning), ()
        if outputs is None:
            with self.place.open(Contender.compiled(folder), None) as run:
                outputs = [run(sample) for sample in self.reference.samples]
        return dataclasses.asdict(tuning), self._judged(outputs, variant, precision)

    def _judged(
        self, outputs: Sequence[Mapping[str, np.ndarray]], variant: Variant, precision: str
    ) -> tuple[OutputError, ...]:
        if precision == "float32" or variant.fidelity is Fidelity.LOSSY:
            return verify(outputs, variant, self.reference)
        who = f"compiling the {variant.name} variant in {precision}"
        return self.reference.judge_outputs(outputs, Fidelity.LOSSY, who)


def _bounded(candidate: Candidate, min_snr: float) -> Candidate:
    """The candidate, marked where it was built but is too noisy."""
    try:
        check_noise(candidate.record.errors, min_snr, candidate.record.precision)
    except VerificationError as error:
        record = dataclasses.replace(candidate.record, status="outside bound", reason=str(error))
        return dataclasses.replace(candidate, record=record)
    return candidate


def verify(
    outputs: Sequence[Mapping[str, np.ndarray]], variant: Variant, reference: Reference
) -> tuple[OutputError, ...]:
    """Exact variants: within rounding of the input model. Lossy ones: compiling may add at most twice the noise that
    the lossy pass itself added (a value on the edge between two quanta may fall either way in two correct engines,
    and some networks make as much of that as of the quantization); accuracy through this engine is measured later."""
    who = f"compiling the {variant.name} variant"
    if variant.fidelity is not Fidelity.LOSSY:
        return reference.judge_outputs(outputs, Fidelity.ROUNDING, who)
    same = Reference(variant.model, reference.samples, reference.work)
    errors = same.judge_outputs(outputs, Fidelity.LOSSY, who)
    allowed = {e.name: e.snr_db for e in variant.record.errors}
    for error in errors:
        floor = allowed.get(error.name, math.inf)
        if np.isfinite(floor) and error.snr_db < floor - TWICE_DB:
            raise VerificationError(
                f"{who} adds noise at {error.snr_db:.1f} dB to output {error.name!r}, "
                f"more than twice that of the lossy passes themselves at {floor:.1f} dB"
            )
    return errors


def _record(
    variant: Variant, engine: str, status: str, reason: str = "", size: int = 0, precision: str = "float32"
) -> CandidateRecord:
    name = f"{variant.name} · {engine}" + (f" {precision}" if precision != "float32" else "")
    return CandidateRecord(name, variant.name, engine, status, reason, size_bytes=size, precision=precision)
