"""Inputs for timing: seeded noise in the shapes and dtypes that a model wants."""

from __future__ import annotations

import math

import numpy as np

from graphopt.errors import ModelError
from graphopt.model import Signature, TensorSpec


def random_feeds(signature: Signature, seed: int = 0, batch: int = 1) -> dict[str, np.ndarray]:
    """One array per input: standard normal floats, integers and booleans from {0, 1}.

    A dynamic axis 0 becomes `batch`, and so does every other axis of the same name. The same arguments give the
    same arrays. Latency seldom depends on values, but denormals and NaN would change it: noise has neither.

    Raises ModelError for any other dynamic dimension, for sizes that memory does not hold, and for dtypes that have no
    noise (strings, complex).
    """
    rng = np.random.default_rng(seed)
    batch_names = {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}
    feeds = {}
    for spec in signature.inputs:
        shape = tuple(_size(spec, axis, batch, batch_names) for axis in range(len(spec.shape)))
        _check_size(spec, shape)
        feeds[spec.name] = _noise(spec, shape, rng)
    return feeds


def _size(spec: TensorSpec, axis: int, batch: int, batch_names: set[str]) -> int:
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    if axis == 0 or size in batch_names:
        return batch
    dims = ",".join(str(d) if isinstance(d, int) else "?" for d in spec.shape)
    raise ModelError(
        f"input {spec.name!r} has a dynamic dimension at axis {axis} ({spec})",
        hint=f"give its size with --input '{spec.name}:{dims}', numbers in place of ?",
    )


def _check_size(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """A shape is a claim of the file; memory is not taken on its word."""
    if any(d < 0 for d in shape):
        raise ModelError(f"input {spec.name!r} has a negative dimension ({spec})")
    import psutil

    needed, available = 8 * math.prod(shape), psutil.virtual_memory().available  # noise is made in float64
    if needed > available:
        raise ModelError(
            f"input {spec.name!r} ({spec}) takes {needed >> 20} MB, {available >> 20} MB are free",
            hint="give a smaller size with --input, where the model's is dynamic",
        )


def _noise(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    dtype = spec.dtype
    if dtype.kind == "f" or "float" in dtype.name:  # bfloat16 and the 8-bit floats have kind V
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if dtype.kind in "iub" or "int" in dtype.name:
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    raise ModelError(f"input {spec.name!r} is {dtype}: only numbers and booleans can be made up", hint="give data")
