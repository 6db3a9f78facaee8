"""Indices that depend on data stay inside of what they index: nothing else is read or written, whatever a caller feeds.

TVM's kernels trust indices, and one that is out of range reads or writes other memory. ONNX Runtime refuses such a run;
a compiled kernel has no way to, so an index beyond either end is taken for the nearest that there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

INDEXED = frozenset({"Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND"})
"""Operators whose second input are indices into the first."""


def extents(op_type: str, shape: Sequence[int], indices: Sequence[int], axis: int, batch: int) -> np.ndarray:
    """What each index has to be below, as an array that broadcasts to the indices. `axis` and `batch` (batch_dims) are
    the operator's attributes."""
    if op_type.endswith("ND"):
        return np.asarray(shape[batch : batch + indices[-1]])
    return np.asarray(shape[axis % len(shape)])


def within(indices: np.ndarray, bounds: np.ndarray) -> bool:
    """Whether constant indices, which count from the end where they are negative, are all in range."""
    return bool(((indices >= -bounds) & (indices < bounds)).all())


def clipped(builder: Any, indices: Any, bounds: np.ndarray, dtype: str) -> Any:
    """Relax indices, each moved to the nearest that is in range."""
    from tvm import relax

    def constant(array: np.ndarray) -> Any:
        return relax.const(array.astype(dtype), dtype)

    least = builder.emit(relax.op.maximum(indices, constant(-bounds)))
    return builder.emit(relax.op.minimum(least, constant(bounds - 1)))


def safe_take(made: Any) -> Any:
    """TVM's `take` in the mode that clips, whose kernels say nothing about segmentation faults."""
    import tvm
    from tvm import relax

    if isinstance(made, relax.Call) and made.op == tvm.ir.Op.get("relax.take"):
        attributes: Any = made.attrs
        return relax.op.take(made.args[0], made.args[1], attributes.axis, mode="clip")
    return made
