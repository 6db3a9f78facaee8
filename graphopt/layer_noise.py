"""Where the error comes from: signal-to-noise of each layer's output between two versions of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt.verify import onnxruntime_runner

LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Concat"})
MOST_LAYERS = 400


def layer_snr_db(
    before: ir.Model, after: ir.Model, samples: Sequence[Mapping[str, np.ndarray]], work: Path
) -> dict[str, float]:
    """By node: 10 log10(sum y^2 / sum (y - y')^2) of its output, where both models have a value of that name
    and shape."""
    have_after = {v.name for n in after.graph for v in n.outputs}
    layers = {
        str(n.outputs[0].name): graphs.label(n)
        for n in before.graph
        if n.op_type in LAYER_OPERATORS and n.outputs[0].name in have_after and n.outputs[0].dtype == ir.DataType.FLOAT
    }
    wanted = list(layers)[:MOST_LAYERS]
    if not wanted or not samples:
        return {}
    runners = [
        onnxruntime_runner(_exposing(m, wanted), work / f"layers-{label}.onnx")
        for m, label in ((before, "before"), (after, "after"))
    ]
    signal = dict.fromkeys(wanted, 0.0)
    noise = dict.fromkeys(wanted, 0.0)
    for sample in samples:
        reference, got = (run(sample) for run in runners)
        for name in wanted:
            a, b = reference[name].astype(np.float64), got[name].astype(np.float64)
            if a.shape != b.shape:  # channels were cut
                continue
            signal[name] += float(np.square(a).sum())
            noise[name] += float(np.square(a - b).sum())
    return {
        layers[name]: 10 * math.log10(signal[name] / noise[name])
        for name in wanted
        if noise[name] > 0 and signal[name] > 0
    }


def _exposing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    copy = model.clone()
    outputs = {v.name for v in copy.graph.outputs}
    by_name = {v.name: v for n in copy.graph for v in n.outputs}
    copy.graph.outputs.extend(by_name[name] for name in names if name not in outputs)
    return copy
