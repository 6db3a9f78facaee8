"""refit-layers reckons with the rounding of inputs to 8 bits: what it gains is still there behind that."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.low_rank import array_of, build, nodes, random_data
from tests.passes.refitting import refit

TEXT = "(float[N,2] x) => (float[N,1] y) { h = MatMul(x, w1) y = MatMul(h, w2) }"


def model_of(w1: np.ndarray, w2: np.ndarray):
    made = build(TEXT, w1=(2, 2), w2=(2, 1))
    for name, array in (("w1", w1), ("w2", w2)):
        made.graph.initializers[name].const_value = ir.Tensor(array.astype(np.float32), name=name)
    return made


@given(seed=st.integers(0, 2**30), scale=st.floats(0.1, 10.0))
@settings(max_examples=10)
def test_weights_are_those_of_least_error_with_rounded_inputs(seed, scale):
    """V = (E y h') (E h h' + s I)^-1: the ridge that the data asks for is small beside many samples without noise."""
    rng = np.random.default_rng(seed)
    original = model_of(rng.standard_normal((2, 2)), rng.standard_normal((2, 1)))
    damaged = model_of(scale * rng.standard_normal((2, 2)), array_of(original.graph.initializers["w2"]))
    data = random_data(original, 800, seed)
    x = np.concatenate([feeds["x"] for feeds in data.batches(64)]).astype(np.float64)
    y = x @ array_of(original.graph.initializers["w1"]) @ array_of(original.graph.initializers["w2"])
    h = x @ array_of(damaged.graph.initializers["w1"])
    s = ((max(h.max(), 0) - min(h.min(), 0)) / 255) ** 2 / 12
    wanted = np.linalg.solve(h.T @ h / len(h) + s * np.eye(2), h.T @ y / len(h))
    got = array_of(nodes(refit(damaged, original, data, exclude=("matmul_0",)).model)["matmul_1"].inputs[1])

    def loss(weights: np.ndarray) -> float:
        return float(np.square(h @ weights - y).mean() + s * np.square(weights).sum())

    plain = loss(array_of(damaged.graph.initializers["w2"]))
    assert loss(got) - loss(wanted) <= 1e-2 * (plain - loss(wanted)) + 1e-6 * float(np.square(y).mean())
