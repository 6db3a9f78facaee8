"""Features that reach much further than the others, scaled down before a product is quantized.

Eight bits are spread over the range of a whole tensor. In transformers one or two features of what LayerNormalization
and Gelu make reach ten times as far as the rest, which then shares 20 levels. So these features are divided by
s[k] = max(1, peak[k] / cap), and the rows of the weights that read them multiplied by it:

    x W = (x / s) (s W)

The cap is the one with the least predicted noise in the product, activations' and weights' together, each taken as
uniform rounding errors: dx^2 / 12 * sum_k s[k]^2 |W[k]|^2 + sum_n dw[n]^2 / 12 * sum_k E[x[k]^2] / s[k]^2.

Done where an operator in float32 makes the value, so that 1 / s joins arithmetic that is there anyway: in the constants
of a normalization that nobody else reads, else as a Mul.

Source: Xiao et al., SmoothQuant, ICML 2023, section 4 (the identity); Wei et al., Outlier Suppression, NeurIPS 2022,
section 3 (where outliers of transformers are).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.calibration import TensorStatistics
from graphopt.passes.linear_operator import Unfit, replace_parameters
from graphopt.passes.quantization.placement import Layer
from graphopt.passes.smooth_activations import Site
from graphopt.passes.smoothing.folds import NORMALIZATIONS, find_fold

MAKERS = NORMALIZATIONS | {"Gelu", "Swish"}
"""Operators that are computed in float32 whatever is quantized around them."""
LEAST_GAIN = 2.0
"""The predicted noise must fall by this factor."""
CAPS = np.geomspace(1.0, 1 / 256, 49)
"""Of the largest peak."""
LEVELS = 255
WEIGHT_LIMIT = 127


def scale_outliers(
    model: ir.Model, layers: Iterable[Layer], statistics: Mapping[str, TensorStatistics]
) -> dict[str, TensorStatistics]:
    """Scale in place; the statistics of the values that are quantized in place of the old ones, by name."""
    found: dict[str, TensorStatistics] = {}
    for value, nodes in _products(layers).items():
        seen = statistics.get(str(value.name))
        scales = None if seen is None else _scales_of(model, Site(value, nodes), seen)
        if seen is None or scales is None:
            continue
        scaled = _divide(model, value, nodes, scales)
        for layer in Site(value, nodes).layers(model):
            dtype = layer.dtype.numpy()
            replace_parameters(model, layer, layer.scale_inputs(scales).astype(dtype), layer.bias.astype(dtype))
        found[str(scaled.name)] = _capped(seen, scales)
    return found


def _products(layers: Iterable[Layer]) -> dict[ir.Value, tuple[ir.Node, ...]]:
    """The matrix products of each value that an operator of MAKERS makes."""
    found: dict[ir.Value, tuple[ir.Node, ...]] = {}
    for layer in layers:
        maker = layer.input.producer()
        if layer.node.op_type in ("MatMul", "Gemm") and maker is not None and g.is_onnx(maker, *MAKERS):
            found[layer.input] = (*found.get(layer.input, ()), layer.node)
    return found


def _scales_of(model: ir.Model, site: Site, seen: TensorStatistics) -> np.ndarray | None:
    """What features are divided by, float64 (K,); None where it would gain too little."""
    try:
        layers = site.layers(model)
    except Unfit:
        return None
    peaks = seen.feature_peak
    if peaks is None or any(layer.inputs != peaks.size for layer in layers):
        return None
    matrices = [np.asarray(layer.weight) for layer in layers]
    weights = np.concatenate([m.T if layer.transposed else m for m, layer in zip(matrices, layers, strict=True)], 1)
    return chosen_scales(peaks, _mean_square(seen), weights, symmetric=seen.minimum < -0.5 * seen.maximum)


def _mean_square(seen: TensorStatistics) -> float:
    return float(np.dot(seen.counts, seen.centres**2)) / max(seen.count, 1)


def chosen_scales(peaks: np.ndarray, mean_square: float, weights: np.ndarray, symmetric: bool) -> np.ndarray | None:
    """The scales with the least predicted noise, float64 (K,); None where it falls by less than LEAST_GAIN.

    peaks: the largest magnitude of each feature, (K,); weights: (K, N); symmetric: whether features reach as far
    below zero as above.
    """
    largest = float(peaks.max(initial=0.0))
    if largest <= 0 or not np.isfinite(largest):
        return None
    row_energy, sizes = (weights**2).sum(axis=1), np.abs(weights)
    energy = np.minimum(mean_square, peaks**2)

    def noise(scales: np.ndarray) -> float:
        reach = float((peaks / scales).max()) * (2 if symmetric else 1)
        activations = (reach / LEVELS) ** 2 * float(np.dot(scales**2, row_energy))
        steps = (sizes * scales[:, None]).max(axis=0) / WEIGHT_LIMIT
        return activations + float((steps**2).sum()) * float((energy / scales**2).sum())

    candidates = [np.maximum(1.0, peaks / (cap * largest)) for cap in CAPS]
    noises = [noise(scales) for scales in candidates]
    best = int(np.argmin(noises))
    return candidates[best] if noises[best] * LEAST_GAIN <= noises[0] else None


def _divide(model: ir.Model, value: ir.Value, nodes: Collection[ir.Node], scales: np.ndarray) -> ir.Value:
    """Have the products read the value divided by the scales; returns what they read."""
    read_by_others = value.is_graph_output() or any(usage.node not in nodes for usage in value.uses())
    if not read_by_others:
        try:
            find_fold(model, value, 1 / scales).apply(model)
            return value
        except Unfit:
            pass
    name = g.fresh_name(model.graph, f"{value.name}_scaled")
    factors = g.add_initializer(model.graph, f"{value.name}_factors", (1 / scales).astype(np.float32))
    scale = ir.Node("", "Mul", [value, factors], num_outputs=1, name=name)
    made = scale.outputs[0]
    made.name, made.dtype, made.shape = name, ir.DataType.FLOAT, value.shape
    model.graph.insert_before(next(node for node in model.graph if node in nodes), scale)
    for node in nodes:
        node.replace_input_with(0, made)
    return made


def _capped(seen: TensorStatistics, scales: np.ndarray) -> TensorStatistics:
    """The statistics after division, as far as they can be told: what reached beyond the new peak is at it."""
    assert seen.feature_peak is not None
    peaks = seen.feature_peak / scales
    cap = float(peaks.max())
    counts, centres = seen.counts.copy(), seen.centres
    inside = np.flatnonzero(np.abs(centres) <= cap)
    if inside.size:
        for beyond, edge in ((centres > cap, inside[-1]), (centres < -cap, inside[0])):
            counts[edge] += counts[beyond].sum()
            counts[beyond] = 0
    return replace(
        seen, minimum=max(seen.minimum, -cap), maximum=min(seen.maximum, cap), counts=counts, feature_peak=peaks
    )
