"""The layout of weights in ONNX Runtime's MatMulNBits: (N, blocks, block / 2) bytes, the low half of a byte first.

Integers are unsigned; without zero points 8 is subtracted. A last block that is not full is filled with the zero point.
Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

import numpy as np


def pack_weights(integers: np.ndarray, zeros: np.ndarray, block: int) -> np.ndarray:
    """uint8 (N, blocks, block / 2) of `integers` (N, K) from 0 to 15; `zeros` (N, blocks) likewise."""
    rows, depth = integers.shape
    blocks = zeros.shape[1]
    full = np.repeat(zeros, block, axis=1).astype(np.uint8)
    full[:, :depth] = integers
    return _pairs(full).reshape(rows, blocks, block // 2)


def pack_zeros(zeros: np.ndarray) -> np.ndarray:
    """uint8 (N, ceil(blocks / 2)) of `zeros` (N, blocks) from 0 to 15."""
    return _pairs(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))).astype(np.uint8))


def _pairs(array: np.ndarray) -> np.ndarray:
    return array[:, ::2] | array[:, 1::2] << 4
