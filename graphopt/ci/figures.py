"""Figures of a model that need no quiet machine: sizes, counts, instructions, accuracy; each may have a bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import calibration
from graphopt import model as models
from graphopt.accuracy import Accuracy, drop_in_points, evaluate
from graphopt.benchmarking import model_file
from graphopt.capabilities import host_arch, host_features
from graphopt.ci.bounds import Bound
from graphopt.ci.instructions import count
from graphopt.errors import EXIT_DONE, EXIT_INCONCLUSIVE, EXIT_REGRESSION, DataError, SpecError, TargetError
from graphopt.inspection import inspect
from graphopt.measure import Contender
from graphopt.progress import SILENT, Progress
from graphopt.remote.elf_functions import read_functions
from graphopt.runtime.artifact import HYBRID, is_artifact, library_folders, load, read_manifest, require_trust
from graphopt.runtime.hybrid_engine import compiled_parts
from graphopt.runtime.tvm_engine import LIBRARY, read_description

ENTRY = "__tvm_ffi_"
"""What TVM puts before the name of a kernel, and of `main`, which is none."""


@dataclass(frozen=True)
class Kind:
    """What can be bounded: `option` without the dashes, the unit, and whether it is counted only on request."""

    name: str
    option: str
    title: str
    unit: str = ""


KINDS = (
    Kind("instructions", "max-instructions", "instructions of an inference"),
    Kind("nodes", "max-nodes", "nodes of the graph"),
    Kind("kernels", "max-kernels", "compiled kernels"),
    Kind("parameter_bytes", "max-parameters", "parameters", "B"),
    Kind("peak_activation_bytes", "max-activations", "peak of activations", "B"),
    Kind("size_bytes", "max-size", "size on disk", "B"),
)
OPTIONS = {kind.option: kind for kind in KINDS}


@dataclass(frozen=True)
class Value:
    """A figure, or why there is none. `how`: figures that were found differently cannot be compared."""

    value: float | None
    why: str = ""
    how: str = ""


@dataclass(frozen=True)
class Bounds:
    """What is demanded; a figure without a bound is only shown. The time's bound is `max_regression`, a fraction."""

    max_regression: float = 0.05
    figures: Mapping[str, Bound] = field(default_factory=dict)
    """By `Kind.name`."""
    max_drop: float | None = None
    """Points of top-1, or of agreement with the base, that may be lost."""
    min_snr: float = 20.0
    """dB against the base, where outputs are not classes."""


@dataclass(frozen=True)
class Row:
    """One figure of both models. `state`: within, over, unknown (it has a bound and cannot be judged), or shown."""

    name: str
    title: str
    unit: str
    base: float | None
    new: float | None
    bound: str
    state: str
    note: str = ""

    @property
    def change(self) -> float | None:
        """New over base, less 1."""
        if self.base is None or self.new is None or self.base == 0 or self.name == "accuracy":
            return None
        return self.new / self.base - 1

    @property
    def exit_code(self) -> int:
        return {"over": EXIT_REGRESSION, "unknown": EXIT_INCONCLUSIVE}.get(self.state, EXIT_DONE)

    def to_dict(self) -> dict[str, Any]:
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in (("base", self.base), ("new", self.new))}
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            **finite,
            "change": self.change,
            "bound": self.bound,
            "state": self.state,
            "note": self.note,
        }


def figures_of(
    path: str, feeds: Mapping[str, np.ndarray], wanted: Collection[str], trust: bool = False
) -> dict[str, Value]:
    """The figures named in `wanted` (of `KINDS`) of an ONNX file or an artifact, for inputs of the shapes of `feeds`.

    Raises what loading it raises.
    """
    found: dict[str, Value] = {}
    artifact = is_artifact(path)
    shapes = {name: tuple(array.shape) for name, array in feeds.items()}
    if {"nodes", "parameter_bytes", "peak_activation_bytes"} & set(wanted):
        seen = inspect(models.fix_inputs(models.load(model_file(path)), shapes))
        found["nodes"] = Value(seen.nodes)
        found["parameter_bytes"] = Value(seen.parameter_bytes)
        found["peak_activation_bytes"] = Value(seen.peak_activation_bytes, seen.peak_unknown)
    found["size_bytes"] = Value(_size(path))
    if "kernels" in wanted:
        found["kernels"] = _kernels(path) if artifact else Value(None, "nothing is compiled")
    if "instructions" in wanted:
        if artifact:
            require_trust(path, trust)  # the process that is counted runs it without asking again
        try:
            counted = count(Contender.of(path, trust=trust), feeds)
            found["instructions"] = Value(counted.value, how=counted.counter)
        except TargetError as error:
            found["instructions"] = Value(None, str(error))
    return {name: value for name, value in found.items() if name in wanted}


def _size(path: str) -> int:
    """Bytes of the model and its libraries; the report beside them is evidence, and never the same twice."""
    contender = Contender.of(path)
    if not is_artifact(path):
        return contender.size_bytes
    return sum((contender.path / name).stat().st_size for name in read_manifest(contender.path)["files"])


def _kernels(path: str) -> Value:
    """Functions that TVM compiled, of the first library or of all parts."""
    folders = _compiled(Contender.of(path).path)[:1] or _parts(Contender.of(path).path)
    if not folders:
        return Value(None, "nothing is compiled: it runs in ONNX Runtime")
    names = [{each.name for each in read_functions(f / LIBRARY) if each.name.startswith(ENTRY)} for f in folders]
    return Value(sum(len(each - {f"{ENTRY}main"}) for each in names))


def _compiled(folder: Path) -> list[Path]:
    """The libraries of a whole model, of which one runs."""
    return [folder / name for name, _ in library_folders(read_manifest(folder))]


def _parts(folder: Path) -> list[Path]:
    """The libraries of a model in parts, which all run."""
    return compiled_parts(folder / HYBRID) if read_manifest(folder)["engine"] == "hybrid" else []


def judge_figures(base: Mapping[str, Value], new: Mapping[str, Value], bounds: Bounds) -> list[Row]:
    """A row for each figure that either has."""
    nothing = Value(None)
    rows = []
    for kind in KINDS:
        if kind.name in base or kind.name in new:
            rows.append(
                _row(kind, base.get(kind.name, nothing), new.get(kind.name, nothing), bounds.figures.get(kind.name))
            )
    return rows


def _row(kind: Kind, base: Value, new: Value, bound: Bound | None) -> Row:
    note = new.why or base.why
    comparable = base.how == new.how or base.value is None or new.value is None
    if not comparable:
        note = f"counted differently: {base.how} and {new.how}"
    elif new.how or base.how:
        note = note or f"counted by {new.how or base.how}"
    if bound is None:
        return Row(kind.name, kind.title, kind.unit, base.value, new.value, "", "shown", note)
    limit = bound.limit(base.value if comparable else None)
    state = "unknown" if new.value is None or limit is None else "over" if new.value > limit else "within"
    return Row(kind.name, kind.title, kind.unit, base.value, new.value, bound.text, state, note)


def judge_accuracy(
    base: str,
    new: str,
    data: str,
    preprocess: str | None,
    bounds: Bounds,
    progress: Progress = SILENT,
    trust: bool = False,
) -> Row:
    """Both models through their own engines, on the same data; without labels NEW is judged by agreeing with BASE.

    Raises DataError for data that does not fit.
    """
    signature = models.signature(models.load(model_file(base)))
    dataset = calibration.load_dataset(data, signature, preprocess)
    if not len(dataset):
        raise DataError(f"{data} holds no samples")
    run_base, run_new = _runner(base, trust), _runner(new, trust)
    elsewhere = [path for path in (base, new) if not runs_here(path)]
    after = evaluate(run_new, dataset, signature=signature, reference=run_base, progress=progress)
    before: Accuracy | None = None
    if after.metric == "top1":
        before = evaluate(run_base, dataset, signature=signature, progress=progress)
    if after.metric == "snr":
        bound, ok = f">= {bounds.min_snr:g} dB", after.value >= bounds.min_snr
        title, unit = "signal to noise against the base", "dB"
    else:
        allowed = bounds.max_drop or 0.0
        bound, ok = f"-{allowed:g} points", drop_in_points(before, after) <= allowed + 1e-9
        title, unit = ("top-1" if after.metric == "top1" else "agreement with the base"), "%"
    state = "shown" if bounds.max_drop is None else "within" if ok else "over"
    shown = before.value if before is not None else None
    return Row(
        "accuracy",
        title,
        unit,
        shown,
        after.value,
        bound if state != "shown" else "",
        state,
        f"{after.count} samples" + (", in ONNX Runtime: compiled for another processor" if elsewhere else ""),
    )


def _runner(path: str, trust: bool):
    if is_artifact(path) and runs_here(path):
        return load(path, trust=trust).run
    from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(model_file(path)).run


def runs_here(path: str) -> bool:
    """Whether this processor can run it: an artifact may hold libraries for others only."""
    if not is_artifact(path):
        return True
    folder = Contender.of(path).path
    fits = [_fits(library) for library in _compiled(folder)]
    return (any(fits) or not fits) and all(map(_fits, _parts(folder)))


def _fits(library: Path) -> bool:
    described = read_description(library)
    return described["arch"] == host_arch() and set(described["features"]) <= host_features()


def parse_bounds(options: Mapping[str, Any], what: str) -> Bounds:
    """From `{"max-size": "5%", "max-regression": "3%", "max-drop": 1.0, ...}`. Raises SpecError."""
    known = {*OPTIONS, "max-regression", "max-drop", "min-snr"}
    values: dict[str, Any] = {}
    figures: dict[str, Bound] = {}
    for key, value in options.items():
        if key not in known:
            raise SpecError(f"{what}: unknown bound {key!r}", hint=f"known: {', '.join(sorted(known))}")
        if key in OPTIONS:
            figures[OPTIONS[key].name] = Bound.parse(str(value), f"{what}: {key}")
        elif key == "max-regression":
            values["max_regression"] = fraction(str(value), f"{what}: {key}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise SpecError(f"{what}: {key} must be a number of 0 or more, not {value!r}")
        else:
            values[key.replace("-", "_")] = float(value)
    return Bounds(figures=figures, **values)


def fraction(text: str, what: str) -> float:
    """`5%` or `0.05`. Raises SpecError, naming `what`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise SpecError(f"{what} {text!r} is not a number", hint="write 5% or 0.05") from None
    if not 0 <= value < 10:
        raise SpecError(f"{what} {text!r} is out of range", hint="write 5% or 0.05")
    return value
