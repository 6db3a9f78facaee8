"""Solve the weights of all layers again, so that each makes up for what passes before this one did to its inputs.

Equation
    V = W + G,  b' = b + E r - G E z,   G = argmin E |r - G z|^2 + s |W + G|^2 + k |G|^2,   r = y - (W z + b)
    z: what the layer multiplies in the model as it is by now, with the layers before it solved again; y: what its
    output was in the model before the first lossy pass, on the same samples. The strength k is inferred from the data
    (ridge.py): what the data does not ask for stays as it is. Where the output only goes into a residual Add, y is
    what the Add's output was less its other input by now: so errors of the shortcut are made up for too.
    s: the variance of rounding z to 8 bits, which a pass behind this one may do: without it, weights for directions in
    which z hardly varies become so large that they amplify that rounding above all that was gained.
    A MatMul without a bias: the same about zero instead of the means.

Applies when
    there is calibration data, a lossy pass came before, and a Conv (grouped and depthwise too), Gemm or MatMul with
    constant float32 weights has a counterpart: the model before has a value of its output's name and shape.

Refuses when
    there is no counterpart; more than 2304 weights make an output (only the bias is solved then); the node is excluded.

Fidelity
    LOSSY. Behind exact passes alone it changes nothing.

Reference
    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.2 (weights solved
    again behind those of earlier layers, residual branches against the sum); MacKay, "Bayesian Interpolation", 1992.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.calibration.resumed import ResumedRuns
from graphopt.graph import attribute, constant_of, label, sole_consumer
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.channels.edits import set_constant
from graphopt.passes.channels.reconstruction import add_to_bias
from graphopt.passes.excluded import require_nodes
from graphopt.passes.paired_inputs import PairedMoments, PairedSums, group_taps, watch_pairs
from graphopt.passes.quantization.moments import MAX_TAPS, draws, matrix_rows, patches, window_rows
from graphopt.passes.quantization.placement import LAYERS, Layer, place
from graphopt.passes.ridge import regress
from graphopt.shapes.inferred import inferred_shapes

LEVELS = 255
"""Steps between the least and the largest input: those of 8 bits."""


class RefitLayers(Pass):
    """Weights of all layers solved again, to make up for what earlier passes changed."""

    fidelity = Fidelity.LOSSY

    exclude: tuple[str, ...] = ()
    """Names of nodes to leave alone (of a nameless node: its first output)."""

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Refit. Raises PassError: `exclude` names no node; ModelError and DataError as `collect_statistics` does."""
        require_nodes(model, self.exclude, self.name)
        if context.data is None or context.original is None:
            why = "there is no calibration data" if context.data is None else "no lossy pass came before"
            return PassResult(model, 0, notes=(f"nothing to refit: {why}",))
        jobs, skipped = _jobs(model, context.original, self.exclude)
        runs = ResumedRuns(context.data), ResumedRuns(context.data)
        done = 0
        with context.progress.task("refit layers", len(jobs)) as advance:
            for job in jobs:
                done += _apply(model.graph, job, *_observed(job, model, context, runs))
                advance(1)
        return PassResult(model, done, tuple(skipped))


@dataclass(frozen=True)
class _Job:
    layer: Layer
    target: str
    """The value of the original model to come near to."""
    beside: str | None
    """The value that is added behind the layer, where the target is a sum."""


def _jobs(model: ir.Model, original: ir.Model, exclude: tuple[str, ...]) -> tuple[list[_Job], list[Skip]]:
    """In graph order."""
    before, now = inferred_shapes(original), inferred_shapes(model)
    placement = place(model.graph)
    kinds = {label(node): node.op_type for node in model.graph}
    skipped = [each for each in placement.skipped if kinds.get(each.node) in LAYERS]
    position = {node: index for index, node in enumerate(model.graph)}
    jobs: list[_Job] = []

    def alike(value: ir.Value) -> bool:
        name = str(value.name)
        return name in before and before[name] == now.get(name)

    def summed(layer: Layer) -> tuple[str, str] | None:
        """The output of the residual Add behind the layer, and its other input."""
        output = layer.node.outputs[0]
        add, other = _beside(layer, position)
        if add is None or other is None or not alike(add.outputs[0]):
            return None
        broadcast = now.get(str(output.name)) != now[str(add.outputs[0].name)]
        return None if broadcast else (str(add.outputs[0].name), str(other.name))

    for layer in placement.layers:
        name, output, taps = label(layer.node), layer.node.outputs[0], group_taps(layer)[1]
        behind = summed(layer)
        has_bias = layer.node.op_type != "MatMul" or layer.bias is not None
        if name in exclude:
            skipped.append(Skip(name, "excluded by name"))
            continue
        if behind is None and not alike(output):
            skipped.append(Skip(name, "the model before has no value like its output"))
            continue
        if taps > MAX_TAPS:
            alone = ": bias alone" if has_bias else ""
            skipped.append(Skip(name, f"{taps} inputs are too many to solve for{alone}"))
        if taps <= MAX_TAPS or has_bias:
            jobs.append(_Job(layer, *(behind or (str(output.name), None))))
    return jobs, skipped


def _beside(layer: Layer, position: dict[ir.Node, int]) -> tuple[ir.Node | None, ir.Value | None]:
    """A residual Add that alone reads a Conv, and its other input, if that is computed before the layer."""
    output = layer.node.outputs[0]
    add = sole_consumer(output)
    if add is None or add.op_type != "Add" or layer.node.op_type != "Conv":
        return None, None
    first, second = add.inputs
    other = second if first is output else first
    if other is None or constant_of(other) is not None:
        return None, None
    producer = other.producer()
    return (add, other) if producer is None or position[producer] < position[layer.node] else (None, None)


def _observed(
    job: _Job, model: ir.Model, context: Context, runs: tuple[ResumedRuns, ResumedRuns]
) -> tuple[PairedMoments, float]:
    """Moments of r and z, and the variance of z's rounding."""
    assert context.original is not None
    layer = job.layer
    groups, taps = group_taps(layer)
    weights = _weights(layer)
    sums, low, high = PairedSums(groups, weights.shape[1], taps), 0.0, 0.0
    first_rng, second_rng = draws(context.seed, layer), draws(context.seed, layer)
    bias = _bias(layer)
    names = [str(layer.input.name)] + ([] if job.beside is None else [job.beside])
    for own, other in watch_pairs(context.original, model, [job.target], names, context, "refit layers", runs):
        target = own[job.target] if job.beside is None else own[job.target] - other[job.beside]
        wanted, inputs = _rows(layer, target, first_rng), patches(layer, other[names[0]], second_rng)
        lack = wanted.reshape(len(wanted), groups, -1).transpose(1, 0, 2) - bias[:, None]
        sums.add(lack - inputs @ weights.transpose(0, 2, 1), inputs)
        low, high = min(low, float(inputs.min())), max(high, float(inputs.max()))
    return sums.moments(), ((high - low) / LEVELS) ** 2 / 12


def _rows(layer: Layer, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(rows, channels) of an output, at the places where `patches` takes inputs."""
    if layer.node.op_type != "Conv":
        return matrix_rows(array, rng)
    rank = array.ndim - 2
    return window_rows(array, (1,) * rank, ((0, 0),) * rank, rng)


def _apply(graph: ir.Graph, job: _Job, moments: PairedMoments, rounding: float) -> bool:
    """Change the layer's weights and bias; False where the weights stay."""
    layer, node = job.layer, job.layer.node
    weights = _weights(layer)
    centred = node.op_type != "MatMul" or layer.bias is not None
    added = np.zeros_like(weights)
    if moments.first_variance is not None and not moments.first_variance.any() and not moments.first_mean.any():
        return False  # nothing changed before it
    if moments.covariance is not None and moments.crossed is not None and moments.first_variance is not None:
        for group in range(len(weights)):
            covariance, crossed = moments.covariance[group], moments.crossed[group]
            energy = float(moments.first_variance[group].sum())
            mean, first = moments.mean[group], moments.first_mean[group]
            if not centred:
                covariance, crossed = covariance + np.outer(mean, mean), crossed + np.outer(first, mean)
                energy += float(np.square(first).sum())
            covariance = covariance + rounding * np.eye(len(covariance))
            crossed = crossed - rounding * weights[group]
            energy += rounding * float(np.square(weights[group]).sum())
            added[group] = regress(covariance, crossed, energy, moments.rows).weights
    shift = (moments.first_mean - np.einsum("got,gt->go", added, moments.mean)).reshape(-1)
    if centred:
        _shift(graph, layer, shift)
    if not added.any():
        return False
    _store(graph, layer, weights + added)
    return True


def _weights(layer: Layer) -> np.ndarray:
    """(groups, outputs of a group, taps), float64, a Gemm's alpha multiplied in."""
    stored = constant_of(layer.node.inputs[layer.weight_index])
    assert stored is not None
    groups, taps = group_taps(layer)
    rows = np.moveaxis(stored, layer.channel_axis, 0).astype(np.float64)
    alpha = float(attribute(layer.node, "alpha", 1.0)) if layer.node.op_type == "Gemm" else 1.0
    return alpha * rows.reshape(groups, -1, taps)


def _store(graph: ir.Graph, layer: Layer, weights: np.ndarray) -> None:
    """A Gemm's alpha becomes 1."""
    stored = constant_of(layer.node.inputs[layer.weight_index])
    assert stored is not None
    if layer.node.op_type == "Gemm":
        layer.node.attributes.pop("alpha", None)
    moved = np.moveaxis(stored, layer.channel_axis, 0).shape
    array = np.moveaxis(weights.reshape(moved), 0, layer.channel_axis)
    set_constant(graph, layer.node, layer.weight_index, np.ascontiguousarray(array, dtype=stored.dtype))


def _bias(layer: Layer) -> np.ndarray:
    """(groups, outputs of a group), what the node itself adds; that of an Add behind a MatMul is no part of it."""
    groups = group_taps(layer)[0]
    count = _weights(layer).shape[1]
    stored = constant_of(layer.node.inputs[2]) if len(layer.node.inputs) > 2 else None
    if layer.node.op_type == "MatMul" or stored is None:
        return np.zeros((groups, count))
    beta = float(attribute(layer.node, "beta", 1.0)) if layer.node.op_type == "Gemm" else 1.0
    return np.broadcast_to(beta * stored.astype(np.float64).reshape(-1), (groups * count,)).reshape(groups, count)


def _shift(graph: ir.Graph, layer: Layer, shift: np.ndarray) -> None:
    if layer.node.op_type != "MatMul":
        add_to_bias(graph, layer.node, shift)
        return
    assert layer.bias is not None
    node, index = layer.bias
    stored = constant_of(node.inputs[index])
    assert stored is not None
    set_constant(graph, node, index, (stored + shift).astype(stored.dtype))
