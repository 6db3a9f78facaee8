"""Winograd convolution against sums in float64, over shapes, pads, channel counts and everything that may follow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import winograd
from graphopt.targets.schedules.winograd_transforms import (
    data_transform,
    result_transform,
    transformed_weight,
    two_dimensional,
)
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import EPSILON, TARGET, compiled, model, node, uniform

pytestmark = pytest.mark.skipif(
    not TARGET.machine().features & {"fma", "asimd"}, reason="Winograd code needs fused multiply-add instructions"
)


def convolution(x: np.ndarray, w: np.ndarray, pads: tuple[int, int, int, int]) -> np.ndarray:
    """The plain definition, in float64."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("ncyxij,kcij->nkyx", windows, w.astype(np.float64), optimize=True)


def tolerance(x: np.ndarray, w: np.ndarray, tile: int) -> float:
    """Eight standard deviations of a direct sum's error, times the factor that the template declares.

    A running sum of K products of root mean square s grows to sqrt(K) s; each of its K roundings is at most EPSILON / 2
    of it, and they add as a random walk: sqrt(K) roundings of sqrt(K) s EPSILON / 2.
    """
    terms = 9 * w.shape[1]
    product = float(np.sqrt(np.mean(np.square(x)) * np.mean(np.square(w))))
    return 8 * terms * product * EPSILON / 2 * winograd.error_factor({"tile": tile})


def decisions_for(made: Any, target: Cpu, pick: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """A Winograd decision for every convolution that takes one, chosen by `pick`."""
    found = {}
    for name, func in pipeline.prim_funcs(target.lower(made).module).items():
        workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
        space = winograd.match(workload)
        if space is not None:
            found[name] = (winograd.NAME, pick(space))
    return found


@pytest.mark.parametrize("tile", [2, 4])
def test_transforms_compute_a_correlation(tile):
    rng = np.random.default_rng(tile)
    d, g = rng.standard_normal((tile + 2, tile + 2)), rng.standard_normal((3, 3))
    weight = transformed_weight(g.reshape(1, 1, 3, 3, 1, 1), tile)[:, :, 0, 0, 0, 0]
    spectrum = np.array(two_dimensional(data_transform(tile), list(d)))
    found = np.array(two_dimensional(result_transform(tile), list(weight * spectrum)))
    wanted = np.array([[np.sum(d[i : i + 3, j : j + 3] * g) for j in range(tile)] for i in range(tile)])
    np.testing.assert_allclose(found, wanted, atol=64 * EPSILON * np.abs(d).max() * np.abs(g).sum())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([8, 16, 19, 32, 58]),
    outs=st.sampled_from([8, 16, 20, 33, 64]),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    after=st.sampled_from(["nothing", "bias", "relu", "residual", "sigmoid"]),
    tile=st.sampled_from([2, 4]),
    chunk=st.integers(1, 40),
    rows=st.integers(1, 9),
    order=st.sampled_from(["points", "outs"]),
    prefetch=st.integers(0, 1),
)
def test_agrees_with_the_definition(batch, channels, outs, size, pads, after, tile, chunk, rows, order, prefetch):
    x = uniform(1, batch, channels, *size)
    w = uniform(2, outs, channels, 3, 3)
    wanted = convolution(x, w, pads)
    constants = {"w": w}
    feeds = {"x": x}
    nodes = [node("Conv", ["x", "w"], ["y"], pads=pads)]
    if after != "nothing":
        constants["b"] = uniform(3, outs)
        wanted = wanted + constants["b"].reshape(1, -1, 1, 1)
        nodes = [node("Conv", ["x", "w", "b"], ["c"], pads=pads)]
        follows = {"bias": "Identity", "relu": "Relu", "sigmoid": "Sigmoid", "residual": "Add"}[after]
        operands = ["c"]
        if after == "residual":
            feeds["r"] = uniform(5, *wanted.shape)
            operands.append("r")
            wanted = wanted + feeds["r"]
        nodes.append(node(follows, operands, ["y"]))
    if after == "relu":
        wanted = np.maximum(wanted, 0)
    if after == "sigmoid":  # its slope is at most 1/4, and 1 is the size of the result
        wanted = 1 / (1 + np.exp(-wanted))
    made = model(nodes, feeds, ["y"], constants)

    def pick(space):
        return {**space[0], "tile": tile, "chunk": chunk, "rows": rows, "order": order, "prefetch": prefetch}

    chosen = decisions_for(made, TARGET, pick)
    assert chosen, "the template takes every 3x3 convolution of blocked channels"
    found = compiled(made, feeds, decisions=chosen)["y"]
    worst = np.abs(found - wanted).max()
    allowed = tolerance(x, w, tile) + 4 * EPSILON * np.abs(wanted).max()
    assert worst <= allowed, f"{worst:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (28, 28)])
def test_two_threads_compute_what_one_does(size):
    x, w = uniform(1, 2, 32, *size), uniform(2, 64, 32, 3, 3)
    made = model([node("Conv", ["x", "w"], ["y"], pads=(1, 1, 1, 1))], {"x": x}, ["y"], {"w": w})
    found = []
    for index in range(3):
        chosen = decisions_for(made, Cpu(threads=2), lambda space, i=index: space[i % len(space)])
        assert chosen
        found.append(compiled(made, {"x": x}, Cpu(threads=2), chosen)["y"])
    wanted = convolution(x, w, (1, 1, 1, 1))
    assert all(np.abs(y - wanted).max() <= tolerance(x, w, 4) + 4 * EPSILON * np.abs(wanted).max() for y in found)


@pytest.mark.parametrize(
    "attributes",
    [{"strides": (2, 2)}, {"dilations": (2, 2)}, {"group": 2}, {"kernel_shape": (1, 3)}],
    ids=["strided", "dilated", "grouped", "one-dimensional"],
)
def test_other_convolutions_do_not_match(attributes):
    kernel = attributes.get("kernel_shape", (3, 3))
    x, w = uniform(1, 1, 32, 12, 12), uniform(2, 32, 32 // attributes.get("group", 1), *kernel)
    made = model([node("Conv", ["x", "w"], ["y"], **attributes)], {"x": x}, ["y"], {"w": w})
    assert not decisions_for(made, TARGET, lambda space: space[0])


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_the_declared_error_factor_holds(tile, channels):
    """Root mean square error against float64, over that of a direct float32 sum of the same products."""
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((1, channels, 16, 16)).astype(np.float32)
    w = rng.standard_normal((32, channels, 3, 3)).astype(np.float32)
    made = model([node("Conv", ["x", "w"], ["y"])], {"x": x}, ["y"], {"w": w})
    wanted = convolution(x, w, (0, 0, 0, 0))
    chosen = decisions_for(made, TARGET, lambda space: next(d for d in space if d["tile"] == tile))
    error = np.sqrt(np.mean(np.square(compiled(made, {"x": x}, decisions=chosen)["y"] - wanted)))
    without = {name: ("conv2d_blocked", first_direct(made, name)) for name in chosen}
    direct = np.sqrt(np.mean(np.square(compiled(made, {"x": x}, decisions=without)["y"] - wanted)))
    assert error <= winograd.error_factor({"tile": tile}) * direct, error / direct


def first_direct(made: Any, name: str) -> dict[str, Any]:
    from graphopt.targets.schedules import conv2d_blocked

    func = pipeline.prim_funcs(TARGET.lower(made).module)[name]
    space = conv2d_blocked.match(Workload(func.with_attr("global_symbol", "main"), TARGET.machine()))
    assert space is not None
    return space[0]
