"""Products of many rows stay in blocks from one to the next; whoever needs ONNX's layout gets it."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.targets.relax import pipeline
from tests.targets.integer_models import integer_weight, quantized
from tests.targets.oracle import TARGET, compiled, model, node, reference

CASES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEP = 0.03
"""The quantum between the two products."""


def mlp(
    seed: int, lead: tuple[int, ...], sizes: tuple[int, int, int], activation: str, tail: str
) -> tuple[ir.Model, dict[str, np.ndarray], float]:
    """x -> Q/DQ -> MatMul -> Add -> activation -> Q/DQ -> MatMul -> `tail`; and the largest weight of the second."""
    rng = np.random.default_rng(seed)
    depth, inner, out = sizes
    x = rng.uniform(-2, 2, (*lead, depth)).astype(np.float32)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"b": rng.uniform(-1, 1, inner).astype(np.float32),
                                        "g": rng.uniform(-1, 1, out).astype(np.float32),
                                        "half": np.asarray(0.5, np.float32), "one": np.asarray(1, np.float32),
                                        "root": np.asarray(2**0.5, np.float32),
                                        "six": np.asarray(6, np.float32)}  # fmt: skip

    def pair(name, scale, zero):
        made, held = quantized(name, scale, zero)
        nodes.extend(made)
        constants.update(held)
        return name + "d"

    def layer(data, name, shape, to):
        weight = rng.uniform(-1, 1, shape).astype(np.float32) / math.sqrt(shape[0])
        made, held = integer_weight(name, weight, 1)
        nodes.extend([made, node("MatMul", [data, name + "d"], [to])])
        constants.update(held)
        return float(np.abs(weight).max())

    layer(pair("x", 4 / 255, 128), "w1", (depth, inner), "m1")
    nodes.append(node("Add", ["b", "m1"] if seed % 2 else ["m1", "b"], ["h"]))
    if activation == "Gelu":
        nodes += [node("Div", ["h", "root"], ["e0"]), node("Erf", ["e0"], ["e1"]), node("Add", ["e1", "one"], ["e2"]),
                  node("Mul", ["h", "e2"], ["e3"]), node("Mul", ["e3", "half"], ["a"])]  # fmt: skip
    elif activation == "Swish":
        nodes += [node("Sigmoid", ["h"], ["e0"]), node("Mul", ["h", "e0"], ["a"])]
    else:
        nodes.append(node(activation, ["h"], ["a"]))
    largest = layer(pair("a", STEP, 40), "w2", (inner, out), "m2")
    if tail == "picture":
        nodes += [node("Mul", ["g", "m2"], ["t0"]), node("Transpose", ["t0"], ["t1"], perm=[0, 3, 1, 2]),
                  node("Relu", ["t1"], ["y"])]  # fmt: skip
    elif tail == "two readers":
        nodes += [node("Relu", ["m2"], ["t0"]), node("ReduceSum", ["m2"], ["t1"], keepdims=1),
                  node("Div", ["t1", "six"], ["t2"]), node("Add", ["t0", "t2"], ["y"])]  # fmt: skip
    elif tail == "heads":
        constants["shape"] = np.array([*lead[:-1], lead[-1] * 2, out // 2])
        nodes += [node("Reshape", ["m2", "shape"], ["t0"]), node("Sigmoid", ["t0"], ["y"])]
    elif tail == "counted otherwise":
        constants["shape"] = np.array([-1, out])
        nodes += [node("Reshape", ["m2", "shape"], ["t0"]), node("Sigmoid", ["t0"], ["y"])]
    elif tail == "second layer's bytes":
        nodes += [node("QuantizeLinear", ["m2", "a_s", "a_z"], ["y"])]
    return model(nodes, {"x": x}, ["y" if tail != "nothing" else "m2"], constants), {"x": x}, largest


@CASES
@given(
    seed=st.integers(0, 999),
    lead=st.sampled_from([(2,), (17,), (1, 5), (2, 3), (1, 3, 4)]),
    sizes=st.sampled_from([(8, 16, 16), (13, 40, 22), (64, 64, 70), (20, 7, 4)]),
    activation=st.sampled_from(["Gelu", "Swish", "Relu", "Tanh"]),
    tail=st.sampled_from(["nothing", "picture", "two readers", "heads", "counted otherwise", "second layer's bytes"]),
)
def test_two_products_in_a_row(seed, lead, sizes, activation, tail):
    if tail == "picture" and len(lead) != 3:
        lead = (1, 4, 3)
    made, feeds, largest = mlp(seed, lead, sizes, activation, tail)
    (wanted,), (found,) = reference(made, feeds).values(), compiled(made, feeds).values()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if found.dtype == np.uint8:
        assert np.abs(found.astype(int) - wanted).max() <= 1 + math.ceil(largest)
        return
    # Between the products a number at a tie may be rounded to either quantum: one or two of them in a row of 64.
    flips = 2 * STEP * largest * (sizes[2] / 6 + 1 if tail == "two readers" else 1)
    assert np.abs(found - wanted).max() <= flips + 1e-5 * np.abs(wanted).max()
    assert np.median(np.abs(found - wanted)) <= 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("activation", ["Gelu", "Swish", "Relu"])
def test_nothing_moves_between_two_products(activation):
    made, _, _ = mlp(0, (1, 6, 6), (64, 64, 64), activation, "picture")
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("conv2d" in name for name in names) == 2, names
    assert not any("unblock_rows" in name for name in names), names
    assert len(names) <= 4, names  # the input's bytes, two products, the picture in ONNX's layout
