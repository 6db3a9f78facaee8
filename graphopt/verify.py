"""Is the rewritten model still a valid model, and does it still compute what the original computes?

Structure: onnx's checker with full shape inference, and an unchanged signature, after every pass.
Numbers: against the *original* model in ONNX Runtime with graph optimisations disabled, on the same samples.

The tolerance of EXACT and ROUNDING passes is derived, not chosen. A dot product of length K in precision u has
a relative error of about sqrt(K) u (the probabilistic bound of Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019); errors of successive layers are independent, so their
variances add. Two correct evaluations may both be off, in opposite directions, and normalisations inside a
network amplify: hence the factor LAMBDA, the bound's own confidence parameter.

    |y - y_ref| <= LAMBDA * u * sqrt(sum_l K_l) * max|y_ref|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt import model as models
from graphopt.errors import ModelError, PassError, VerificationError
from graphopt.passes.base import Fidelity

LAMBDA = 8.0
"""Confidence parameter of the probabilistic bound: failure probability 2 exp(-LAMBDA^2 / 2) for one value."""

Feeds = Mapping[str, np.ndarray]
Runner = Callable[[Feeds], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference, over all samples."""

    name: str
    max_abs_error: float
    tolerance: float
    """Largest error that rounding can explain; infinite where only signal-to-noise judges."""
    snr_db: float
    """10 log10(sum y_ref^2 / sum (y - y_ref)^2); infinite when equal."""

    @property
    def within(self) -> bool:
        return self.max_abs_error <= self.tolerance


def check_structure(model: ir.Model, expected: models.Signature, who: str) -> None:
    """Valid ONNX, and inputs and outputs as before. Raises PassError naming `who`."""
    try:
        models.check(model, f"the model after {who}")
    except ModelError as error:
        raise PassError(f"{who} left an invalid model: {error.what}", node=error.node) from error
    have = models.signature(model)
    for kind, was, now in (("inputs", expected.inputs, have.inputs), ("outputs", expected.outputs, have.outputs)):
        if [(s.name, s.dtype, len(s.shape)) for s in was] != [(s.name, s.dtype, len(s.shape)) for s in now]:
            raise PassError(
                f"{who} changed the model's {kind}: {', '.join(map(str, was))} became {', '.join(map(str, now))}"
            )
        for old, new in zip(was, now, strict=True):
            for axis, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)):
                if isinstance(a, int) and isinstance(b, int) and a != b:
                    raise PassError(f"{who} changed dimension {axis} of {old.name!r} from {a} to {b}")


class Reference:
    """The original model's outputs on a few samples, and the judgement of others against them."""

    def __init__(self, original: ir.Model, samples: Sequence[Feeds], work: Path):
        self.samples = tuple(samples)
        self.work = work
        self.runner = onnxruntime_runner(original, work / "reference.onnx")
        self.outputs = tuple({k: np.array(v) for k, v in self.runner(s).items()} for s in self.samples)
        self.reduction_length = total_reduction_length(original)

    def judge(self, run: Runner, fidelity: Fidelity, who: str) -> tuple[OutputError, ...]:
        """Run every sample. Raises VerificationError: beyond tolerance, non-finite where the original is finite."""
        results = [run(sample) for sample in self.samples]
        return self.judge_outputs(results, fidelity, who)

    def judge_model(self, model: ir.Model, fidelity: Fidelity, who: str) -> tuple[OutputError, ...]:
        """`judge` of a model in ONNX Runtime with graph optimisations disabled."""
        return self.judge(onnxruntime_runner(model, self.work / "candidate.onnx"), fidelity, who)

    def judge_outputs(
        self, results: Sequence[Mapping[str, np.ndarray]], fidelity: Fidelity, who: str
    ) -> tuple[OutputError, ...]:
        errors = []
        for name in self.outputs[0] if self.outputs else ():
            wanted = [o[name] for o in self.outputs]
            got = [np.asarray(r[name]) for r in results]
            error = output_error(name, wanted, got, self.reduction_length, fidelity, who)
            if not error.within:
                raise VerificationError(
                    f"{who} changed output {name!r} by {error.max_abs_error:.3g}, "
                    f"rounding explains at most {error.tolerance:.3g}"
                )
            errors.append(error)
        return tuple(errors)


def output_error(
    name: str,
    wanted: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
    reduction_length: float,
    fidelity: Fidelity,
    who: str,
) -> OutputError:
    """Compare one output over samples. Raises VerificationError on a changed shape or new non-finite values."""
    worst = signal = noise = scale = 0.0
    for index, (want, have) in enumerate(zip(wanted, got, strict=True)):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise VerificationError(
                f"{who} changed output {name!r} from {want.dtype}{list(want.shape)} to {have.dtype}{list(have.shape)}"
            )
        if want.size == 0:
            continue
        if not np.issubdtype(want.dtype, np.number):
            if not np.array_equal(want, have):
                raise VerificationError(f"{who} changed output {name!r} (sample {index})")
            continue
        finite = np.isfinite(want)
        if not np.isfinite(have[finite]).all():
            raise VerificationError(f"{who} made output {name!r} NaN or infinite (sample {index})")
        a, b = want[finite].astype(np.float64), have[finite].astype(np.float64)
        if a.size:
            worst = max(worst, float(np.abs(a - b).max()))
            scale = max(scale, float(np.abs(a).max()))
            signal += float(np.square(a).sum())
            noise += float(np.square(a - b).sum())
    snr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
    tolerance = math.inf
    if fidelity is not Fidelity.LOSSY:
        dtype = wanted[0].dtype
        unit = float(np.finfo(dtype).eps) / 2 if np.issubdtype(dtype, np.floating) else 0.0
        tolerance = LAMBDA * unit * math.sqrt(max(reduction_length, 1.0)) * scale
    return OutputError(name, worst, tolerance, snr)


def total_reduction_length(model: ir.Model) -> float:
    """Sum over nodes of the number of products added up for one output element (1 for element-wise operators)."""
    total = 0.0
    if models.parameter_bytes(model) < models.PROTOBUF_LIMIT_BYTES // 2:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        total += _reduction_length(node)
    return max(total, 1.0)


def _reduction_length(node: ir.Node) -> float:
    weight = graphs.constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Conv" and weight is not None:
        return float(np.prod(weight.shape[1:]))
    if node.op_type == "ConvTranspose" and weight is not None:
        return float(weight.shape[0] * np.prod(weight.shape[2:]))
    if node.op_type in ("GRU", "LSTM", "RNN") and weight is not None:
        steps = _dimension(node.inputs[0], 0)
        return float(steps * (weight.shape[-1] + graphs.attribute(node, "hidden_size", weight.shape[1])))
    if node.op_type == "Gemm":
        return float(_dimension(node.inputs[0], 0 if graphs.attribute(node, "transA", 0) else 1))
    if node.op_type == "MatMul":
        return float(_dimension(node.inputs[0], -1))
    if node.op_type.startswith("Reduce") or node.op_type in ("GlobalAveragePool", "Softmax", "LayerNormalization"):
        shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        if shape is not None and len(shape) > 1:
            summed = shape[2 if len(shape) > 2 else 1 :]
            return float(np.prod([d for d in summed if isinstance(d, int)]))
    return 1.0


def _dimension(value: ir.Value | None, axis: int) -> int:
    unknown = 1024
    if value is None or value.shape is None or len(value.shape) == 0:
        return unknown
    dimension = value.shape[axis]
    return dimension if isinstance(dimension, int) else unknown


def onnxruntime_runner(model: ir.Model, file: Path) -> Runner:
    """The model in ONNX Runtime with graph optimisations disabled: the plain reference."""
    from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

    models.save(model, file)
    return OnnxRuntimeEngine(file, threads=None, optimize=False).run
