"""Write ONNX Runtime's own operators as ONNX's, so that any pass, and any engine, knows them.

    SkipLayerNormalization(x, y, scale, bias)  =  LayerNormalization(x + y, scale, bias), written out

Models that its optimizer, its transformer tools or Olive have fused hold operators of the domain com.microsoft, which
nobody else runs, and whose shapes ONNX does not infer. `fuse-operators` then fuses what ONNX has an operator for.

1. Gelu, BiasGelu, FastGelu, QuickGelu.
2. SkipLayerNormalization, SkipSimplifiedLayerNormalization, EmbedLayerNormalization.
3. FusedMatMul, FusedGemm, FusedConv; DynamicQuantizeMatMul, MatMulIntegerToFloat.
4. Attention and MultiHeadAttention without a cache.

Applies when: the node is in the main graph, float32 where it is not of bytes.
Refuses when (reported): caches, packed operands, masks of lengths, an output that is not written; any other operator of
the domain. Quantized ones (QLinearAdd, MatMulNBits, ...) stay: the targets know them.
Fidelity: ROUNDING.
Reference: ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt import graph as g
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.contrib import activations, attention, normalizations, products
from graphopt.passes.contrib.writing import Site, Unknown, Unwritable, Write
from graphopt.passes.fusion.pattern import Writer
from graphopt.shapes.onnx_inference import infer_shapes

DOMAIN = "com.microsoft"
_WRITERS: Mapping[str, Write] = {
    "Gelu": activations.gelu,
    "BiasGelu": activations.bias_gelu,
    "FastGelu": activations.fast_gelu,
    "QuickGelu": activations.quick_gelu,
    "SkipLayerNormalization": normalizations.skip_layer,
    "SkipSimplifiedLayerNormalization": normalizations.skip_simplified,
    "EmbedLayerNormalization": normalizations.embeddings,
    "FusedMatMul": products.fused_matmul,
    "FusedGemm": products.fused_gemm,
    "FusedConv": products.fused_conv,
    "DynamicQuantizeMatMul": products.dynamic_quantize_matmul,
    "MatMulIntegerToFloat": products.matmul_integer_to_float,
    "Attention": attention.attention,
    "MultiHeadAttention": attention.multi_head,
}
_KNOWN_TO_TARGETS = ("QLinear", "QGemm", "QuantizeLinear", "DequantizeLinear", "MatMulNBits", "QAttention")


class StandardOperators(Pass):
    """Write operators of the domain com.microsoft out in ONNX's own."""

    fidelity = Fidelity.ROUNDING

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """`applied` is the number of nodes that were written out."""
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        if not nodes:
            return PassResult(model, 0)
        applied, skipped = 0, []
        declared = [(v.shape, v.type) for v in model.graph.outputs]
        with g.remembering_names(model.graph), g.collection_paused():
            while nodes:
                infer_shapes(model)
                written, refused = _written(nodes, g.opset_of(model))
                applied += written
                skipped += [Skip(g.label(n), f"{n.op_type}: {why}") for n, why in refused if not _later(why, written)]
                nodes = [node for node, why in refused if _later(why, written)]
        for value, (shape, type_) in zip(model.graph.outputs, declared, strict=True):
            value.shape, value.type = shape, type_
        common.RemoveUnusedNodesPass()(model)  # what was begun, and then refused
        return PassResult(model, applied, tuple(skipped))


def _written(nodes: Sequence[ir.Node], opset: int) -> tuple[int, list[tuple[ir.Node, Unwritable]]]:
    """How many were written out, and the others, with why they were not."""
    written, refused = 0, []
    for node in nodes:
        write = _WRITERS.get(node.op_type)
        if write is None and node.op_type.startswith(_KNOWN_TO_TARGETS):
            continue
        try:
            if write is None:
                raise Unwritable("it is not among those that are written out")
            _replace(node, write, opset)
            written += 1
        except Unwritable as why:
            refused.append((node, why))
    return written, refused


def _later(why: Unwritable, written: int) -> bool:
    """Whether a node is worth another try."""
    return isinstance(why, Unknown) and written > 0


def _replace(node: ir.Node, write: Write, opset: int) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if node.inputs and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT16:
        raise Unwritable("it is in float16, in which steps written out round one by one")
    site = Site(node, Writer(graph, node), opset)
    made = write(site)
    if any(site.wants(index) and (index >= len(made) or made[index] is None) for index in range(len(node.outputs))):
        raise Unwritable("an output that is not written is read")
    for old, new in zip(node.outputs, made, strict=False):
        if new is not None and not g.replace_value(old, new):
            raise AssertionError("a fresh value can always replace another")
    graph.remove(node, safe=True)
