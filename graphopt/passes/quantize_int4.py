"""Weights in 4 bits, a scale for every block of them; activations stay float.

Equation
    w ~ s_b (q - z_b): q and z_b integers of 4 bits, s_b float32, for each block b of consecutive weights of one output
    channel. That is 4 + 32 / block bits a weight, and 4 / block more with zero points.

Applies when
    1. Conv, Gemm, and MatMul with a constant float32 matrix on the right: DequantizeLinear with `block_size` (opset
       21, to which the model is raised) before the operator. Blocks lie along K of a matrix, which is stored as (K, N),
       and along C/group of a Conv, or along its whole row (C/group kH kW) with a Reshape behind: see
       `block_quantization/layout.py`.
    2. Gemm and MatMul with form=matmulnbits: ONNX Runtime's com.microsoft.MatMulNBits takes the operator's place.
    3. bits=mixed: the layers that 4 bits harm most keep 8, a scale an output channel: by the noise at the outputs
       that each byte saves, until `min_snr_db` is reached or another would leave less than `min_ratio`.
    4. With calibration data, the bias takes back what rounding does to the mean of the output.

Refuses when
    weights or bias are computed or may be overridden by the caller, are not float32 or not finite, are read by other
    nodes in another way (a second copy would only add to the size); rows are so short that nothing is saved; the node
    is excluded; the opset cannot be raised to 21 (then form=auto still writes MatMulNBits).

Speed
    Weight-only: fewer bytes to store and to read. ONNX Runtime makes MatMulNBits of DequantizeLinear and MatMul or
    Gemm by itself, and then rounds activations to 8 bits unless its session option
    `session.qdq_matmulnbits_accuracy_level` says otherwise; form=matmulnbits computes in float32 unless
    `accuracy_level` says otherwise. The weights of Conv it dequantizes anew in each run, which costs time.

With quantize-int8
    Layers stored in 4 bits before quantize-int8 runs are left alone by it, and their inputs stay float where float
    arithmetic makes them. So `layers` may name the large matrix products of one row, which are bound by memory and
    faster in 4 bits, and quantize-int8 behind takes the rest.

Defaults
    Measured on six classifiers (benchmarks/weight_only.py). Blocks of 64 are over 6 times smaller than float32, zero
    points included, which those of 32 are only just. Zero points cost a sixteenth of a bit and save up to 1.7 points
    of top-1. gptq with the bias corrected is what keeps accuracy at all: without data, four of six networks are lost.

Fidelity
    LOSSY.

Reference
    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023;
    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", ICCV 2019 (the bias).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.graph import label
from graphopt.model import parameter_bytes
from graphopt.passes.base import Context, Fidelity, Offer, Pass, PassResult, Skip
from graphopt.passes.block_quantization.mixed import Mixture, mix
from graphopt.passes.block_quantization.rounding import Method, Quantized, Recipe, round_layer, round_layers
from graphopt.passes.block_quantization.write import CONTRIB, write_dequantize, write_matmulnbits
from graphopt.passes.copied_layer import copy_with, layer_in
from graphopt.passes.excluded import require_nodes
from graphopt.passes.quantization.insert import Inserter
from graphopt.passes.quantization.opset import raise_opset
from graphopt.passes.weight_layers import WeightLayer, find_layers, remove_left_over

BLOCKED_OPSET = 21
PRODUCTS = ("Gemm", "MatMul")


class QuantizeInt4(Pass):
    """4-bit weights in blocks; activations stay float."""

    fidelity = Fidelity.LOSSY
    quantizes = True
    takes = "layers"

    block: Literal[16, 32, 64, 128] = 64
    """Weights that share a scale."""
    symmetric: bool = False
    """Integers around zero; false: a zero point for every block."""
    method: Method = "gptq"
    """How scales and integers are chosen: nearest, hqq (scales refined without data), gptq (by the outputs on data)."""
    form: Literal["auto", "qdq", "matmulnbits"] = "auto"
    """How matrix products are written; auto: qdq, or matmulnbits where the opset cannot be raised to 21."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 0
    """For MatMulNBits: what the activations may be rounded to: 0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8."""
    bits: Literal["4", "mixed"] = "4"
    """mixed: the layers that 4 bits harm most keep 8."""
    min_snr_db: float = 20.0
    """For bits=mixed: the signal-to-noise ratio of the outputs, on calibration data, that is enough."""
    min_ratio: float = 6.0
    """For bits=mixed: how many times smaller than before the model's parameters stay at least."""
    correct_bias: bool = True
    """Whether biases take back the mean error; needs calibration data."""
    layers: tuple[str, ...] = ()
    """Names of the only nodes to store so (with those that share their weights); none: all that can be."""
    exclude: tuple[str, ...] = ()
    """Names of nodes to leave float (of a nameless node: its first output)."""
    exclude_types: tuple[str, ...] = ()
    """Operator types to leave float."""

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Quantize. Raises PassError: `exclude` or `layers` names no node; DataError: bits=mixed without data."""
        if self.bits == "mixed" and context.data is None:
            raise DataError(f"{self.name}: bits=mixed measures layers on calibration data", hint="give --calib DATA")
        model, layers, skipped, products_only = self._prepare(model)
        recipe = self._recipe()
        done = round_layers(model, layers, recipe, context)
        for each in [each for each in layers if not _gains(each, done[each])]:
            skipped.append(Skip(each.name, f"its rows of {each.taps} weights are too short to gain from 4 bits"))
            del done[each]
        notes: list[str] = []
        if self.bits == "mixed" and done and not products_only:
            eight = round_layers(model, list(done), replace(recipe, bits=8), context)
            mixture = mix(model, done, eight, self.min_snr_db, self.min_ratio, context)
            done.update({each: eight[each] for each in mixture.eight})
            notes.append(self._mixed_note(mixture))
        before = parameter_bytes(model)
        self._write(model, done, self.form == "matmulnbits" or products_only)
        notes[:0] = self._notes(done, before, parameter_bytes(model), context)
        return PassResult(model, len(done), tuple(skipped), tuple(notes) if done else ())

    def offers(self, model: ir.Model, context: Context) -> Iterator[Offer]:
        """Each layer, by itself, in 4 bits, where that is smaller; `bits` and `layers` say nothing here.

        Weights are rounded, as the other options say, when the first offer is built. `run` with offers in `layers`
        stores them the same. Raises PassError as `run` does.
        """
        for left in (("Conv",), PRODUCTS):  # apart: a Conv's form may need another opset
            types = tuple(dict.fromkeys((*self.exclude_types, *left)))
            yield from replace(self, layers=(), bits="4", exclude_types=types)._offers(model.clone(), context)

    def _offers(self, model: ir.Model, context: Context) -> Iterator[Offer]:
        model, layers, _, products_only = self._prepare(model)
        nearest = replace(self._recipe(), method="nearest", correct_bias=False)
        rounded = cache(lambda: round_layers(model, layers, self._recipe(), context))
        for each in layers:
            if _gains(each, round_layer(nearest, each, None)):
                readers = tuple(label(node) for node in (each.node, *each.sharers))
                build = partial(self._offered, model, each, rounded, products_only)
                yield Offer(each.name, each.name, readers, build)

    def _offered(
        self,
        model: ir.Model,
        each: WeightLayer,
        rounded: Callable[[], dict[WeightLayer, Quantized]],
        products_only: bool,
    ) -> ir.Model:
        return self._alone(model, each, rounded()[each], products_only)

    def _alone(self, model: ir.Model, each: WeightLayer, quantized: Quantized, products_only: bool) -> ir.Model:
        """A copy with this layer alone in 4 bits."""
        copy, counterpart = copy_with(model)
        sharers = [counterpart(node) for node in each.sharers]
        own = replace(each, layer=layer_in(counterpart, each.layer), sharers=sharers)
        self._write(copy, {own: quantized}, self.form == "matmulnbits" or products_only)
        return copy

    def _prepare(self, model: ir.Model) -> tuple[ir.Model, list[WeightLayer], list[Skip], bool]:
        """The model, of opset 21 if need be and possible, its layers, why others are none, and whether
        DequantizeLinear is out of the question."""
        layers, skipped = self._find(model)
        if self._all_products(layers):
            return model, layers, skipped, False
        raised = raise_opset(model, BLOCKED_OPSET)
        if not isinstance(raised, str):
            return raised, *(self._find(raised) if raised is not model else (layers, skipped)), False
        if self.form == "qdq":
            return model, [], [*skipped, Skip("model", raised)], True
        skipped += [Skip(each.name, raised) for each in layers if each.node.op_type == "Conv"]
        return model, [each for each in layers if each.node.op_type != "Conv"], skipped, True

    def _find(self, model: ir.Model) -> tuple[list[WeightLayer], list[Skip]]:
        layers, skipped = find_layers(model, self.name, self.exclude, self.exclude_types)
        if not self.layers:
            return layers, skipped
        require_nodes(model, self.layers, self.name, "layers")
        named = [each for each in layers if any(label(n) in self.layers for n in (each.node, *each.sharers))]
        return named, [each for each in skipped if each.node in self.layers]

    def _recipe(self) -> Recipe:
        return Recipe(4, self.block, self.symmetric, self.method, self.correct_bias)

    def _all_products(self, layers: list[WeightLayer]) -> bool:
        """Whether no DequantizeLinear will be written."""
        products = all(each.node.op_type != "Conv" for each in layers)
        return not layers or (self.form == "matmulnbits" and products and self.bits == "4")

    def _write(self, model: ir.Model, done: dict[WeightLayer, Quantized], as_products: bool) -> None:
        inserter = Inserter(model.graph, ())
        weights = [each.node.inputs[each.layer.weight_index] for each in done]
        for each, quantized in done.items():
            if as_products and each.node.op_type != "Conv" and quantized.bits == 4:
                write_matmulnbits(inserter, each, quantized, self.block, self.accuracy_level)
                model.graph.opset_imports.setdefault(CONTRIB, 1)
            else:
                write_dequantize(inserter, each, quantized)
        remove_left_over(model.graph, [value for value in weights if value is not None])

    def _notes(self, done: dict[WeightLayer, Quantized], before: int, after: int, context: Context) -> list[str]:
        bits = Counter(quantized.bits for quantized in done.values())
        kept = f", {bits[8]} in 8" if bits[8] else ""
        notes = [
            f"{bits[4]} layers in 4 bits (blocks of {self.block}, {self.method}){kept}; parameters "
            f"{before / max(1, after):.2f} times smaller: {before} to {after} bytes"
        ]
        if self.method == "gptq" and context.data is None:
            notes.append("method=gptq without calibration data: weights are rounded as by method=hqq")
        elif self.method == "gptq":
            large = sum(not quantized.second_order for quantized in done.values())
            if large:
                notes.append(f"{large} layers have too many weights a row for a covariance: rounded as by method=hqq")
        return notes

    def _mixed_note(self, mixture: Mixture) -> str:
        met = "" if mixture.snr_db >= self.min_snr_db else f", short of {self.min_snr_db:g}"
        return (
            f"{len(mixture.eight)} layers keep 8 bits: outputs at {mixture.snr_db:.1f} dB{met}, parameters "
            f"{mixture.ratio:.2f} times smaller"
        )


def _gains(each: WeightLayer, quantized: Quantized) -> bool:
    return quantized.bytes < each.weights.nbytes
