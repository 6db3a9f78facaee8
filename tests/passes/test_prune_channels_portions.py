"""`prune-channels`: layers solved again on what the layers before them have become."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import graph as g
from graphopt import model as models
from graphopt.calibration.dataset import random_dataset
from graphopt.calibration.observe import watch
from graphopt.passes.base import Context
from graphopt.passes.channels.order import portions, steps
from graphopt.passes.channels.reconstruction import solve
from graphopt.passes.prune_channels import PruneChannels
from graphopt.passes.second_order import DAMPING
from tests.passes.channel_models import networks

LAYERS = 6


def chain(seed: int, channels: int = 12) -> ir.Model:
    """x -> Conv, Relu, six times, with a shortcut around the third -> mean over places -> Gemm."""
    rng = np.random.default_rng(seed)
    nodes, constants, value = [], [], "x"

    def constant(name: str, *shape: int, gain: float = 1.0) -> str:
        array = gain * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    for index in range(LAYERS):
        inputs = 3 if index == 0 else channels
        weights = constant(f"w{index}", channels, inputs, 3, 3, gain=1.4)
        bias = constant(f"b{index}", channels, gain=0.1)
        nodes.append(helper.make_node("Conv", [value, weights, bias], [f"c{index}"], f"conv{index}", pads=[1] * 4))
        summed = f"c{index}"
        if index == 2:
            nodes.append(helper.make_node("Add", [summed, value], ["a"], "add"))
            summed = "a"
        nodes.append(helper.make_node("Relu", [summed], [f"r{index}"], f"relu{index}"))
        value = f"r{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["p"], "pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["f", constant("w", 10, channels)], ["y"], "last", transB=1))
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 10])]
    made = helper.make_model(
        helper.make_graph(nodes, "chain", infos, outputs, constants),
        opset_imports=[helper.make_opsetid("", 13)], ir_version=8,
    )  # fmt: skip
    return ir.from_proto(made)


def prune(portions: int, **options) -> PruneChannels:
    return PruneChannels(ratio=0.3, round_to="1", portions=portions, **options)


def outputs(model: ir.Model, data) -> np.ndarray:
    return np.concatenate([values["y"] for values in watch(model, ["y"], data, label="run")])


def test_later_layers_make_up_for_earlier_ones():
    """Over several networks, the outputs' total error on the calibration data falls with the number of portions."""
    errors = {1: 0.0, 3: 0.0, LAYERS + 1: 0.0}
    for seed in range(6):
        source = chain(seed)
        data = random_dataset(models.signature(source), 64, seed)
        wanted = outputs(source, data)
        for count in errors:
            pruned = prune(count).run(source.clone(), Context(data=data)).model
            gone = np.square(outputs(pruned, data) - wanted).sum()
            errors[count] += float(gone / np.square(wanted - wanted.mean(axis=0)).sum())
    assert errors[LAYERS + 1] < errors[3] < errors[1]


def test_the_same_twice_and_excluded_layers_keep_their_weights():
    source = chain(1)
    data = random_dataset(models.signature(source), 16, 2)
    first, again = (prune(4, exclude=("conv3",)).run(source.clone(), Context(data=data)).model for _ in range(2))
    assert models.to_bytes(first) == models.to_bytes(again)
    kept, before = (next(n for n in m.graph if n.name == "conv3") for m in (first, source))
    np.testing.assert_array_equal(g.constant_of(kept.inputs[1]), g.constant_of(before.inputs[1]))
    np.testing.assert_array_equal(g.constant_of(kept.inputs[2]), g.constant_of(before.inputs[2]))


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(1, 6))
def test_layers_of_a_step_do_not_depend_on_each_other(proto, count):
    plan, _ = PruneChannels(ratio=0.5, importance="norm", round_to="1", min_channels=1).plan(
        ir.from_proto(proto), Context()
    )
    ordered = steps(plan, ())
    done: set[ir.Node] = set()
    for step in ordered:
        nodes = {site.node for site in step}
        assert not any((nodes | done) & before(site.node) - done for site in step)
        done |= nodes
    losing = {site.node for site in plan.channels.reads if not plan.kept(site.labels).all()}
    assert losing <= done
    split = portions(ordered, count)
    assert len(split) == min(count, len(ordered))
    assert [s for first, rest in split for s in (*first, *rest)] == [s for step in ordered for s in step]


def before(node: ir.Node) -> set[ir.Node]:
    """All nodes that this one's inputs are computed by."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker not in found:
                found.add(maker)
                waiting.append(maker)
    return found


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 8), st.integers(0, 2**32 - 1), st.booleans())
def test_least_squares_on_changed_inputs(groups, out, taps, seed, has_bias):
    """`solve` against numpy's least squares on samples of both inputs, the damping written as more samples."""
    rng = np.random.default_rng(seed)
    rows = 3 * taps
    x = rng.standard_normal((groups, rows, taps)) @ rng.standard_normal((taps, taps)) + rng.standard_normal(taps)
    z = x + rng.standard_normal(x.shape) + rng.standard_normal(taps)
    weights = rng.standard_normal((groups, out, taps))
    keep = rng.random(taps) < 0.6
    keep[rng.integers(taps)] = True
    first_mean, mean = x.mean(axis=1), z.mean(axis=1)
    if has_bias:
        x, z = x - first_mean[:, None], z - mean[:, None]
    centred_x, centred_z = (each - each.mean(axis=1, keepdims=True) for each in (x, z))
    covariance = centred_z.transpose(0, 2, 1) @ centred_z / rows
    crossed = centred_x.transpose(0, 2, 1) @ centred_z / rows
    new = solve(weights, mean, covariance, keep, has_bias=has_bias, first_mean=first_mean, crossed=crossed)
    assert not new[:, :, ~keep].any()
    for group in range(groups):
        second = z[group].T @ z[group] / rows
        damping = np.sqrt(DAMPING * np.trace(second) / taps * rows) * np.eye(taps)[:, keep]
        left = np.concatenate([z[group][:, keep], damping])
        right = np.concatenate([x[group] @ weights[group].T, damping @ weights[group][:, keep].T])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(new[group][:, keep], wanted, rtol=1e-6, atol=1e-8 * np.abs(weights).max() * taps)
