"""Which layers 4 bits harm most, and how many of them must keep 8.

1. Of each layer alone: the noise it adds at the outputs with 4 bits and with 8, on a few calibration samples. Layers
   are ranked by the noise energy that 8 bits save for each byte they cost.
2. Of the whole model with the first k of that ranking in 8 bits: the outputs' signal-to-noise. The least k that
   reaches the bound is found by bisection, among those that keep the model small enough.

One session does all this: weights and biases are inputs with a default, and a run gives others.
Fidelity of the measure: biases that the model did not have before are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.calibration.observe import open_session
from graphopt.graph import attribute, input_of
from graphopt.model import parameter_bytes, to_bytes
from graphopt.passes.base import Context
from graphopt.passes.block_quantization.rounding import Quantized
from graphopt.passes.weight_layers import WeightLayer, weight_name

SAMPLES = 8

Choice = Mapping[WeightLayer, Quantized]


@dataclass(frozen=True)
class Mixture:
    """`eight`: the layers that keep 8 bits. `snr_db` of the outputs with them, on the samples it was chosen with."""

    eight: tuple[WeightLayer, ...]
    snr_db: float
    ratio: float


def mix(model: ir.Model, four: Choice, eight: Choice, min_snr_db: float, min_ratio: float, context: Context) -> Mixture:
    """As few layers in 8 bits as bring the outputs to `min_snr_db`, or as many as leave parameters `min_ratio` times
    smaller than in `model`, whichever are fewer.

    Raises ModelError: ONNX Runtime refuses the model.
    """
    assert context.data is not None
    samples, _ = context.data.draw(min(SAMPLES, len(context.data)), context.seed)
    outputs = _Outputs(model, list(four), samples)
    alone: dict[WeightLayer, float] = {}
    with context.progress.task("noise of each layer at 4 and 8 bits", len(four)) as advance:
        for each in four:
            alone[each] = max(0.0, outputs.noise({each: four[each]}) - outputs.noise({each: eight[each]}))
            advance(1)
    costs = {each: added_bytes(each, eight[each]) - added_bytes(each, four[each]) for each in four}
    ranked = sorted(four, key=lambda each: -alone[each] / max(1, costs[each]))
    whole = parameter_bytes(model)
    sizes = [whole + sum(added_bytes(each, done) for each, done in four.items())]
    for each in ranked:
        sizes.append(sizes[-1] + costs[each])
    most = max((count for count, size in enumerate(sizes) if whole / size >= min_ratio), default=0)

    def snr_db(count: int) -> float:
        noise = outputs.noise({**four, **{each: eight[each] for each in ranked[:count]}})
        return math.inf if noise == 0 else -10 * math.log10(noise)

    low, high = -1, most  # low fails, as far as bisection knows; high is what is left if all do
    reached = {count: snr_db(count) for count in (0, most)}
    if reached[0] >= min_snr_db:
        high = 0
    while high - low > 1:
        middle = (low + high) // 2
        reached.setdefault(middle, snr_db(middle))
        if reached[middle] >= min_snr_db:
            high = middle
        else:
            low = middle
    kept = tuple(ranked[:high])
    return Mixture(kept, reached[high], whole / sizes[high])


def added_bytes(each: WeightLayer, done: Quantized) -> int:
    """By how much the model's parameters grow when the layer is written with DequantizeLinear: mostly below zero."""
    shape = 8 * each.weights.ndim if done.layout.stored != each.weights.shape else 0
    bias = done.shift.size * 4 if done.shift is not None and each.bias is None else 0
    return done.bytes + shape + bias - each.weights.nbytes


class _Outputs:
    """The model's outputs with other weights, without building it again."""

    def __init__(self, model: ir.Model, layers: Sequence[WeightLayer], dataset: Dataset):
        copy = model.clone()
        copy.ir_version = max(copy.ir_version or 0, 4)  # before, every initializer had to be an input
        names = {weight_name(each) for each in layers}
        names.update(str(bias.name) for each in layers if (bias := _bias(each)) is not None)
        self.open = {n for n in names if n in copy.graph.initializers}
        for name in sorted(self.open):
            value = copy.graph.initializers[name]
            if not value.is_graph_input():
                copy.graph.inputs.append(value)
        self.session = open_session(to_bytes(copy))
        self.feeds = list(dataset.batches(1))
        self.names = [o.name for o in self.session.get_outputs() if "float" in o.type]
        self.wanted = self._run({})
        self.power = [max(1e-300, float(np.square(column).sum())) for column in self.wanted]

    def noise(self, choice: Choice) -> float:
        """Noise over signal energy of the output that has most."""
        found = self._run(_arrays(choice, self.open))
        noise = (float(np.square(a - b).sum()) for a, b in zip(self.wanted, found, strict=True))
        return max((n / p for n, p in zip(noise, self.power, strict=True)), default=0.0)

    def _run(self, weights: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        rows = [self.session.run(self.names, {**feeds, **weights}) for feeds in self.feeds]
        return [np.stack([np.asarray(row[i], np.float64) for row in rows]) for i in range(len(self.names))]


def _arrays(choice: Choice, known: set[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for each, done in choice.items():
        alpha = attribute(each.node, "alpha", 1.0) if each.node.op_type == "Gemm" else 1.0
        found[weight_name(each)] = (each.stored(done.rows()) / alpha).astype(np.float32)
        bias = _bias(each)
        if done.shift is not None and bias is not None and each.bias is not None and bias.const_value is not None:
            beta = attribute(each.node, "beta", 1.0) if each.node.op_type == "Gemm" else 1.0
            total = (each.bias + done.shift) / (beta or 1.0)
            if total.size == bias.const_value.size:
                found[str(bias.name)] = total.astype(np.float32).reshape(bias.const_value.shape.numpy())
    return {name: array for name, array in found.items() if name in known}


def _bias(each: WeightLayer) -> ir.Value | None:
    return None if each.layer.bias is None else input_of(*each.layer.bias)
