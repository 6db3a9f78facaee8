"""The report as data. `report.json` is `Report.to_dict()`; text and HTML are views of the same dictionary."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.pipeline import PassRecord
from graphopt.verify import OutputError

SCHEMA = 1
"""Version of the JSON. Raised when a key changes its meaning or goes away; new keys do not raise it."""


@dataclass(frozen=True)
class SourceRecord:
    """The model that came in."""

    path: str
    sha256: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    nodes: int
    operators: Mapping[str, int]
    parameter_bytes: int
    file_bytes: int
    measured_shapes: Mapping[str, tuple[int, ...]]
    """The input shapes that were compiled and timed."""
    accuracy: Mapping[str, Any] | None = None
    """On the labelled evaluation set."""


@dataclass(frozen=True)
class DataRecord:
    """Calibration or evaluation data."""

    source: str
    samples: int
    labelled: bool
    is_random: bool


@dataclass(frozen=True)
class VariantRecord:
    """One version of the model on its way through the passes."""

    name: str
    """`exact` (after the passes before the first lossy one), `final` (after all) or `mixed` (`final` with layers in
    float that are faster so)."""
    pipeline: str
    nodes: int
    operators: Mapping[str, int]
    parameter_bytes: int
    file_bytes: int
    errors: tuple[OutputError, ...] = ()
    """Against the input model, on the verification samples."""
    accuracy: Mapping[str, Any] | None = None
    """metric, value, count, in ONNX Runtime."""
    drop: float | None = None
    """Points lost against the input model (dB short of the bound where the metric is snr)."""
    within_bound: bool = True
    plain_drop: float | None = None
    """The drop before any layer was returned to float."""
    returned_to_float: tuple[str, ...] = ()
    """For the accuracy bound."""
    float_for_speed: tuple[str, ...] = ()
    """Layers left float because they are faster so on the target."""
    layer_snr_db: Mapping[str, float] = field(default_factory=dict)
    """By node: signal-to-noise of its output against the same value in the exact variant."""


@dataclass(frozen=True)
class PartRecord:
    """One part of a model that is cut for two engines."""

    engine: str
    nodes: int
    operators: Mapping[str, int]
    first: str
    """Label of its first node."""
    last: str
    why: str
    """Why this engine runs it."""
    inputs: tuple[str, ...]
    """Values that it reads."""
    outputs: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By engine: of the part alone, where both were timed; a tenth of the samples was lower."""


@dataclass(frozen=True)
class CandidateRecord:
    """One variant on one engine."""

    name: str
    variant: str
    engine: str
    status: str
    """`measured`; `unavailable` (cannot be built), `wrong` (failed verification), `outside bound`, `not asked`."""
    reason: str = ""
    errors: tuple[OutputError, ...] = ()
    accuracy: Mapping[str, Any] | None = None
    """Measured through this engine; only for the chosen candidate."""
    latency: Mapping[str, Any] | None = None
    """LatencyStats: raw samples and what is derived from them, seconds."""
    instructions: int | None = None
    """Of one inference, counted in an emulator where there was no device to time it on."""
    kernel_instructions: Mapping[str, int] = field(default_factory=dict)
    """Of these, by kernel."""
    speedup: tuple[float, float, float] | None = None
    """Input model in ONNX Runtime / this candidate: median ratio and its 95 % interval, from one paired run. Elsewhere
    than on this machine the exact variant, compiled, is in the input model's place; of instructions all three are
    equal."""
    size_bytes: int = 0
    """Of the file that runs: the compiled library, or the model for ONNX Runtime."""
    precision: str = "float32"
    """What images and weights are stored as: `float32` (or the model's own types), or `bf16`."""
    tuning: Mapping[str, Any] | None = None
    parts: tuple[PartRecord, ...] = ()
    """Of a candidate on the engine `hybrid`, in the order in which they run."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer in the compiled candidates."""

    layer: str
    """The node's label."""
    operator: str
    seconds: Mapping[str, float]
    """By candidate: its kernel in a run of the whole model, median; what was fused behind it included."""
    precision: Mapping[str, str]
    """By candidate, how its weights are stored: `int8`, `int4`, `float32` or `bf16`."""


@dataclass(frozen=True)
class OfferRecord:
    """One thing that a pass could do to one layer, taken alone: a row of the sensitivity table."""

    pass_name: str
    value: str
    """Of the pass's option that takes offers."""
    cost: float
    """Of the whole model then, predicted, over that of the plain pipeline."""
    noise: float
    """Of the outputs in full precision, on calibration samples: in the unit of `SearchRecord.noise_unit`."""
    agreement: float | None
    """Share of these samples with the same largest output, in percent; None where outputs are not classes."""


@dataclass(frozen=True)
class TimedLayer:
    """A layer in the versions that were timed: a row of the latency table."""

    layer: str
    macs: float
    seconds: float
    """With nothing chosen: its kernel in a run of the whole model."""
    points: tuple[tuple[str, float, float], ...]
    """(pass, MACs, seconds) of the versions in which a pass had changed it."""


@dataclass(frozen=True)
class TrialRecord:
    """A recipe that was made and evaluated."""

    pipeline: str
    cost: float
    """Predicted: seconds of all kernels, or bytes of parameters."""
    noise: float
    """Predicted: what the choices add in full precision, in the same unit."""
    drop: float | None
    accuracy: Mapping[str, Any] | None
    within_bound: bool
    measured: float | None = None
    """Its kernels' seconds over the plain pipeline's, timed in turns; None where it was not compiled."""


@dataclass(frozen=True)
class SearchRecord:
    """What a search for the settings of all layers found."""

    objective: str
    noise_unit: str
    """`nats` of divergence of the class probabilities, or `energy`: of the error over that of the outputs."""
    cost_unit: str
    """`seconds` of all kernels, or `bytes` of parameters."""
    plain_cost: float
    """Of the plain pipeline."""
    offers: tuple[OfferRecord, ...]
    layers: tuple[TimedLayer, ...]
    trials: tuple[TrialRecord, ...]
    complete: bool
    """False when time ran out before everything was tried."""


@dataclass(frozen=True)
class LibraryRecord:
    """What was chosen, compiled for one of several targets."""

    target: str
    status: str
    """chosen: the candidates were compared on it; measured: built, verified and measured; not run: built, but nothing
    here runs it; unavailable, wrong, outside bound: not in the artifact."""
    reason: str = ""
    size_bytes: int = 0
    latency: Mapping[str, Any] | None = None
    instructions: int | None = None
    where: str = ""
    """The place that measured it."""

    @property
    def delivered(self) -> bool:
        return self.status in ("chosen", "measured", "not run")


@dataclass(frozen=True)
class SizeRecord:
    """What runs inputs of some sizes (`--sizes`)."""

    sizes: str
    """As on the command line: `batch=1 sequence=33..48`."""
    status: str
    """compiled: a function of the library; onnxruntime: that was not faster; wrong, unavailable: there is none."""
    reason: str = ""
    speedups: tuple[tuple[float, float, float], ...] = ()
    """Of the compiled function against the input model in ONNX Runtime, for the smallest size and for the largest (one
    figure where they are the same): median, and its 95 % interval."""
    errors: tuple[OutputError, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Which candidate the artifact carries, and why."""

    candidate: str
    variant: str
    engine: str
    why: str


@dataclass
class Report:
    """Everything about one run."""

    settings: Mapping[str, Any]
    source: SourceRecord | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)
    """Where candidates ran. kind: `here`, `emulated`, `device` or `unmeasured`; label, for people; unit of the
    comparison: `seconds`, `instructions` or `nothing`; baseline: the candidate that the others are compared with;
    evaluation_samples: on how many accuracy through engines was measured, where not on all."""
    calibration: DataRecord | None = None
    evaluation: DataRecord | None = None
    passes: list[PassRecord] = field(default_factory=list)
    variants: list[VariantRecord] = field(default_factory=list)
    candidates: list[CandidateRecord] = field(default_factory=list)
    layers: tuple[LayerRecord, ...] = ()
    """Layers with kernels of their own in the compiled candidates, in graph order."""
    search: SearchRecord | None = None
    """With the preset `auto`."""
    choice: Choice | None = None
    libraries: tuple[LibraryRecord, ...] = ()
    """With several targets: the libraries, in the order in which a processor tries them."""
    sizes: tuple[SizeRecord, ...] = ()
    """With `--sizes`: what runs each."""
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""
    accuracy_met: bool = True

    def variant(self, name: str) -> VariantRecord:
        return next(v for v in self.variants if v.name == name)

    def chosen(self) -> CandidateRecord | None:
        """The candidate in the artifact."""
        if self.choice is None:
            return None
        return next(c for c in self.candidates if c.name == self.choice.candidate)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinities and NaN become null."""
        return {"schema": SCHEMA, **plain(self)}


def plain(value: Any) -> Any:
    """Dataclasses, enums, arrays and paths as JSON's own types; infinities and NaN as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
