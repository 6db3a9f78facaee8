"""Is the rewritten model still a valid model, and does it still compute what the original computes?

Structure: onnx's checker with full shape inference, and an unchanged signature, after every pass.
Numbers: against the *original* model in ONNX Runtime with graph optimisations disabled, on the same samples.

The tolerance of EXACT and ROUNDING passes is derived, not chosen. A dot product of length K in precision u has
a relative error of about sqrt(K) u (the probabilistic bound of Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019); errors of successive layers are independent, so their
variances add. Two correct evaluations may both be off, in opposite directions: hence the factor LAMBDA, the bound's
own confidence parameter.

    |y - y_ref| <= LAMBDA * u * sqrt(sum_l K_l) * max|y_ref|

That holds for layers that do not amplify the errors they are fed. Some networks do. Where an error exceeds the bound,
the original's own conditioning is measured: it runs again with every element that a dot product or a normalisation
computes multiplied by 1 + u e, e standard normal (independent from element to element, as rounding errors are), and
LAMBDA times the largest response over a few draws is what rounding explains. Plain sums of n elements (ReduceSum,
ReduceMean), which runtimes add one after another, are multiplied by 1 + u max(sqrt(n), n / LAMBDA) e: the bound above,
or, since terms that are alike are rounded alike, the deterministic one, n u (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 4.2). A variance as mean(x^2) - mean(x)^2 lives on their last digits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt import model as models
from graphopt.errors import ModelError, PassError, VerificationError
from graphopt.passes.base import Fidelity
from graphopt.shapes.inferred import inferred_shapes

LAMBDA = 8.0
"""Confidence parameter of the probabilistic bound: failure probability 2 exp(-LAMBDA^2 / 2) for one value."""
PIECE = 1 << 22
"""Elements of an output that are compared at once: in float64 they take several times what they do as they are."""

ROUNDING_OPERATORS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "InstanceNormalization", "LayerNormalization",
     "ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool", "Softmax", "GRU", "LSTM", "RNN", "Einsum"}
)  # fmt: skip
"""Operators whose results are sums of many products or of many elements."""

PERTURBATIONS = 3
"""How often the conditioning of the original is sampled."""

RUN_LIMIT_S = 900.0
"""One run of a model that takes longer has an endless loop in it, or is of no use here."""

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

    def __init__(self, original: ir.Model, samples: Sequence[Feeds], work: Path, limit_s: float = RUN_LIMIT_S):
        self.original = _inferred(original)
        self.samples = tuple(samples)
        self.work = work
        self.runner = onnxruntime_runner(original, work / "reference.onnx", limit_s)
        self.outputs = tuple({k: np.array(v) for k, v in self.runner(s).items()} for s in self.samples)
        self.reduction_length = total_reduction_length(self.original)

    @cached_property
    def response_to_rounding(self) -> dict[str, float]:
        """By output: the most it moves, over all samples, when intermediate results move by a unit roundoff or so."""
        response: dict[str, float] = {}
        original = _sized(self.original)
        for draw in range(PERTURBATIONS):
            run = onnxruntime_runner(_perturbed(original, draw), self.work / "perturbed.onnx")
            for sample, outputs in zip(self.samples, self.outputs, strict=True):
                for name, moved in run(sample).items():
                    if np.issubdtype(moved.dtype, np.floating) and moved.shape == outputs[name].shape and moved.size:
                        distance = np.abs(moved.astype(np.float64) - outputs[name])
                        response[name] = max(response.get(name, 0.0), float(np.nanmax(distance)))
        return response

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
                measured = LAMBDA * self.response_to_rounding.get(name, 0.0)
                error = dataclasses.replace(error, tolerance=max(error.tolerance, measured))
            if not error.within:
                raise VerificationError(
                    f"{who} changed output {name!r} by {error.max_abs_error:.3g}, "
                    f"rounding explains at most {error.tolerance:.3g}"
                )
            errors.append(error)
        return tuple(errors)


def _perturbed(model: ir.Model, seed: int) -> ir.Model:
    """A copy in which every element that a dot product or a normalisation computes is multiplied by 1 + u e,
    e standard normal: independent from element to element, as rounding errors are."""
    copy = model.clone()
    graph = copy.graph
    unit = graphs.add_initializer(graph, "unit_roundoff", np.array(np.finfo(np.float32).eps / 2, np.float32))
    for number, node in enumerate(list(graph)):
        value = node.outputs[0]
        if node.op_type not in ROUNDING_OPERATORS or value.dtype is not ir.DataType.FLOAT:
            continue
        terms = _reduction_length(node) if node.op_type.startswith("Reduce") else 1.0
        spread = max(math.sqrt(terms), terms / LAMBDA)
        attributes = {"seed": float(seed * 100_003 + number), "dtype": 1, "scale": spread}
        noise = ir.node("RandomNormalLike", [value], attributes)
        scaled = ir.node("Mul", [noise.outputs[0], unit])
        share = ir.node("Mul", [value, scaled.outputs[0]])
        moved = ir.node("Add", [value, share.outputs[0]])
        for usage in list(value.uses()):
            usage.node.replace_input_with(usage.idx, moved.outputs[0])
        noise.replace_input_with(0, value)
        share.replace_input_with(0, value)
        moved.replace_input_with(0, value)
        graph.insert_after(node, [noise, scaled, share, moved])
        if value.is_graph_output():
            index = list(graph.outputs).index(value)
            name = value.name
            value.name = f"{name}/unperturbed"
            moved.outputs[0].name = name
            moved.outputs[0].type, moved.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = moved.outputs[0]
    return copy


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
        for start in range(0, want.size, PIECE):
            some, other = want.reshape(-1)[start : start + PIECE], have.reshape(-1)[start : start + PIECE]
            finite = np.isfinite(some)
            if not np.isfinite(other[finite]).all():
                raise VerificationError(f"{who} made output {name!r} NaN or infinite (sample {index})")
            a, b = some[finite].astype(np.float64), other[finite].astype(np.float64)
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


def _inferred(model: ir.Model) -> ir.Model:
    """A copy with the types and shapes of inner values, where the model is small enough for protobuf."""
    if models.parameter_bytes(model) >= models.PROTOBUF_LIMIT_BYTES // 2:
        return model.clone()
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def _sized(model: ir.Model) -> ir.Model:
    """A copy with every size on inner values that follows from constants and shape arithmetic too."""
    copy = model.clone()
    shapes = inferred_shapes(copy)
    for node in copy.graph:
        for value in node.outputs:
            found = shapes.get(str(value.name))
            if found is not None:
                value.shape = ir.Shape(found)
    return copy


def total_reduction_length(model: ir.Model) -> float:
    """Sum over nodes of the number of products added up for one output element (1 for element-wise operators)."""
    total = 0.0
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
        if shape is not None and node.op_type.startswith("Reduce"):
            axes = graphs.attribute(node, "axes", None)
            axes = axes if axes is not None else graphs.integers_of(graphs.input_of(node, 1))
            if axes and all(-len(shape) <= axis < len(shape) for axis in axes):
                return float(np.prod([d for d in (shape[axis] for axis in axes) if isinstance(d, int)]))
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


def onnxruntime_runner(model: ir.Model, file: Path, limit_s: float = RUN_LIMIT_S) -> Runner:
    """The model in ONNX Runtime with graph optimisations disabled: the plain reference. A run over `limit_s` is ended,
    with TargetError."""
    from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

    models.save(model, file)
    return OnnxRuntimeEngine(file, threads=None, optimize=False, limit_s=limit_s).run
