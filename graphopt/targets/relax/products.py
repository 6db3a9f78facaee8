"""Gemm and MatMul."""

from __future__ import annotations

import numpy as np

from graphopt.targets.relax import (
    block_weights,
    computes,
    half,
    integer_layers,
    matmul,
)
from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.form import WHOLE
from graphopt.targets.relax.values import (
    FUSABLE_ROOT,
    Builder,
    Value,
)


@emits("Gemm", "MatMul")
def product(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    data, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    if data is None or weight is None or data.dtype != "float32" or data.shape is None:
        return None
    if weight.const is None:
        done = matmul.product_of_activations(builder, data, weight) if node.op_type == "MatMul" else None
        return None if done is None else [done]
    matrix = weight.const
    if matrix.ndim != 2 or len(data.shape) < 2 or node.get("transA", 0):
        return None
    found = _integer_product(builder, node, data, weight, bias)
    if found is not None:
        return [found]
    if node.op_type == "Gemm":
        if node.get("transB", 0):
            matrix = matrix.T
        matrix = matrix * np.float32(node.get("alpha", 1.0))
    rows = int(np.prod(data.shape[:-1]))
    block = column_block(matrix.shape[1], rows, half.LANES if builder.halves else builder.lanes)
    packed = pack_matrix(matrix, block)
    product = builder.call(
        computes.matmul,
        builder.narrowed(data),
        builder.constant(builder.narrow_constant(packed)),
        columns=matrix.shape[1],
        pattern=FUSABLE_ROOT,
    )
    shape = (*data.shape[:-1], matrix.shape[1])
    beta = float(node.get("beta", 1.0))
    if node.op_type == "Gemm" and bias is not None:
        addend = builder.plain(bias)
        if beta != 1.0:
            addend = builder.emit(relax.op.multiply(addend, relax.const(beta, "float32")))
        product = builder.emit(relax.op.add(product, addend))
    return [Value(shape, "float32", plain=product)]


def _integer_product(builder: Builder, node: Node, data: Value, weight: Value, bias: Value | None) -> Value | None:
    if node.op_type == "MatMul":
        found = block_weights.product(builder, data, weight)
        return integer_layers.product(builder, data, weight, None) if found is None else found
    if node.get("alpha", 1.0) != 1.0 or (bias is not None and bias.const is None):
        return None
    addend = None if bias is None or bias.const is None else bias.const * np.float32(node.get("beta", 1.0))
    return integer_layers.product(builder, data, weight, addend, bool(node.get("transB", 0)))


def column_block(columns: int, rows: int, lanes: int) -> int:
    """How many columns of the weight are packed together: a few vectors, dividing `columns` where possible; all where
    all channels are one block (`lanes` 0)."""
    if not lanes:
        return -(-columns // WHOLE) * WHOLE
    widest = 8 * lanes if rows < 4 else 4 * lanes
    for block in range(widest, lanes - 1, -lanes):
        if columns % block == 0:
            return block
    if columns < lanes:
        return columns if columns in (1, 2, 4, 8) else lanes
    for block in range(widest, lanes - 1, -(lanes // 2)):
        if columns % block == 0:
            return block
    return 2 * lanes if columns > 2 * lanes else lanes


def pack_matrix(matrix: np.ndarray, block: int) -> np.ndarray:
    """(K, N) -> (ceil(N / block), K, block), zeros for padded columns."""
    depth, columns = matrix.shape
    tiles = -(-columns // block)
    padded = np.zeros((depth, tiles * block), np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(depth, tiles, block).transpose(1, 0, 2))
