"""Every layer's weights rounded, remembering what was computed for the same data.

Returning layers to float builds the model again and again with a few layers fewer; the others round the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.graph import attribute, label
from graphopt.model import digest
from graphopt.passes.base import Context
from graphopt.passes.quantization.insert import layer_arrays
from graphopt.passes.quantization.moments import Moments, collect_moments
from graphopt.passes.quantization.placement import Layer
from graphopt.passes.quantization.ranges import Encoding
from graphopt.passes.quantization.weights import Clip, Rounded, Rounding, round_weights, weight_scales

_known: weakref.WeakKeyDictionary[Dataset, dict[tuple, Rounded]] = weakref.WeakKeyDictionary()


def round_layers(
    model: ir.Model,
    layers: Sequence[Layer],
    inputs: Mapping[Layer, Encoding],
    limit: int,
    rounding: Rounding,
    context: Context,
    *,
    clip: Clip = "none",
    correct_bias: bool = True,
) -> dict[Layer, tuple[np.ndarray, Rounded]]:
    """Weight scales (channels,) and rounded weights of every layer; `inputs` are the encodings of their inputs.

    Without `context.data` weights are rounded to nearest and biases are not corrected. Raises ModelError and DataError
    as `collect_statistics` does.
    """
    arrays = {layer: layer_arrays(layer) for layer in layers}
    scales = {
        layer: weight_scales(weights, layer.channel_axis, bias, inputs[layer].scale, limit, clip)
        for layer, (weights, bias) in arrays.items()
    }

    def rounded(layer: Layer, moments: Moments | None) -> Rounded:
        groups = attribute(layer.node, "group", 1)
        correct = correct_bias and layer.bias is not None  # a MatMul without an Add has nowhere to put it
        return round_weights(
            arrays[layer][0], layer.channel_axis, scales[layer], limit, groups, moments, rounding, correct
        )

    if context.data is None or (rounding == "nearest" and not correct_bias):
        return {layer: (scales[layer], rounded(layer, None)) for layer in layers}
    known = _known.setdefault(context.data, {})
    identity = digest(model)
    how = (identity, context.seed, limit, rounding, correct_bias)
    keys = {layer: (*how, label(layer.node), scales[layer].tobytes()) for layer in layers}
    missing = [layer for layer in layers if keys[layer] not in known]
    if missing:
        moments = collect_moments(
            model, missing, context.data, context.seed, context.progress, covariance=rounding != "nearest"
        )
        with context.progress.task("round weights", len(missing)) as advance:
            for layer in missing:
                known[keys[layer]] = rounded(layer, moments.pop(layer))
                advance(1)
    return {layer: (scales[layer], known[keys[layer]]) for layer in layers}
