"""Set weights to zero: so many of a layer, or N of every M, the others changed to make up for them.

Equation
    Remove the weights w_t of a row that change its output least, at `sparsity` or in a pattern N:M (of each M
    consecutive weights at most N are not zero). The change is guessed by |w_t| (magnitude), by |w_t| |x_t| with the
    size of what the weight multiplies (wanda), or is the least one after the other weights of the row were fitted
    anew, w_t^2 / U_tt^2 with U the Cholesky factor of the inverse of the input's second moments (sparsegpt).

Applies when
    1. Conv, Gemm, and MatMul with a constant float32 matrix on the right.
    2. With an N:M pattern: the number of inputs (C/group of a Conv, K of a matrix) is a multiple of M.
    3. With calibration data, the bias takes back what this does to the mean of the output.

Refuses when
    weights or bias are computed or may be overridden by the caller, are not float32 or not finite, or are read by
    other nodes in another way; the node is excluded; the inputs are no multiple of M. Without calibration data
    wanda and sparsegpt prune by magnitude, and say so. Depthwise layers are left out unless `min_taps` is lowered.

Speed
    None. Zeros make a file that compresses better; they are stored as the others are, and neither ONNX Runtime nor a
    target here has a kernel that is faster for them.

Defaults
    Measured on classifiers (benchmarks/weight_only.py): sparsegpt loses a fraction of what magnitude and wanda lose on
    all of them. Half the weights is still more than most convolutional networks bear without training.

Fidelity
    LOSSY.

Reference
    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015 (magnitude); Sun et
    al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024; Frantar and Alistarh,
    "SparseGPT", ICML 2023; Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (N:M along input channels).
"""

from __future__ import annotations

import zlib
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.layer_moments import for_each_layer
from graphopt.passes.quantization.insert import Inserter
from graphopt.passes.sparsity.masks import Pattern
from graphopt.passes.sparsity.prune import Method, Plan, Pruned, prune_layer
from graphopt.passes.weight_layers import WeightLayer, find_layers, remove_left_over, weight_name, write_bias


class PruneWeights(Pass):
    """Zeros among the weights, for a file that compresses better; nothing runs faster."""

    fidelity = Fidelity.LOSSY

    sparsity: float = 0.5
    """The share of each layer's weights to remove; a pattern replaces it."""
    pattern: str | None = None
    """N:M, such as 2:4: of M consecutive weights at most N are not zero."""
    method: Method = "sparsegpt"
    """How weights are chosen: magnitude, wanda, sparsegpt (which also changes the weights that stay)."""
    min_taps: int = 16
    """Layers with fewer weights an output channel stay as they are: depthwise ones, where little could make up."""
    correct_bias: bool = True
    """Whether biases take back the mean error; needs calibration data."""
    exclude: tuple[str, ...] = ()
    """Names of nodes to leave as they are (of a nameless node: its first output)."""
    exclude_types: tuple[str, ...] = ()
    """Operator types to leave as they are."""

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity must be above 0 and below 1, not {self.sparsity:g}")
        if self.pattern is not None:
            Pattern.parse(self.pattern)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Prune. Raises PassError: `exclude` names no node; ModelError, DataError: the data does not fit the model."""
        pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        layers, skipped = find_layers(model, self.name, self.exclude, self.exclude_types)
        if pattern is not None:
            for each in [each for each in layers if _inputs(each) % pattern.of]:
                skipped.append(Skip(each.name, f"its {_inputs(each)} inputs are no multiple of {pattern.of}"))
                layers.remove(each)
        for each in [each for each in layers if each.taps < self.min_taps]:
            skipped.append(Skip(each.name, f"its rows have {each.taps} weights, fewer than min_taps={self.min_taps}"))
            layers.remove(each)
        plan = Plan(self.method, self.sparsity, pattern, self.correct_bias)
        uses_data = self.method != "magnitude" or self.correct_bias
        pruned = for_each_layer(model, layers, plan, partial(prune_layer, plan), context, uses_data)
        before = _compressed(model)
        inserter = Inserter(model.graph, ())
        weights = [each.node.inputs[each.layer.weight_index] for each in pruned]
        for each, done in pruned.items():
            _write(inserter, each, done)
        remove_left_over(model.graph, [value for value in weights if value is not None])
        notes = self._notes(pruned, before, _compressed(model), context) if pruned else ()
        return PassResult(model, len(pruned), tuple(skipped), notes)

    def _notes(self, pruned: dict[WeightLayer, Pruned], before: int, after: int, context: Context) -> tuple[str, ...]:
        zeros = sum(int((done.rows == 0).sum()) for done in pruned.values())
        total = sum(done.rows.size for done in pruned.values())
        notes = [
            f"{zeros} of {total} weights of {len(pruned)} layers are zero ({100 * zeros / total:.1f} %)",
            f"size only: parameters compressed by zlib take {after} bytes instead of {before}; they are stored as "
            "before, and no kernel here is faster for zeros",
        ]
        if self.method != "magnitude":
            blind = sum(not done.by_data for done in pruned.values())
            if context.data is None:
                notes.append(f"method={self.method} without calibration data: weights are chosen by magnitude")
            elif blind:
                notes.append(f"{blind} layers have too many weights a row for a covariance: chosen by magnitude")
        return tuple(notes)


def _inputs(each: WeightLayer) -> int:
    return each.weights.shape[1] if each.node.op_type == "Conv" else each.taps


def _write(inserter: Inserter, each: WeightLayer, done: Pruned) -> None:
    array = each.stored(done.rows)
    value = each.node.inputs[each.layer.weight_index]
    assert value is not None
    if value.is_initializer():
        value.const_value = ir.Tensor(array, name=value.name)
    else:
        value = inserter.constant(weight_name(each), array)
        for reader in (each.node, *each.sharers):
            reader.replace_input_with(each.layer.weight_index, value)
    write_bias(inserter, each, done.shift)


def _compressed(model: ir.Model) -> int:
    """Bytes of all initializers, each compressed by zlib's fastest level."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(len(zlib.compress(np.ascontiguousarray(t.numpy()).tobytes(), 1)) for t in tensors if t is not None)
