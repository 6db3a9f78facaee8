"""From the input model to its variants: run the passes, measure what they cost, return layers to float if too much."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """Of its file, or of what `opsets` made of it where that is of a version ONNX Runtime does not know."""
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
    with_float: Callable[[tuple[str, ...], str], Variant] | None = None
    """Makes this variant with these layers left float too, under another name; None where passes leave none out."""

    @property
    def name(self) -> str:
        return self.record.name


@dataclass(frozen=True)
class Bound:
    """How much accuracy may be lost: points of top-1 or agreement, or dB of signal-to-noise at least."""

    max_drop: float
    min_snr: float
    by_snr: bool = False
    """Whether signal-to-noise counts though the output looks like classes."""

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
        labelled = dataset is not None and dataset.labels is not None and not bound.by_snr
        before = None
        if dataset is not None and labelled:
            before = evaluate(source.path, dataset, signature=source.signature, progress=progress)
        return cls(source, dataset, bound, before, progress)

    def accuracy(self, model: Any) -> Accuracy | None:
        if self.dataset is None:
            return None
        return evaluate(
            model,
            self.dataset,
            reference=self.source.path,
            signature=self.source.signature,
            progress=self.progress,
            classes=not self.bound.by_snr,
        )

    def drop(self, after: Accuracy) -> float:
        return self.bound.drop(self.before, after)

    def limited(self, samples: int | None) -> Judge:
        """This judge on so many samples of the evaluation set, always the same; None: on all."""
        if self.dataset is None or samples is None or samples >= len(self.dataset):
            return self
        return Judge.of(self.source, self.dataset.draw(samples, 0)[0], self.bound, self.progress)


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
    lossy = _LossyPart(exact, pipeline, lossy_part, data, judge, context, reference, work)
    return [exact, lossy.final(on_pass)]


def make_lossy(
    exact: Variant,
    part: Pipeline,
    name: str,
    data: Data,
    judge: Judge,
    context: Context,
    reference: Reference,
    work: Path,
) -> Variant:
    """`exact` after the passes of `part`, saved and judged; nothing is returned to float if it is outside the bound."""
    whole = Pipeline((*Pipeline.parse(exact.record.pipeline).passes, *part.passes))
    return _LossyPart(exact, whole, part, data, judge, context, reference, work).plain(name)


def _exact_variant(
    model: ir.Model, pipeline: Pipeline, records: Sequence[PassRecord], judge: Judge, work: Path
) -> Variant:
    file = work / "exact.onnx"
    models.save(model, file)
    fidelity = max((p.fidelity for p in pipeline.passes), default=Fidelity.EXACT)
    accuracy = judge.accuracy(file)
    drop = None if accuracy is None else judge.drop(accuracy)
    return Variant(model, file, _record(model, file, pipeline, accuracy, drop, _last_errors(records)), fidelity)


@dataclass(frozen=True)
class _LossyPart:
    """The second part of a pipeline, run on the exact variant with one set of layers or another left float."""

    exact: Variant
    pipeline: Pipeline
    """The whole of it."""
    part: Pipeline
    data: Data
    judge: Judge
    context: Context
    reference: Reference
    work: Path
    observations: Observations = field(default_factory=Observations)

    def final(self, on_pass: Callable[[PassRecord], None]) -> Variant:
        """After all passes, with layers returned to float where the bound needs it."""
        model, records = self.part.run(self.exact.model, self.context, self.reference, on_pass, self.observations)
        accuracy, drop = self._saved(model, "final")
        plain_drop, returned, errors = None, (), _last_errors(records)
        if accuracy is not None and drop is not None and not self.judge.bound.met(drop, accuracy.metric):
            plain_drop = drop
            found = _recover(
                self._without, self.exact.model, model, self.data.calibration, self.judge, accuracy.metric, self.context
            )
            model, returned = found.model, found.nodes
            accuracy, drop = self._saved(model, "final")
            errors = self._errors(model, returned) if returned else errors
        record = self._record(model, "final", returned, accuracy, drop, errors)
        record = dataclasses.replace(record, plain_drop=plain_drop, returned_to_float=returned)

        def with_float(floats: tuple[str, ...], name: str) -> Variant:
            return self._mixed((*returned, *floats), floats, name)

        able = any(each.quantizes for each in self.part.passes)
        return Variant(model, self._file("final"), record, Fidelity.LOSSY, with_float if able else None)

    def plain(self, name: str) -> Variant:
        """After all passes."""
        model, records = self.part.run(self.exact.model, self.context, self.reference, None, self.observations)
        accuracy, drop = self._saved(model, name)
        record = self._record(model, name, (), accuracy, drop, _last_errors(records))
        return Variant(model, self._file(name), record, Fidelity.LOSSY)

    def _mixed(self, excluded: tuple[str, ...], floats: tuple[str, ...], name: str) -> Variant:
        model = self._without(excluded)
        accuracy, drop = self._saved(model, name)
        record = self._record(model, name, excluded, accuracy, drop, self._errors(model, excluded))
        return Variant(
            model, self._file(name), dataclasses.replace(record, float_for_speed=floats), Fidelity.LOSSY
        )  # fmt: skip

    def _without(self, excluded: tuple[str, ...]) -> ir.Model:
        part = self.part.excluding(excluded)
        return part.run(self.exact.model, self.context, observations=self.observations)[0]

    def _file(self, name: str) -> Path:
        return self.work / f"{name}.onnx"

    def _saved(self, model: ir.Model, name: str) -> tuple[Accuracy | None, float | None]:
        """Its accuracy and what that lost."""
        models.save(model, self._file(name))
        accuracy = self.judge.accuracy(self._file(name))
        return accuracy, None if accuracy is None else self.judge.drop(accuracy)

    def _errors(self, model: ir.Model, excluded: tuple[str, ...]) -> tuple[OutputError, ...]:
        return self.reference.judge_model(model, Fidelity.LOSSY, str(self.part.excluding(excluded)))

    def _record(
        self,
        model: ir.Model,
        name: str,
        excluded: tuple[str, ...],
        accuracy: Accuracy | None,
        drop: float | None,
        errors: tuple[OutputError, ...],
    ) -> VariantRecord:
        pipeline = self.pipeline.excluding(excluded)
        within = accuracy is None or drop is None or self.judge.bound.met(drop, accuracy.metric)
        return dataclasses.replace(
            _record(model, self._file(name), pipeline, accuracy, drop, errors),
            within_bound=within,
            layer_snr_db=layer_snr_db(self.exact.model, model, self.data.samples, self.work),
        )


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
