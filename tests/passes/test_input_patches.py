"""What a convolution's weights multiply: gathered for a few positions, against windows taken one by one."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.graph import attribute
from graphopt.passes.quantization.moments import POSITIONS, patches
from graphopt.passes.quantization.placement import place
from tests.passes import oracle
from tests.passes.low_rank import array_of
from tests.passes.test_low_rank_split import convolutions


@given(convolutions(axes=1) | convolutions() | convolutions(axes=3), st.integers(1, 3), st.integers(0, 2**30))
@settings(max_examples=60)
def test_rows_times_weights_are_the_outputs_at_the_drawn_positions(model, batch, seed):
    (layer,) = place(model.graph).layers
    shape = tuple(d if isinstance(d, int) else batch for d in model.graph.inputs[0].shape)
    x = oracle.random_feeds(model, {"x": shape}, seed)["x"]
    rows = patches(layer, x, np.random.default_rng(seed))
    (y,) = oracle.run(model, {"x": x})
    weights, groups = array_of(layer.node.inputs[1]), attribute(layer.node, "group", 1)
    places = math.prod(y.shape[2:])
    count = min(POSITIONS, places)
    assert rows.shape == (groups, batch * count, weights[0].size)
    made = np.einsum("grt,got->rgo", rows.astype(np.float64), weights.reshape(groups, -1, weights[0].size))
    made = made.reshape(batch, count, -1)
    if len(layer.node.inputs) > 2:
        made = made + array_of(layer.node.inputs[2])
    rng = np.random.default_rng(seed)
    # A sum of n terms of at most t, and the bias, is off by n u (n t + |b|) at most.
    taps, most = weights[0].size, np.abs(weights).max() * np.abs(x).max()
    bound = taps * np.finfo(np.float32).eps * (taps * most + np.abs(y).max())
    flat = y.reshape(*y.shape[:2], -1)
    for sample in range(batch):
        drawn = rng.choice(places, count, replace=False)
        np.testing.assert_allclose(made[sample], flat[sample][:, drawn].T, rtol=0, atol=bound)
