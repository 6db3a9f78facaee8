"""The whole program, one function a stage:

    resolve -> load -> rewrite (passes, verify, recover) -> search (with an objective: settings of all layers)
            -> compile (lower, tune, build, verify) -> measure -> choose -> write the artifact and its report

Passes propose; measurement on the target disposes: `choose` delivers what was fastest in one paired run among
the variants that are still right, and never one that is slower than the model that came in.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt import calibration, opsets, samples
from graphopt import model as models
from graphopt.artifact_writer import write_artifact
from graphopt.candidates import Candidate, Compiler, baseline, make_candidates
from graphopt.engine_accuracy import judge_engine
from graphopt.errors import DataError, SpecError, TargetError
from graphopt.gate import choose, compare_candidates, explain
from graphopt.hybrid import with_hybrids
from graphopt.libraries import Library, leading, make_libraries, parse_targets
from graphopt.measure import Counts, PairedResult, environment, time_reference
from graphopt.mixing import mix
from graphopt.output_folder import check_output, staged
from graphopt.passes.base import Context, Pass
from graphopt.pipeline import PassRecord, Pipeline, count_nodes, count_operators
from graphopt.places import Place, place_for
from graphopt.precision import settled
from graphopt.progress import SILENT, Progress
from graphopt.rehearsal import rehearse
from graphopt.report import DataRecord, Report, SourceRecord
from graphopt.runtime.artifact import Artifact, load
from graphopt.search import search
from graphopt.settings import Settings
from graphopt.sizes.build import make_sized
from graphopt.sizes.plan import SizePlan
from graphopt.targets.base import Target
from graphopt.targets.llvm import LlvmTarget
from graphopt.variants import Bound, Data, Judge, Source, Variant, make_variants
from graphopt.verify import Feeds, Reference

VERIFICATION_SAMPLES = 4


@dataclass(frozen=True)
class Result:
    """What `optimize` returns: the report, and the artifact's folder when one was written."""

    report: Report
    path: Path | None

    def load(self, threads: int | None = None) -> Artifact:
        """Open the artifact. Raises ArtifactError when the run wrote none."""
        return load(self.path or "no output folder was given", threads, trust=True)


def optimize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    passes: str | Pipeline | Iterable[Pass] | None = None,
    target: str | Target = "cpu",
    progress: Progress = SILENT,
    on_pass: Callable[[PassRecord], None] = lambda record: None,
    **options: Any,
) -> Result:
    """Find the fastest version of `model` that is still right on `target`; write it to `output` if given.

    `options` are the fields of `Settings`: preset, objective, search_seconds, calib, calib_samples, eval, preprocess,
    max_drop, min_snr, metric, inputs, sizes, threads, engine, precision, remote, tune_seconds, measure_seconds, seed,
    overwrite.

    Raises SpecError, ModelError, DataError, ArtifactError (usage or input), PassError, VerificationError,
    TargetError (failure), DeviceError (a remote device cannot be reached or was lost). Where the accuracy bound cannot
    be met, the result says `report.accuracy_met == False` and carries the fastest variant that does keep it.
    """
    pipeline = Pipeline.of(passes) if passes is not None else None
    settings = Settings(
        model=os.fspath(model),
        output=None if output is None else os.fspath(output),
        passes=None if pipeline is None else str(pipeline),
        target=str(target),
        **{k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()},
    )
    return run(settings, progress=progress, on_pass=on_pass, pipeline=pipeline)


def run(
    settings: Settings,
    *,
    progress: Progress = SILENT,
    on_settings: Callable[[Settings, Target], None] = lambda settings, target: None,
    on_pass: Callable[[PassRecord], None] = lambda record: None,
    pipeline: Pipeline | None = None,
) -> Result:
    """`optimize` with its options as one value; `on_settings` is called before work starts."""
    settings, pipeline, targets, target, place = _resolve(settings, pipeline)
    on_settings(settings, target)
    report = Report(settings=dataclasses.asdict(settings), environment=environment(settings.threads or 1).to_dict())
    report.target = {"spec": str(target), **target.capabilities.describe()}
    with ExitStack() as ending:
        stage = None
        if settings.output is not None:
            stage = ending.enter_context(staged(settings.output, settings.overwrite))
        work = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-")))
        ending.enter_context(place)
        with _timed(report, "load"):
            source, data, plan = _load(settings, report, work)
            rehearse(source.path, settings.inputs, data.samples, work)
            reference = Reference(source.model, data.samples, work)
        with _timed(report, "rewrite"):
            variants = _rewrite(source, pipeline, data, settings, target, reference, report, work, progress, on_pass)
            if plan is not None:
                plan.proved(variants[0].model, work)  # refused now, not after an hour
        compiler = Compiler(target, place, settings, reference, data, work, progress)
        if settings.objective is not None:
            with _timed(report, "search"):
                variants += _search(source, variants, compiler, report)
        with _timed(report, "compile"):
            candidates = _compile(source, variants, compiler, report)
        with _timed(report, "measure"):
            if place.runs:
                chosen, race = _measure_and_choose(source, candidates, compiler, report)
            else:
                chosen, race = _choose_unmeasured(candidates, compiler, report), None
        with _timed(report, "libraries"):
            libraries = _make_libraries(chosen, targets, source, compiler, report)
            sized = None if plan is None else make_sized(chosen, variants[0], plan, source, compiler)
            report.sizes = () if sized is None else sized.records
        if stage is not None:
            with _timed(report, "write"):
                write_artifact(
                    stage,
                    chosen,
                    source,
                    data.samples[0],
                    _replaying(settings, chosen),
                    libraries,
                    report,
                    None if race is None else {**_with_reference(race).to_dict(), "delivered": chosen.name},
                    sized,
                )
    return Result(report, None if settings.output is None else Path(settings.output))


def _resolve(
    settings: Settings, pipeline: Pipeline | None
) -> tuple[Settings, Pipeline, tuple[Target, ...], Target, Place]:
    """`target` is the one of `targets` for which candidates are compared."""
    settings = settings.resolved()
    pipeline = Pipeline.parse(settings.pipeline_text()) if pipeline is None else pipeline
    targets = tuple(_with_threads(each, settings.threads) for each in parse_targets(settings.target))
    asked = leading(targets) if settings.remote is None else targets[0]
    settings, target = settled(settings, asked)
    targets = tuple(target if each == asked else each for each in targets)
    place = place_for(target, settings.remote)
    whole = place.completed(target)
    targets, target = tuple(whole if each == target else each for each in targets), whole
    _check_place(settings, place)
    if settings.sizes and not (place.is_here and len(targets) == 1 and isinstance(target, LlvmTarget)):
        raise SpecError("--sizes is for one target, this machine's processor", hint="give --input for one size")
    threads = getattr(target, "threads" if place.is_here else "thread_count", None) or os.cpu_count() or 1
    if settings.output is not None:
        check_output(settings.output, settings.overwrite)
    spec = ",".join(map(str, targets))
    settings = dataclasses.replace(settings, passes=str(pipeline), target=spec, threads=threads)
    return settings, pipeline, targets, target, place


def prepare(settings: Settings, progress: Progress = SILENT) -> tuple[Source, Data, Context, Judge]:
    """What the passes of `settings` work on and are judged by, for those who run them one by one.

    Raises what `optimize` raises before its first pass.
    """
    settings, _, _, target, _ = _resolve(settings, None)
    source, data, _ = _load(settings, Report(settings=dataclasses.asdict(settings), environment={}))
    context = Context(target.capabilities, data=data.calibration, seed=settings.seed, progress=progress)
    return source, data, context, Judge.of(source, data.evaluation, _bound(settings), progress)


def _with_threads(target: Target, threads: int | None) -> Target:
    if threads is None or not hasattr(target, "threads"):
        return target
    return dataclasses.replace(target, threads=threads)  # pyright: ignore[reportCallIssue]


def _check_place(settings: Settings, place: Place) -> None:
    """Raises SpecError for what this place cannot do."""
    if place.is_here:
        if settings.threads is not None and settings.threads > (os.cpu_count() or 1):
            raise SpecError(
                f"--threads {settings.threads} is more than this machine has", hint=f"it has {os.cpu_count()} cores"
            )
        return
    if settings.engine == "onnxruntime":
        raise SpecError(f"ONNX Runtime does not run on {place.label} from here", hint="leave --engine out, or say tvm")
    if settings.objective == "latency":
        raise SpecError(
            "the search for latency times kernels on this machine, and the target is another one",
            hint="run it on the device, or give --passes or --objective size",
        )


def _load(settings: Settings, report: Report, work: Path | None = None) -> tuple[Source, Data, SizePlan | None]:
    path = Path(settings.model)
    original = models.load(path)
    runnable = path
    if opsets.is_converted(original) and work is not None:  # the file itself is beyond ONNX Runtime
        runnable = work / "input.onnx"
        models.save(original, runnable)
    model = models.fix_inputs(original, settings.inputs)
    source = Source(runnable, model, models.signature(model))
    plan = SizePlan.of(source.signature, settings.sizes) if settings.sizes else None
    usual = models.fix_inputs(model, plan.input_shapes(plan.middle.largest)) if plan is not None else model
    data = _load_data(settings, source, models.signature(usual), report)
    report.source = SourceRecord(
        path=str(path),
        sha256=models.file_digest(path),
        inputs=tuple(str(s) for s in models.signature(original).inputs),
        outputs=tuple(str(s) for s in models.signature(original).outputs),
        opset=model.opset_imports.get("", 0),
        nodes=count_nodes(original),
        operators=count_operators(original),
        parameter_bytes=models.parameter_bytes(original),
        file_bytes=path.stat().st_size,
        measured_shapes={name: tuple(array.shape) for name, array in data.samples[0].items()},
    )
    return source, data, plan


def _load_data(settings: Settings, source: Source, usual: models.Signature, report: Report) -> Data:
    """`usual`: the shapes of made up data."""
    calib = evaluation = None
    if settings.calib == "random":
        count = settings.calib_samples or 32
        calib = calibration.random_dataset(usual, count, settings.seed)
        report.warnings.append(
            "calibrated on RANDOM data: ranges, and so the INT8 model's accuracy, mean nothing; give real data"
        )
    elif settings.calib is not None:
        calib = calibration.load_dataset(settings.calib, source.signature, settings.preprocess)
        if settings.calib_samples is not None:
            calib, held_out = calib.draw(settings.calib_samples, settings.seed)
            if settings.eval in (None, settings.calib) and len(held_out):
                evaluation = held_out
    elif settings.calib_samples is not None:
        raise DataError("--calib-samples says how many to draw, but there is no --calib to draw from")
    if evaluation is None and settings.eval is not None:
        evaluation = calibration.load_dataset(settings.eval, source.signature, settings.preprocess)
    if evaluation is None and calib is not None and not calib.is_random:
        evaluation = calib
        report.warnings.append("no --eval data: accuracy is measured on the calibration data itself")
    report.calibration, report.evaluation = _describe(calib), _describe(evaluation)
    known = evaluation or calib
    if known is None:
        feeds = tuple(samples.random_feeds(usual, seed) for seed in range(settings.seed, settings.seed + 2))
    else:
        wanted = min(VERIFICATION_SAMPLES, len(known))
        feeds = tuple(batch for batch, _ in zip(known.batches(1), range(wanted), strict=False))
    return Data(calib, evaluation, feeds)


def _rewrite(
    source: Source,
    pipeline: Pipeline,
    data: Data,
    settings: Settings,
    target: Target,
    reference: Reference,
    report: Report,
    work: Path,
    progress: Progress,
    on_pass: Callable[[PassRecord], None],
) -> list[Variant]:
    def record(done: PassRecord) -> None:
        report.passes.append(done)
        on_pass(done)

    context = Context(target.capabilities, data=data.calibration, seed=settings.seed, progress=progress)
    judge = Judge.of(source, data.evaluation, _bound(settings), progress)
    if judge.before is not None:
        report.source = dataclasses.replace(_known(report.source), accuracy=judge.before.to_dict())
    variants = make_variants(source, pipeline, data, judge, context, reference, work, record)
    report.variants = [v.record for v in variants]
    last = variants[-1].record
    if not last.within_bound:
        report.accuracy_met = False
        report.warnings.append(
            f"the accuracy bound is MISSED: the best found with {last.pipeline} loses {last.drop:.2f} points, "
            f"{settings.max_drop:g} are allowed; the artifact carries a variant that keeps the bound"
        )
    return variants


def _search(source: Source, variants: list[Variant], compiler: Compiler, report: Report) -> list[Variant]:
    """Cheaper variants than the last of `variants`, whose lossy passes the search keeps behind those it adds."""
    settings, data = compiler.settings, compiler.data
    context = Context(
        compiler.target.capabilities, data=data.calibration, seed=settings.seed, progress=compiler.progress
    )
    judge = Judge.of(source, data.evaluation, _bound(settings), compiler.progress)
    found, report.search = search(source, variants[0], variants[-1], judge, context, compiler)
    report.variants += [v.record for v in found]
    return found


def _compile(source: Source, variants: list[Variant], compiler: Compiler, report: Report) -> list[Candidate]:
    candidates = with_hybrids(make_candidates(source, variants, compiler), compiler)
    if compiler.place.is_here:
        candidates, report.layers = mix(candidates, compiler)
    known = {v.name for v in variants}
    report.variants += [c.variant.record for c in candidates if c.variant is not None and c.variant.name not in known]
    return candidates


def _measure_and_choose(
    source: Source, candidates: list[Candidate], compiler: Compiler, report: Report
) -> tuple[Candidate, PairedResult | Counts]:
    settings, place, data, progress = compiler.settings, compiler.place, compiler.data, compiler.progress
    candidates, race = compare_candidates(
        candidates,
        place,
        _timing_feeds(data, source),
        settings.threads or 1,
        settings.measure_seconds,
        settings.seed,
        progress,
    )
    judge = Judge.of(source, data.evaluation, _bound(settings), progress)
    samples = place.evaluation_limit(source.model)
    report.place = {"baseline": baseline(place), "evaluation_samples": samples, **place.describe()}
    report.candidates = [c.record for c in candidates]
    report.warnings += [*place.warnings(), *_lost_devices(candidates)]
    for candidate in choose(candidates, race, baseline(place), settings.objective == "size"):
        with place.open(candidate.contender, settings.threads or 1) as run:
            judged = judge_engine(candidate, run, judge, samples)
        accuracy = None if judged.accuracy is None else judged.accuracy.to_dict()
        record = dataclasses.replace(candidate.record, accuracy=accuracy)
        if not judged.within:
            record = dataclasses.replace(record, status="outside bound", reason="through this engine, on the eval data")
        report.candidates = [record if c.name == record.name else c for c in report.candidates]
        if judged.within:
            report.choice = explain(candidate, place)
            _tell_missed_precision(report)
            return dataclasses.replace(candidate, record=record), race
    raise TargetError(f"no candidate keeps the accuracy bound on {place.label}")


def _choose_unmeasured(candidates: list[Candidate], compiler: Compiler, report: Report) -> Candidate:
    """What was asked for last, of what was built. Raises TargetError where nothing was."""
    place = compiler.place
    report.place = {"baseline": baseline(place), **place.describe()}
    report.candidates = [c.record for c in candidates]
    report.warnings += place.warnings()
    built = [c for c in candidates if c.record.status == "not run"]
    if not built:
        record = candidates[0].record
        raise TargetError(f"nothing can be delivered: {record.name} is {record.status}: {record.reason}")
    report.choice = explain(built[-1], place)
    return built[-1]


def _with_reference(race: PairedResult | Counts) -> PairedResult | Counts:
    """Times taken here, with those of the kernels that other machines can time too."""
    if isinstance(race, Counts) or race.environment != environment(race.threads):
        return race
    return dataclasses.replace(race, reference=time_reference(race.threads))


def _make_libraries(
    chosen: Candidate, targets: tuple[Target, ...], source: Source, compiler: Compiler, report: Report
) -> list[Library]:
    libraries = make_libraries(chosen, targets, compiler, _timing_feeds(compiler.data, source))
    if len(targets) > 1:
        report.libraries = tuple(library.record for library in libraries)
        for record in report.libraries:
            if not record.delivered:
                report.warnings.append(f"no library for {record.target}: {record.status}: {record.reason}")
    return [library for library in libraries if library.record.delivered]


def _lost_devices(candidates: list[Candidate]) -> list[str]:
    tunings = [c.record.tuning for c in candidates if c.record.tuning is not None]
    return [f"a device was lost in tuning, {loss}; its trial was repeated" for t in tunings for loss in t["losses"]]


def _replaying(settings: Settings, chosen: Candidate) -> Settings:
    """Settings that make what was delivered: of a search, its recipe instead of the search."""
    if settings.objective is None or chosen.variant is None:
        return settings
    return dataclasses.replace(settings, passes=chosen.variant.record.pipeline, preset="exact", objective=None)


def _tell_missed_precision(report: Report) -> None:
    for record in report.candidates:
        if record.precision != "float32" and record.status == "outside bound":
            report.accuracy_met = False
            report.warnings.append(
                f"the accuracy bound is MISSED in {record.precision}: {record.reason}; "
                "the artifact carries a candidate that keeps the bound"
            )


def _timing_feeds(data: Data, source: Source) -> list[Feeds]:
    """Two of the user's samples and one of noise, of the same shapes: latency may depend on values."""
    shapes = {name: tuple(array.shape) for name, array in data.samples[0].items()}
    noise = samples.random_feeds(models.signature(models.fix_inputs(source.model, shapes)))
    alike = [s for s in data.samples if {n: tuple(a.shape) for n, a in s.items()} == shapes]
    return [alike[0], noise, alike[-1]]


def _bound(settings: Settings) -> Bound:
    return Bound(settings.max_drop, settings.min_snr, settings.metric == "snr")


def _describe(dataset: calibration.Dataset | None) -> DataRecord | None:
    if dataset is None:
        return None
    return DataRecord(dataset.source, len(dataset), dataset.labels is not None, dataset.is_random)


def _known(source: SourceRecord | None) -> SourceRecord:
    assert source is not None
    return source


@contextmanager
def _timed(report: Report, stage: str):
    started = time.perf_counter()
    yield
    report.seconds[stage] = time.perf_counter() - started
