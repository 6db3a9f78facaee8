"""Move outliers from the activations of matrix products to their weights, which 8 bits hold better.

Equation
    x W  =  (x S^-1) (S W)      s[k] = max|x[..., k]|^alpha / max|W[k]|^(1 - alpha)      for every feature k
    S^-1 goes into the constants of what makes x, so that no operator is added. max|x| is over the calibration data,
    max|W| over all the products that read x.

Applies when
    x is read only by MatMul and Gemm with constant weights, and made by
    1. LayerNormalization or RMSNormalization: its scale, and bias;
    2. Gemm or MatMul (with the Add of a constant behind it): its columns, and bias;
    3. Mul or Div by a constant, as the end of an RMSNorm written out;
    4. Add or Sub of a constant to one of these, as the end of a LayerNormalization written out;
    5. Mul of two values, one of which is one of these, as in a gated layer;
    6. Relu, LeakyRelu or Identity of one of these.
    Features that are zero in the calibration data or in the weights are left as they are.

Refuses when (each is reported)
    x or a value on the way has other readers (a residual Add behind the normalisation, say) or is an output of the
    model; what makes x takes no scales (Softmax, a Transpose, Gelu); constants are computed or open to a caller, or not
    float32 or float64; x has more than three dimensions; a node is excluded.

Fidelity
    ROUNDING: s is chosen on data, but any s gives the same function.

Reference
    Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
    section 4.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.errors import PassError
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.linear_operator import Linear, Unfit, linear_operator, replace_parameters
from graphopt.passes.smoothing.folds import find_fold

LARGEST_SCALE = 2.0**16
"""No feature is scaled by more: beyond it one side is as good as dead."""


class SmoothActivations(Pass):
    """Scale the features that matrix products read so that activations have fewer outliers."""

    fidelity = Fidelity.ROUNDING

    alpha: float = 0.5
    """How much of the range moves to the weights: 0 nothing that activations need, 1 all of it."""
    exclude: tuple[str, ...] = ()
    """Names of products to leave as they are (of a nameless node: its first output)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha:g}")

    def observes(self, model: ir.Model) -> tuple[str, ...]:
        """The values that can be scaled."""
        return tuple(str(site.value.name) for site in find_sites(model, self.exclude)[0])

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Smooth; `applied` counts products. Raises PassError: statistics are missing, `exclude` names no node."""
        require_nodes(model, self.exclude, self.name)
        sites, refused = find_sites(model, self.exclude)
        applied = 0
        for site in sites:
            seen = context.statistics.get(str(site.value.name))
            if seen is None:
                raise PassError(
                    f"no calibration statistics for value {site.value.name!r}", hint="give calibration data"
                )
            if seen.feature_peak is None:
                refused.update(dict.fromkeys(site.labels, "its input has more than three dimensions"))
                continue
            scales = smoothing_scales(seen.feature_peak, site.weight_peaks(model), self.alpha)
            if np.any(scales != 1):
                _scale(model, site, scales)
                applied += len(site.products)
        g.remove_unused_initializers(model.graph)
        return PassResult(model, applied, tuple(Skip(node, reason) for node, reason in refused.items()))


@dataclass(frozen=True)
class Site:
    """A value and all its readers, which are matrix products."""

    value: ir.Value
    products: tuple[ir.Node, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(g.label(node) for node in self.products)

    def layers(self, model: ir.Model) -> list[Linear]:
        """The products with their weights as they are now. Raises Unfit: one has none that are constant."""
        found = []
        for node in self.products:
            layer = linear_operator(model, node, any_rank=True)
            if layer is None or layer.weight is None:
                raise Unfit(f"the weights of {node.op_type} {g.label(node)!r} are not a constant matrix on its right")
            if layer.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
                raise Unfit(f"the weights of {node.op_type} {g.label(node)!r} are not float32")
            layer.require_constant(f"{node.op_type} {g.label(node)!r}")
            found.append(layer)
        return found

    def weight_peaks(self, model: ir.Model) -> np.ndarray:
        """(K,): the largest magnitude that any product has for each feature."""
        return np.max([layer.input_peaks() for layer in self.layers(model)], axis=0)


def find_sites(model: ir.Model, exclude: Collection[str]) -> tuple[list[Site], dict[str, str]]:
    """What can be smoothed, in graph order, and the products that cannot, each with the reason."""
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if (
            g.is_onnx(node, "MatMul", "Gemm")
            and node.inputs[0] is not None
            and g.constant_of(node.inputs[1]) is not None
        ):
            products.setdefault(node.inputs[0], []).append(node)
    sites: list[Site] = []
    refused: dict[str, str] = {}
    for value, nodes in products.items():
        site = Site(value, tuple(nodes))
        try:
            for usage in value.uses():
                if usage.node not in nodes or usage.idx != 0:
                    raise Unfit(f"its input is read by {usage.node.op_type} {g.label(usage.node)!r} too")
            if value.is_graph_output():
                raise Unfit("its input is an output of the model")
            left = next((label for label in site.labels if label in exclude), None)
            if left is not None:
                raise Unfit(f"{left!r} is excluded")
            features = {layer.inputs for layer in site.layers(model)}
            if len(features) != 1:
                raise Unfit("the products that read its input disagree on the number of features")
            find_fold(model, value, np.ones(features.pop()))
            sites.append(site)
        except Unfit as unfit:
            refused.update(dict.fromkeys(site.labels, str(unfit)))
    return sites, refused


def smoothing_scales(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """S: float64 (K,), from the largest magnitudes of each feature on both sides, (K,)."""
    alive = (activations > 0) & (weights > 0)
    x, w = np.where(alive, activations, 1.0), np.where(alive, weights, 1.0)
    return np.clip(x**alpha / w ** (1 - alpha), 1 / LARGEST_SCALE, LARGEST_SCALE)


def _scale(model: ir.Model, site: Site, scales: np.ndarray) -> None:
    find_fold(model, site.value, 1 / scales).apply(model)
    for layer in site.layers(model):
        dtype = layer.dtype.numpy()
        replace_parameters(model, layer, layer.scale_inputs(scales).astype(dtype), layer.bias.astype(dtype))
