"""Element types that ONNX Runtime computes with and its Python interface cannot pass as arrays: bfloat16, float8, and
what is narrower
than a byte, which it stores packed, the lowest bits first."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx

_BITS = {
    "BFLOAT16": 16, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8,
    "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2,
}  # fmt: skip
_TYPES = {
    getattr(onnx.TensorProto, name): (onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name)), bits)
    for name, bits in _BITS.items()
    if hasattr(onnx.TensorProto, name)
}
"""By ONNX's number of the type: numpy's dtype, as `ml_dtypes` has it, and the bits of an element."""
NAMES = frozenset(f"tensor({name.lower()})" for name in _BITS)
"""As ONNX Runtime writes them."""


def value_of(array: np.ndarray) -> Any:
    """An `OrtValue` with a copy of the array, of any element type but strings."""
    import onnxruntime

    kind = next((number for number, (dtype, _) in _TYPES.items() if dtype == array.dtype), None)
    if kind is None:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = _TYPES[kind][1]
    stored = np.ascontiguousarray(array).view(np.uint16 if bits == 16 else np.uint8).reshape(-1)
    if bits < 8:
        each = 8 // bits
        rows = np.append(stored & (1 << bits) - 1, np.zeros(-array.size % each, np.uint8)).reshape(-1, each)
        stored = np.bitwise_or.reduce(rows << np.arange(each, dtype=np.uint8) * bits, axis=1).astype(np.uint8)
    value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), kind)
    if array.size:
        ctypes.memmove(value.data_ptr(), stored.ctypes.data, stored.nbytes)
    return value


def array_of(value: Any) -> Any:
    """What an `OrtValue` holds, as an array of its own; sequences as lists of these."""
    if not value.is_tensor():
        return value.numpy()
    kind = value.element_type()
    if kind not in _TYPES:
        return value.numpy()
    dtype, bits = _TYPES[kind]
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64))
    if not size:
        return np.zeros(shape, dtype)
    stored = np.frombuffer(ctypes.string_at(value.data_ptr(), -(-size * bits // 8)), np.uint8)
    if bits < 8:
        places = np.arange(8 // bits, dtype=np.uint8) * bits
        stored = (stored[:, None] >> places & (1 << bits) - 1).astype(np.uint8).reshape(-1)[:size]
        if np.dtype(dtype).kind != "f" and kind in (onnx.TensorProto.INT4, getattr(onnx.TensorProto, "INT2", -1)):
            signed = stored.astype(np.int8)
            return (signed - ((signed >> bits - 1) << bits)).astype(dtype).reshape(shape)
        if kind != onnx.TensorProto.FLOAT4E2M1:
            return stored.astype(dtype).reshape(shape)
    return stored.view(dtype).reshape(shape).copy()
