"""What the tests of refit-layers share: damaged models, their errors, values inside, rows by plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.graph import attribute, label
from graphopt.passes.base import Context, PassResult
from graphopt.passes.refit_layers import RefitLayers
from tests.passes import oracle
from tests.passes.low_rank import array_of, nodes, outputs

UNIT = 2.0**-24
"""Unit roundoff of float32."""


def refit(damaged: ir.Model, original: ir.Model, data: Dataset, **options) -> PassResult:
    """The pass on a copy: which stays valid, and has the nodes, names and shapes it had."""
    before = models.digest(damaged), models.digest(original)
    result = RefitLayers(**options).run(damaged.clone(), Context(data=data, original=original))
    assert (models.digest(damaged), models.digest(original)) == before
    models.check(result.model, "refit")
    assert models.signature(result.model) == models.signature(damaged)
    described = [
        [(n.op_type, label(n), n.outputs[0].name, read_by(n)) for n in m.graph] for m in (damaged, result.model)
    ]
    assert described[0] == described[1]
    for name, node in nodes(damaged, "Conv", "Gemm", "MatMul").items():
        assert array_of(nodes(result.model)[name].inputs[1]).shape == array_of(node.inputs[1]).shape
    return result


def read_by(node: ir.Node) -> str:
    """The name of its first input."""
    value = node.inputs[0]
    assert value is not None
    return str(value.name)


def damage(model: ir.Model, seed: int, *names: str, size: float = 0.3) -> ir.Model:
    """A copy with noise, relative to their size, in these initializers."""
    rng, made = np.random.default_rng(seed), model.clone()
    for name in names:
        value = made.graph.initializers[name]
        array = array_of(value)
        noise = size * np.abs(array).max() * rng.standard_normal(array.shape)
        value.const_value = ir.Tensor((array + noise).astype(np.float32), name=name)
    return made


def error(model: ir.Model, original: ir.Model, data: Dataset) -> float:
    """Of the outputs on the data, relative to their energy about the mean."""
    wanted = outputs(original, data)
    lost = np.square(outputs(model, data) - wanted).sum()
    return float(lost / np.square(wanted - wanted.mean(axis=0)).sum())


def windows(x: np.ndarray, node: ir.Node) -> np.ndarray:
    """(groups, rows, taps) of every place of every sample of a 2-D Conv, by plain loops."""
    group = attribute(node, "group", 1)
    strides, dilations = attribute(node, "strides", (1, 1)), attribute(node, "dilations", (1, 1))
    top, left, bottom, right = attribute(node, "pads", (0, 0, 0, 0))
    kernel = array_of(node.inputs[1]).shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    places = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    per = x.shape[1] // group
    rows = []
    for sample, i, j in itertools.product(range(len(x)), range(places[0]), range(places[1])):
        row = np.empty((group, per, *kernel), x.dtype)
        for g, c, a, b in itertools.product(range(group), range(per), range(kernel[0]), range(kernel[1])):
            at = i * strides[0] + a * dilations[0], j * strides[1] + b * dilations[1]
            row[g, c, a, b] = x[(sample, g * per + c, *at)]
        rows.append(row.reshape(group, -1))
    return np.stack(rows, axis=1)


def effective(model: ir.Model, node: ir.Node, groups: int, outs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (groups, outputs, taps), and what the node itself adds (outputs,)."""
    weights = array_of(node.inputs[1]).astype(np.float64)
    if node.op_type == "Gemm":
        weights = attribute(node, "alpha", 1.0) * (weights if attribute(node, "transB", 0) else weights.T)
    elif node.op_type == "MatMul":
        weights = weights.T
    bias = np.zeros(outs)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        beta = attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
        bias = bias + beta * array_of(node.inputs[2]).astype(np.float64).reshape(-1)
    return weights.reshape(groups, outs // groups, -1), bias


def inner(model: ir.Model, name: str, x: np.ndarray) -> np.ndarray:
    """A value inside, for all samples."""
    seen = model.clone()
    if name not in [value.name for value in seen.graph.outputs]:
        seen.graph.outputs.append(next(v for node in seen.graph for v in node.outputs if v.name == name))
    return np.concatenate([oracle.run(seen, {"x": part}, [name])[0] for part in batches(model, x)])


def batches(model: ir.Model, x: np.ndarray) -> Sequence[np.ndarray]:
    shape = model.graph.inputs[0].shape
    assert shape is not None
    first = shape[0]
    step = first if isinstance(first, int) else len(x)
    return [x[start : start + step] for start in range(0, len(x), step)]


def run_in_batches(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([oracle.run(model, {"x": part})[0] for part in batches(model, feeds["x"])])


def samples(data: Dataset) -> np.ndarray:
    return np.concatenate([feeds["x"] for feeds in data.batches(16)])
