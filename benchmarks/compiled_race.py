"""Versions of one classifier: made by passes, judged on pictures held out, compiled and verified, raced in turns."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from ablation import static
from shared_data import Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import Dataset, load_dataset
from graphopt.candidates import Compiler
from graphopt.inspection import inspect
from graphopt.measure import Contender, PairedResult, race_afresh
from graphopt.passes.base import Context, Fidelity
from graphopt.pipeline import Observations, Pipeline, count_nodes, count_operators
from graphopt.places import Here
from graphopt.plugins import parse_target
from graphopt.progress import SILENT
from graphopt.report import VariantRecord
from graphopt.settings import Settings
from graphopt.variants import Data, Source, Variant
from graphopt.verify import Feeds, Reference

EXACT = "simplify,fold-batch-norm"
CALIBRATION = {"imagenet": 200, "cifar": 400, "mnist": 1000}
"""Samples that calibrate, by the kind of data; all others evaluate."""
SESSIONS = 3
"""Of fresh processes in a race, each on a picture of its own."""


def macs(model: ir.Model) -> int:
    """Multiply-accumulates of a run on one sample."""
    counted = inspect(static(model))
    if counted.macs is None:
        raise SystemExit(counted.macs_unknown)
    return counted.macs


def pictures(data: Dataset) -> list[Feeds]:
    """Samples to verify and time on, one for each session."""
    return [feeds for feeds, _ in zip(data.batches(1), range(SESSIONS), strict=False)]


def points(lost: float) -> str:
    """Points of accuracy, without a sign where they round to zero."""
    return f"{round(lost, 2) + 0.0:.2f}"


@dataclass(frozen=True)
class Version:
    """What passes made of the model. `top1` in percent, `lost` in points."""

    model: ir.Model
    top1: float
    lost: float
    macs: int
    parameter_bytes: int
    changed: bool
    """Whether the first lossy pass found anything to do."""


class Maker:
    """Makes versions of a classifier: lossy passes behind EXACT, on data that is not evaluated on."""

    def __init__(self, which: Classifier, folder: Path, threads: int, evaluate_on: int | None = None):
        self.which = which
        self.source = Source(which.path, source := models.load(which.path), models.signature(source))
        data = load_dataset(which.data_path(folder), self.source.signature, which.preprocess)
        calibration, self.evaluation = data.draw(CALIBRATION[which.data], 0)
        if evaluate_on is not None:
            self.evaluation, _ = self.evaluation.draw(min(evaluate_on, len(self.evaluation)), 1)
        self._context = Context(parse_target(f"cpu{{threads={threads}}}").capabilities, data=calibration)
        self._observations = Observations()
        exact, _ = Pipeline.parse(EXACT).run(source, self._context)
        top1 = self._top1(exact)
        self.exact = Version(exact, top1, 0.0, macs(exact), models.parameter_bytes(exact), True)

    def make(self, passes: str) -> Version:
        """Raises what the passes raise."""
        lossy = Pipeline.parse(passes)
        model, records = lossy.run(self.exact.model, self._context, observations=self._observations)
        top1 = self._top1(model)
        size = models.parameter_bytes(model)
        return Version(model, top1, self.exact.top1 - top1, macs(model), size, records[0].applied > 0)

    def _top1(self, model: ir.Model) -> float:
        return evaluate(models.to_bytes(model), self.evaluation, signature=self.source.signature).value


def race(
    versions: Mapping[str, ir.Model],
    exact: str,
    source: Source,
    samples: Sequence[Feeds],
    *,
    threads: int,
    tune_seconds: float,
    seconds: float,
) -> PairedResult:
    """Compile each version as `graphopt optimize` does, and time those that are right in turns, `seconds` in all.

    `exact` is the name of the one that differs from the source by rounding only. `tune_seconds` for each of them. What
    could not be built, or is wrong, is in `failed`. Raises MeasurementError when none is left.
    """
    target = parse_target(f"cpu{{threads={threads}}}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        reference = Reference(source.model, samples, work)
        settings = Settings(model=str(source.path), threads=threads)
        compiler = Compiler(target, Here(), settings, reference, Data(None, None, tuple(samples)), work, SILENT)
        contenders, failed = [], {}
        for number, (name, model) in enumerate(versions.items()):
            variant = _variant(model, work / f"version{number}.onnx", name == exact, reference)
            made = compiler.compile(variant, "float32", tune_seconds)
            if made.record.status == "measured":
                contenders.append(Contender.compiled(made.path, name))
            else:
                failed[name] = f"{made.record.status}: {made.record.reason}"
        result = race_afresh(contenders, samples, threads=threads, seconds=seconds)
    return dataclasses.replace(result, failed={**failed, **result.failed})


def _variant(model: ir.Model, file: Path, is_exact: bool, reference: Reference) -> Variant:
    models.save(model, file)
    fidelity = Fidelity.ROUNDING if is_exact else Fidelity.LOSSY
    record = VariantRecord(
        name=file.stem,
        pipeline="",
        nodes=count_nodes(model),
        operators=count_operators(model),
        parameter_bytes=models.parameter_bytes(model),
        file_bytes=file.stat().st_size,
        errors=reference.judge_model(model, fidelity, file.stem),
    )
    return Variant(model, file, record, fidelity)
