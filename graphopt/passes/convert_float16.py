"""Weights, or the whole computation, in float16.

Equation
    half(x) = the nearest multiple of 2^(e-10) with 2^e <= |x| < 2^(e+1) (ties to even), e >= -14; |x| <= 65504
    relative error at most 2^-11 down to 6.1e-5, below it an absolute error of at most 2^-25

Cases
    1. compute=false: each float32 weight is stored as float16, with a Cast to float32 behind it. The file is half as
       large; the arithmetic stays float32 and any engine runs it.
    2. compute=true: operators compute in float16, with Casts behind the inputs and before the outputs of the model,
       which stay float32. In float32 stay: sums of many terms (Softmax, normalisations, ReduceMean, GlobalAveragePool),
       Exp, Log, Pow, Sqrt, comparisons and roundings, regions and scales of Resize, arithmetic with sizes and
       positions, and operators with a small constant (an epsilon, a mask of -1e9) that float16 cannot hold; their
       weights are stored as in case 1.

Applies when
    the values are float32. Finite weights beyond 65504 saturate, and are reported; subnormal results are kept, and
    counted where they lose precision.
Refuses when (each is reported)
    a node is excluded; an operator has no float16 form, is of another domain or holds subgraphs; the types of values
    cannot be inferred. Constants of fewer than 64 elements and scales of quantizers are not stored in float16.
    Whether an engine computes in float16 is its own affair: ONNX Runtime on most CPUs casts to float32 around each
    operator, so case 2 is for targets with float16 arithmetic.

Fidelity
    LOSSY.

Reference
    IEEE 754-2019, binary16; Micikevicius et al., "Mixed Precision Training", ICLR 2018 (which operators need float32).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphopt.graph import opset_of
from graphopt.model import PROTOBUF_LIMIT_BYTES, parameter_bytes
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.float16.computed import compute_in_half
from graphopt.passes.float16.narrow import Losses
from graphopt.passes.float16.stored import store_weights
from graphopt.shapes.constants import lift_constants

NEEDED_OPSET = 7
"""Older operators broadcast and cast in ways of their own."""


class ConvertFloat16(Pass):
    """Half the bytes: weights, or weights and arithmetic, in float16."""

    fidelity = Fidelity.LOSSY

    compute: bool = False
    """Whether operators compute in float16 too, or only weights are stored in it."""
    exclude: tuple[str, ...] = ()
    """Names of nodes that stay in float32, with the weights they read (of a nameless node: its first output)."""
    exclude_types: tuple[str, ...] = ()
    """Operator types that stay in float32."""

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Convert; `applied` counts weights stored, or nodes that compute, in float16.

        Raises PassError: `exclude` names no node.
        """
        require_nodes(model, self.exclude, self.name)
        if opset_of(model) < NEEDED_OPSET:
            return PassResult(model, 0, (Skip("model", f"opset {opset_of(model)} is older than {NEEDED_OPSET}"),))
        lift_constants(model)
        if self.compute:
            untyped = _infer_types(model)
            if untyped is not None:
                return PassResult(model, 0, (Skip("model", f"the type of value {untyped!r} cannot be inferred"),))
        losses = Losses()
        computing, left = compute_in_half(model, self.exclude, self.exclude_types, losses) if self.compute else (0, [])
        stored, kept = store_weights(model, self.exclude, self.exclude_types, losses)
        return PassResult(model, computing or stored, (*left, *kept), losses.notes())


def _infer_types(model: ir.Model) -> str | None:
    """Record the type of every value; the name of one that has none."""
    values = [value for node in model.graph for value in node.outputs if value.name]
    if any(value.type is None for value in values) and parameter_bytes(model) < PROTOBUF_LIMIT_BYTES // 2:
        inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
        types = {value.name: value.type for node in inferred.graph for value in node.outputs}
        for value in values:
            value.type = value.type or types.get(value.name)
    return next((str(value.name) for value in values if value.type is None), None)
