"""FusedMatMul, FusedGemm, FusedConv, and products of bytes that end in float: DynamicQuantizeMatMul,
MatMulIntegerToFloat."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.contrib.activations import activation
from graphopt.passes.contrib.writing import Site, Unwritable


def fused_matmul(site: Site) -> list[ir.Value | None]:
    if g.attribute(site.node, "transBatchA", 0) or g.attribute(site.node, "transBatchB", 0):
        raise Unwritable("it transposes batches")
    operands = []
    for index, name in enumerate(("transA", "transB")):
        value = site.needed(index)
        if g.attribute(site.node, name, 0):
            rank = site.rank(value)
            if rank < 2:
                raise Unwritable("it transposes a vector")
            value = site.call("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        operands.append(value)
    product = site.call("MatMul", *operands)
    alpha = float(g.attribute(site.node, "alpha", 1.0))
    return [product if alpha == 1 else site.call("Mul", product, alpha)]


def fused_gemm(site: Site) -> list[ir.Value | None]:
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    numbers = [float(g.attribute(site.node, name, 0.0)) for name in names if name in site.node.attributes]
    kept = {
        name: g.attribute(site.node, name, default)
        for name, default in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
    }
    whole = site.writer.node("Gemm", [v for v in site.node.inputs if v is not None], kept)
    return [activation(site, whole, str(g.attribute(site.node, "activation", "")), numbers)]


def fused_conv(site: Site) -> list[ir.Value | None]:
    kept = {n: a.value for n, a in site.node.attributes.items() if not n.startswith("activation")}
    added = site.input(3)
    inputs = [site.needed(0), site.needed(1), site.input(2)]
    whole = site.writer.node("Conv", inputs if inputs[2] is not None else inputs[:2], kept)
    if added is not None:
        whole = site.call("Add", whole, added)
    numbers = list(g.attribute(site.node, "activation_params", ()))
    return [activation(site, whole, str(g.attribute(site.node, "activation", "")), numbers)]


def dynamic_quantize_matmul(site: Site) -> list[ir.Value | None]:
    """A is quantized as a whole, B is bytes with a scale, and perhaps a zero point, or one of each a column."""
    made = ir.node(
        "DynamicQuantizeLinear",
        [site.needed(0)],
        num_outputs=3,
        name=g.fresh_name(site.writer.graph, f"{site.writer.label}/DynamicQuantizeLinear"),
    )
    site.writer.graph.insert_before(site.node, made)
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for value, what, kind in zip(made.outputs, ("bytes", "scale", "zero_point"), kinds, strict=True):
        value.name = g.fresh_name(site.writer.graph, f"{site.writer.label}_{what}")
        value.type = ir.TensorType(kind)
    quantized, scale, zero = made.outputs
    return [_in_float(site, [quantized, site.needed(1), zero, site.input(3)], [scale, site.needed(2)], site.input(4))]


def matmul_integer_to_float(site: Site) -> list[ir.Value | None]:
    operands = [site.needed(0), site.needed(1), site.input(4), site.input(5)]
    return [_in_float(site, operands, [site.needed(2), site.needed(3)], site.input(6))]


def _in_float(site: Site, operands: list[ir.Value | None], scales: list[ir.Value], bias: ir.Value | None) -> ir.Value:
    while operands[-1] is None:
        operands.pop()
    sums = site.writer.node("MatMulInteger", operands)
    sums.type = ir.TensorType(ir.DataType.INT32)
    whole = site.call("Mul", site.cast(sums, ir.DataType.FLOAT), site.call("Mul", *scales))
    return whole if bias is None else site.call("Add", whole, bias)
