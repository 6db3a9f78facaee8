"""From the input model to its variants: run the passes, measure what they cost, return layers to float if too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import model as models
from graphopt.accuracy import Accuracy, drop_in_points, evaluate
from graphopt.calibration import Dataset
from graphopt.layer_noise import layer_snr_db
from graphopt.passes.base import Context, Fidelity
from graphopt.pipeline import Observations, PassRecord, Pipeline, count_nodes, count_operators
from graphopt.progress import Progress
from graphopt.recovery import Recovery, Returned, quantized_layers, rank_layers, recover
from graphopt.report import VariantRecord
from graphopt.verify import Feeds, OutputError, Reference


@dataclass(frozen=True)
class Source:
    """The model that came in, with `--input` applied."""

    path: Path
    model: ir.Model
    signature: models.Signature


@dataclass(frozen=True)
class Data:
    """Calibration and evaluation sets, and the few samples that verify and time the model."""

    calibration: Dataset | None
    evaluation: Dataset | None
    samples: tuple[Feeds, ...]


@dataclass(frozen=True)
class Variant:
    """One version of the model, saved in `file`."""

    model: ir.Model
    file: Path
    record: VariantRecord
    fidelity: Fidelity

    @property
    def name(self) -> str:
        return self.record.name


@dataclass(frozen=True)
class Bound:
    """How much accuracy may be lost: points of top-1 or agreement, or dB of signal-to-noise at least."""

    max_drop: float
    min_snr: float

    def drop(self, before: Accuracy | None, after: Accuracy) -> float:
        """Points lost (dB short of `min_snr` for outputs that are not classes)."""
        if after.metric == "snr":
            return max(0.0, self.min_snr - after.value)
        return drop_in_points(before, after)

    def limit(self, metric: str) -> float:
        """The largest `drop` that is within the bound."""
        return 0.0 if metric == "snr" else self.max_drop

    def met(self, drop: float, metric: str) -> bool:
        return drop <= self.limit(metric) + 1e-9


@dataclass(frozen=True)
class Judge:
    """Measures a model's accuracy in ONNX Runtime on the evaluation set, against the input model."""

    source: Source
    dataset: Dataset | None
    bound: Bound
    before: Accuracy | None
    progress: Progress

    @classmethod
    def of(cls, source: Source, dataset: Dataset | None, bound: Bound, progress: Progress) -> Judge:
        labelled = dataset is not None and dataset.labels is not None
        before = None
        if dataset is not None and labelled:
            before = evaluate(source.path, dataset, signature=source.signature, progress=progress)
        return cls(source, dataset, bound, before, progress)

    def accuracy(self, model: Any) -> Accuracy | None:
        if self.dataset is None:
            return None
        return evaluate(
            model, self.dataset, reference=self.source.path, signature=self.source.signature, progress=self.progress
        )

    def drop(self, after: Accuracy) -> float:
        return self.bound.drop(self.before, after)


def make_variants(
    source: Source,
    pipeline: Pipeline,
    data: Data,
    judge: Judge,
    context: Context,
    reference: Reference,
    work: Path,
    on_pass: Callable[[PassRecord], None],
) -> list[Variant]:
    """`exact` after the passes before the first lossy one, then `final` after all, when there are lossy ones.

    A final variant outside the bound is returned too, marked so.
    """
    exact_part, lossy_part = pipeline.split()
    exact_model, records = exact_part.run(source.model, context, reference, on_pass)
    exact = _exact_variant(exact_model, exact_part, records, judge, work)
    if not lossy_part.passes:
        return [exact]
    return [exact, _final_variant(exact, pipeline, lossy_part, data, judge, context, reference, work, on_pass)]


def _exact_variant(
    model: ir.Model, pipeline: Pipeline, records: Sequence[PassRecord], judge: Judge, work: Path
) -> Variant:
    file = work / "exact.onnx"
    models.save(model, file)
    fidelity = max((p.fidelity for p in pipeline.passes), default=Fidelity.EXACT)
    accuracy = judge.accuracy(file)
    drop = None if accuracy is None else judge.drop(accuracy)
    return Variant(model, file, _record(model, file, pipeline, accuracy, drop, _last_errors(records)), fidelity)


def _final_variant(
    exact: Variant,
    pipeline: Pipeline,
    lossy_part: Pipeline,
    data: Data,
    judge: Judge,
    context: Context,
    reference: Reference,
    work: Path,
    on_pass: Callable[[PassRecord], None],
) -> Variant:
    observations = Observations()
    model, records = lossy_part.run(exact.model, context, reference, on_pass, observations)
    file = work / "final.onnx"
    models.save(model, file)
    accuracy = judge.accuracy(file)
    drop = plain_drop = None if accuracy is None else judge.drop(accuracy)
    within, returned = True, ()
    if accuracy is not None and drop is not None and not judge.bound.met(drop, accuracy.metric):

        def rebuild(excluded: tuple[str, ...]) -> ir.Model:
            return lossy_part.excluding(excluded).run(exact.model, context, observations=observations)[0]

        found = _recover(rebuild, exact.model, model, data.calibration, judge, accuracy.metric, context)
        model, drop, within, returned = found.model, found.drop, found.met, found.nodes
        pipeline, lossy_part = pipeline.excluding(returned), lossy_part.excluding(returned)
        models.save(model, file)
        accuracy = judge.accuracy(file)
    errors = reference.judge_model(model, Fidelity.LOSSY, str(lossy_part)) if returned else _last_errors(records)
    record = dataclasses.replace(
        _record(model, file, pipeline, accuracy, drop, errors),
        within_bound=within,
        plain_drop=plain_drop,
        returned_to_float=returned,
        layer_snr_db=layer_snr_db(exact.model, model, data.samples, work),
    )
    return Variant(model, file, record, Fidelity.LOSSY)


def _record(
    model: ir.Model,
    file: Path,
    pipeline: Pipeline,
    accuracy: Accuracy | None,
    drop: float | None,
    errors: tuple[OutputError, ...],
) -> VariantRecord:
    """What there is to say of every variant; it is named after its file."""
    return VariantRecord(
        name=file.stem,
        pipeline=str(pipeline),
        nodes=count_nodes(model),
        operators=count_operators(model),
        parameter_bytes=models.parameter_bytes(model),
        file_bytes=file.stat().st_size,
        errors=errors,
        accuracy=None if accuracy is None else accuracy.to_dict(),
        drop=drop,
    )


def _recover(
    rebuild: Callable[[tuple[str, ...]], ir.Model],
    exact: ir.Model,
    quantized: ir.Model,
    calibration: Dataset | None,
    judge: Judge,
    metric: str,
    context: Context,
) -> Recovery:
    """Layers back to float, most harmful first, until the bound holds."""

    def drop_of(model: ir.Model) -> float:
        accuracy = judge.accuracy(models.to_bytes(model))
        return 0.0 if accuracy is None else judge.drop(accuracy)

    ranked: tuple[Returned, ...] = ()
    if calibration is not None:
        ranked = rank_layers(
            rebuild, quantized_layers(quantized), exact, calibration, seed=context.seed, progress=context.progress
        )
    return recover(rebuild, ranked, drop_of, judge.bound.limit(metric), context.progress)


def _last_errors(records: Sequence[PassRecord]) -> tuple[OutputError, ...]:
    return next((r.errors for r in reversed(records) if r.errors), ())
