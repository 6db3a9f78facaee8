"""Which kernel computes which layer, and how long it takes: what the compiler lists is what runs."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.runtime.kernel_times import WatchedEngine, kernel_times
from graphopt.targets.cpu import Cpu
from tests.targets.integer_models import network
from tests.targets.oracle import TARGET, model, node

LAYERS = {"c1", "c2", "c3", "y"}
"""Outputs of the layers of `network`; its nodes have no names, so they are called after them."""


def float_network() -> tuple:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 8, 8)).astype(np.float32)
    weights = {name: rng.standard_normal((16, 16, 3, 3)).astype(np.float32) for name in ("u", "v")}
    weights["w"] = rng.standard_normal((16, 5)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "u"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "v"], ["c2"], pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["a"]),
        node("GlobalAveragePool", ["a"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], weights), {"x": x}, {"c1", "c2", "y"}


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_every_layer_has_one_kernel_and_it_is_timed(tmp_path, kind):
    made, feeds, layers = float_network() if kind == "float32" else (*network(1, np.uint8, 0, "Relu"), LAYERS)
    lowered = TARGET.lower(made)
    found = [layer.rpartition("_")[2] for _, layer in lowered.layers if layer]
    assert sorted(name for name in found if name in layers) == sorted(layers), lowered.layers
    TARGET.build(lowered, tmp_path)
    ran = [kernel for kernel, _ in WatchedEngine(tmp_path, 1).calls(feeds)]
    listed = [kernel for kernel, layer in lowered.layers if layer]
    of_layers = [kernel for kernel in ran if kernel in listed]  # the first run of an engine calls everything twice
    assert of_layers == 2 * listed
    assert set(ran) <= {kernel for kernel, _ in lowered.layers}
    times = kernel_times({"it": tmp_path}, feeds, 1, 0.05)["it"]
    assert {t.layer for t in times if t.layer} == {layer for _, layer in lowered.layers if layer}
    assert all(t.seconds > 0 for t in times)


def test_bfloat16_kernels_have_layers_too():
    made, _, layers = float_network()
    found = Cpu(mcpu="cooperlake", threads=1, precision="bfloat16").lower(made).layers
    assert layers <= {layer.rpartition("_")[2] for _, layer in found}
