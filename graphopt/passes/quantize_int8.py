"""Static post-training quantization to 8 bits, written as QuantizeLinear / DequantizeLinear pairs.

Equation
    q(x) = clip(round_half_even(x / s) + z, qmin, qmax),  x ~ s * (q(x) - z)
    Conv(x, W) + b  ~  s_x * s_W[c] * (sum (q_x - z_x) * q_W[c] + q_b[c]),  q_b[c] = round(b[c] / (s_x * s_W[c]))
    Activations: one s, z a tensor, unsigned or signed as the target's dot instruction wants. Weights: symmetric s8,
    one scale an output channel. Biases: s32.

Applies when
    1. Conv with constant float32 weights (any rank, stride, dilation, group): input, weights, bias and output are
       quantized; a Relu or Clip that alone reads it is part of it, and its clip is done by saturation.
    2. Gemm and MatMul with a constant float32 matrix on the right (and the constant an Add puts behind a MatMul, as
       its bias): as 1, with the output left float (so logits keep precision) unless another quantized layer follows,
       or a Relu or Clip, behind which ONNX Runtime would not see the integers without.
    3. Add, Mul, AveragePool, GlobalAveragePool, LeakyRelu, Sigmoid, Concat between quantized values that lead to
       another layer: stay in 8 bits with scales of their own. A Concat and the inputs only it reads share one scale.
    4. MaxPool, Reshape, Flatten, Transpose, Squeeze, Unsqueeze, Slice, Gather, Expand, Split, DepthToSpace,
       SpaceToDepth, Identity between such values: one scale before and after.

Outliers
    Where LayerNormalization, RMSNormalization, Gelu or Swish make what a Gemm or MatMul reads, and a few of its
    features reach much further than the others, these are divided by a factor and the weights that read them
    multiplied by it, where that halves the predicted noise (MiniLM: 24 dB instead of 20).

Refuses when
    weights or bias are computed or may be overridden by the caller, are not float32 or not finite; the node is
    excluded; ConvTranspose and recurrent layers (no 8-bit kernel in ONNX Runtime); the opset is older than 13 and
    cannot be raised.

Defaults
    Measured on four ImageNet classifiers with three draws of the calibration data (benchmarks/int8_accuracy.py).
    Ranges: `percentile` at 99.999 loses the least top-1 over all; `mse` leaves the least noise on some and loses about
    as little; minmax leaves 2 to 4 dB more noise, entropy costs MobileNetV2 a point. Weights: `compensated` rounding
    leaves 1 to 8 dB less noise than `nearest`, most where depthwise weights are what hurts.
    Six classifiers, three draws (benchmarks/recovery_ablation.py): of that gain over `nearest`, correcting biases
    alone gives 0.5 to 8 dB, compensating another 0.1 to 1.6; `learned` is within 0.25 dB of `compensated` either way
    and takes two to four times as long; `clip=mse` gives nothing on average: eight bits seldom need clipping.

Layers left float
    A value that integer arithmetic makes is only there in 8 bits, so a float layer reads it dequantized. ONNX Runtime
    quantizes such a layer by itself, one scale for all its weights, when it sees a per-tensor DequantizeLinear before
    and a QuantizeLinear behind; it is given a DequantizeLinear with one (equal) scale a channel, which stops that.

Fidelity
    LOSSY.

Reference
    Frantar et al., "Optimal Brain Compression", NeurIPS 2022 (compensated rounding); Nagel et al., "Up or Down?
    Adaptive Rounding for Post-Training Quantization", ICML 2020 (learned rounding); Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", ICCV 2019 (the bias takes back the mean error);
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    CVPR 2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (a channel).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration.statistics import Method
from graphopt.errors import PassError
from graphopt.graph import remove_unused_initializers
from graphopt.model import PROTOBUF_LIMIT_BYTES, parameter_bytes
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.quantization.insert import Inserter
from graphopt.passes.quantization.opset import raise_opset
from graphopt.passes.quantization.outliers import scale_outliers
from graphopt.passes.quantization.placement import Placement, place
from graphopt.passes.quantization.ranges import Encoding, encode_family
from graphopt.passes.quantization.rounding import round_layers
from graphopt.passes.quantization.weights import Clip, Rounding


class QuantizeInt8(Pass):
    """8-bit weights and activations, calibrated on data."""

    fidelity = Fidelity.LOSSY
    quantizes = True

    calibration: Method = "percentile"
    """How activation ranges are chosen."""
    percentile: float = 99.999
    """For calibration=percentile: the share of values kept at each end, in percent."""
    activations: Literal["auto", "uint8", "int8"] = "auto"
    """Type of activations; auto: what the target's dot instruction multiplies."""
    reduce_range: Literal["auto", "true", "false"] = "auto"
    """7-bit weights, so that sums of two products cannot saturate 16 bits; auto: where the target needs it."""
    rounding: Rounding = "compensated"
    """How weights are rounded: compensated makes up for each error in the weights not yet rounded; learned goes on from
    there, changing weights one at a time until no change leaves less noise in the layer's output."""
    clip: Clip = "none"
    """Whether a channel's largest weights may saturate: mse where that lowers the squared error of its weights."""
    correct_bias: Literal["auto", "true", "false"] = "auto"
    """Whether biases take back the mean error of rounded weights; auto: with every rounding but nearest."""
    outliers: Literal["scale", "keep"] = "scale"
    """scale: features of a LayerNormalization or Gelu that reach much further than the others are scaled down before
    the products that read them, whose weights take the factor."""
    exclude: tuple[str, ...] = ()
    """Names of nodes to leave float (of a nameless node: its first output)."""
    exclude_types: tuple[str, ...] = ()
    """Operator types to leave float."""

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile must be above 50 and at most 100, not {self.percentile:g}")

    def observes(self, model: ir.Model) -> tuple[str, ...]:
        """The values whose ranges decide the encodings."""
        return tuple(str(value.name) for family in self._place(model).families for value in family.roots)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Quantize. Raises PassError: statistics are missing, or `exclude` names no node."""
        raised = raise_opset(model)
        if isinstance(raised, str):
            return PassResult(model, 0, (Skip("model", raised),))
        raised = _with_shapes(raised)
        placement = self._place(raised)
        missing = [n for n in self.observes(raised) if n not in context.statistics]
        if missing:
            raise PassError(f"no calibration statistics for value {missing[0]!r}", hint="give calibration data")
        statistics = dict(context.statistics)
        scaled = scale_outliers(raised, placement.layers, statistics) if self.outliers == "scale" else {}
        if scaled:
            statistics.update(scaled)
            placement = self._place(raised)
        unsigned = self.activations == "uint8" or (
            self.activations == "auto" and context.capabilities.activation_dtype == "uint8"
        )
        dtype = np.dtype(np.uint8 if unsigned else np.int8)
        reduced = self.reduce_range == "true" or (self.reduce_range == "auto" and context.capabilities.reduce_range)
        graph = raised.graph
        encodings: dict[ir.Value, Encoding] = {}
        for family in placement.families:
            encoding = encode_family(family, statistics, self.calibration, self.percentile, dtype)
            encodings.update(dict.fromkeys(family.members, encoding))
        inputs = {layer: encodings[layer.input] for layer in placement.layers}
        limit = 64 if reduced else 127
        correct = self.correct_bias == "true" or (self.correct_bias == "auto" and self.rounding != "nearest")
        rounded = round_layers(
            raised, placement.layers, inputs, limit, self.rounding, context, clip=self.clip, correct_bias=correct
        )
        inserter = Inserter(graph, placement.integer_nodes)
        for layer, (scales, integers) in rounded.items():
            inserter.layer(layer, inputs[layer], scales, integers)
        for value, encoding in encodings.items():
            inserter.pair(value, encoding)
        remove_unused_initializers(graph)
        note = f"{len(placement.layers)} layers in {'u8' if unsigned else 's8'} x s8, {len(encodings)} values in 8 bits"
        notes = (note, f"outliers of {len(scaled)} values scaled down") if scaled else (note,)
        return PassResult(raised, len(placement.layers), placement.skipped, notes)

    def _place(self, model: ir.Model) -> Placement:
        require_nodes(model, self.exclude, self.name)
        return place(model.graph, self.exclude, self.exclude_types)


def _with_shapes(model: ir.Model) -> ir.Model:
    """The model with the shapes of inner values, which layers left float between 8-bit ones need."""
    known = all(value.shape is not None for node in model.graph for value in node.outputs)
    if known or parameter_bytes(model) > PROTOBUF_LIMIT_BYTES // 2:
        return model
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
