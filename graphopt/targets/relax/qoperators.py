"""Operators that take scales and zero points as operands, rewritten as DequantizeLinear -> operator -> QuantizeLinear.

ONNX has two ways to write a quantized model. Older tools write *QOperator* models (QLinearConv, QLinearMatMul, and ONNX
Runtime's com.microsoft.QLinearAdd, QGemm, ...); both say the same, so the importer knows only one of them. So it is
with MatMulNBits, whose weights are packed in blocks of 4 bits. The other
operators of com.microsoft that quantizers write for the standard ones (QuantizeLinear, DequantizeLinear) lose their
domain.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.graph import attribute, constant_of, input_of
from graphopt.targets.relax.stand_ins import Writer

MICROSOFT = "com.microsoft"
_STANDARD, _CONTRIB = "", MICROSOFT

Rewrite = Callable[["_Writer", ir.Node], "ir.Value | None"]


def rewrite(model: ir.Model) -> bool:
    """Rewrite every such operator of the main graph, in place. True when there was one."""
    changed = False
    for node in list(model.graph):
        domain = _STANDARD if node.domain == "ai.onnx" else node.domain
        if domain == _CONTRIB and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""
            changed = True
            continue
        rule = _RULES.get((domain, node.op_type))
        if rule is None or (domain == _STANDARD and _has_other_scales(node)):
            continue
        writer = _Writer(node)
        result = rule(writer, node)
        if result is None:
            continue
        writer.replace(node, result)
        changed = True
    return changed


def _has_other_scales(node: ir.Node) -> bool:
    """Whether some scale is not float32: in fewer digits a product rounds otherwise than the operator does."""
    dtypes = {value.dtype for value in node.inputs if value is not None}
    return bool(dtypes & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN})


class _Writer(Writer):
    """Knows the operators between bytes and real numbers."""

    def add(self, op_type: str, inputs: list[ir.Value | None], attributes: dict | None = None) -> ir.Value:
        """Without the last operands where these are None."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return self.emit(op_type, inputs, attributes)

    def real(self, data, scale, zero, axis: int = 1) -> ir.Value:
        """The dequantized form of a value."""
        return self.add("DequantizeLinear", [data, scale, zero], {"axis": axis})

    def stored(self, data, scale, zero) -> ir.Value:
        return self.add("QuantizeLinear", [data, scale, zero])

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.add("Constant", [], {"value": ir.tensor(array)})


def _kept(node: ir.Node, *dropped: str) -> dict:
    return {name: found for name, found in node.attributes.items() if name not in dropped}


def _conv(w: _Writer, node: ir.Node) -> ir.Value | None:
    x, xs, xz, weight, ws, wz, ys, yz = node.inputs[:8]
    bias = _bias(w, input_of(node, 8), xs, ws)
    if bias is False:
        return None
    operands = [w.real(x, xs, xz), w.real(weight, ws, wz, axis=0), bias]
    return w.stored(w.add("Conv", operands, _kept(node)), ys, yz)  # pyright: ignore[reportArgumentType]


def _bias(w: _Writer, bias: ir.Value | None, first: ir.Value | None, second: ir.Value | None):
    """A 32-bit bias as float32; None where there is none, False where its scale is not constant."""
    if bias is None:
        return None
    a, b, integers = constant_of(first), constant_of(second), constant_of(bias)
    if a is None or b is None or integers is None:
        return False
    return w.constant((integers * (a.astype(np.float64).reshape(-1) * b.astype(np.float64).reshape(-1))).astype("f"))


def _matmul(w: _Writer, node: ir.Node) -> ir.Value | None:
    a, a_s, a_z, b, b_s, b_z, ys, yz = node.inputs[:8]
    return w.stored(w.add("MatMul", [w.real(a, a_s, a_z), w.real(b, b_s, b_z, axis=1)]), ys, yz)


def _gemm(w: _Writer, node: ir.Node) -> ir.Value | None:
    a, a_s, a_z, b, b_s, b_z = node.inputs[:6]
    if attribute(node, "alpha", 1.0) != 1.0:
        return None
    bias = _bias(w, input_of(node, 6), a_s, b_s)
    if bias is False:
        return None
    axis = 0 if attribute(node, "transB", 0) else 1
    product = w.add("Gemm", [w.real(a, a_s, a_z), w.real(b, b_s, b_z, axis), bias], _kept(node))  # pyright: ignore
    ys = input_of(node, 7)
    return product if ys is None else w.stored(product, ys, input_of(node, 8))


def _matmul_nbits(w: _Writer, node: ir.Node) -> ir.Value | None:
    """Block-wise weights, packed along K: (N, blocks, bytes), unpacked into DequantizeLinear with a block size."""
    depth, columns = int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 0))
    packed, scales = constant_of(input_of(node, 1)), constant_of(input_of(node, 2))
    points = input_of(node, 3)
    if bits not in (4, 8) or not block or packed is None or scales is None or input_of(node, 4) is not None:
        return None
    blocks = -(-depth // block)
    zero = np.full((columns, blocks), 1 << bits - 1, np.uint8)
    if points is not None:
        stored = constant_of(points)
        if stored is None or stored.dtype != np.uint8:
            return None
        zero = _unpacked(stored.reshape(columns, -1), bits)[:, :blocks]
    integers = _unpacked(packed.reshape(columns, -1), bits)[:, :depth]
    scale = scales.astype(np.float32).reshape(columns, blocks)
    weight = w.add(
        "DequantizeLinear",
        [w.constant(np.ascontiguousarray(x.T)) for x in (integers, scale, zero)],
        {"axis": 0, "block_size": block},
    )
    product = w.add("MatMul", [node.inputs[0], weight])
    bias = input_of(node, 5)
    return product if bias is None else w.add("Add", [product, bias])


def _unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    """(N, bytes) -> (N, integers) uint8, the low half of a byte first."""
    if bits == 8:
        return array
    return np.stack([array & 15, array >> 4], axis=-1).reshape(len(array), -1)


def _binary(op_type: str) -> Rewrite:
    def rule(w: _Writer, node: ir.Node) -> ir.Value | None:
        a, a_s, a_z, b, b_s, b_z, ys = node.inputs[:7]
        return w.stored(w.add(op_type, [w.real(a, a_s, a_z), w.real(b, b_s, b_z)]), ys, input_of(node, 7))

    return rule


def _unary(op_type: str) -> Rewrite:
    def rule(w: _Writer, node: ir.Node) -> ir.Value | None:
        if attribute(node, "channels_last", 0):
            return None
        x, xs, xz, ys = node.inputs[:4]
        done = w.add(op_type, [w.real(x, xs, xz)], _kept(node, "channels_last", "opset"))
        return w.stored(done, ys, input_of(node, 4))

    return rule


def _concat(w: _Writer, node: ir.Node) -> ir.Value | None:
    ys, yz, *parts = node.inputs
    thirds = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    real: list[ir.Value | None] = [w.real(data, scale, zero) for data, scale, zero in thirds]
    return w.stored(w.add("Concat", real, _kept(node)), ys, yz)


_RULES: dict[tuple[str, str], Rewrite] = {
    (_STANDARD, "QLinearConv"): _conv,
    (_STANDARD, "QLinearMatMul"): _matmul,
    (_CONTRIB, "QGemm"): _gemm,
    (_CONTRIB, "MatMulNBits"): _matmul_nbits,
    (_CONTRIB, "QLinearAdd"): _binary("Add"),
    (_CONTRIB, "QLinearMul"): _binary("Mul"),
    (_CONTRIB, "QLinearConcat"): _concat,
    (_CONTRIB, "QLinearSigmoid"): _unary("Sigmoid"),
    (_CONTRIB, "QLinearLeakyRelu"): _unary("LeakyRelu"),
    (_CONTRIB, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool"),
    (_CONTRIB, "QLinearAveragePool"): _unary("AveragePool"),
    (_CONTRIB, "QLinearSoftmax"): _unary("Softmax"),
}
