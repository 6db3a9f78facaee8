"""Small models compiled in bfloat16 against ONNX Runtime on operands that bfloat16 holds exactly.

So the only differences are float32 summation and one rounding to bfloat16 for each value that is stored: 2^-8 relative.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from tests.targets import oracle

UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
TARGET = Cpu(threads=1, precision="bfloat16")
pytestmark = pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & capabilities.host_features(), reason="this processor has no bfloat16 instructions"
)


def exact(shape, seed: int, scale: float = 1.0) -> np.ndarray:
    """Random float32 numbers that bfloat16 holds."""
    numbers = np.random.default_rng(seed).standard_normal(shape) * scale
    return numbers.astype(ml_dtypes.bfloat16).astype(np.float32)


def check(made, feeds, magnitude: float, roundings: float = 1.0) -> None:
    """Each output is within `roundings` roundings of its own size, and of float32 sums of terms up to `magnitude`."""
    wanted, found = oracle.reference(made, feeds), oracle.compiled(made, feeds, TARGET)
    for name, want in wanted.items():
        assert found[name].dtype == want.dtype and found[name].shape == want.shape
        slack = roundings * UNIT * np.abs(want) + 64 * oracle.EPSILON * magnitude
        excess = np.abs(found[name] - want) - slack
        assert (excess <= 0).all(), f"{name}: {excess.max():.3g} beyond {slack.max():.3g}"


def stored_types(made) -> dict[str, str]:
    """The element type of each kernel's result, by kernel."""
    funcs = pipeline.prim_funcs(TARGET.lower(made).module)
    return {name: str(func.params[-1].ty.dtype) for name, func in funcs.items()}


def conv_model(data, weight, bias, tail: str, **attributes):
    nodes = [oracle.node("Conv", ["x", "w", "b"], ["c"], **attributes)]
    constants = {"w": weight, "b": bias}
    feeds = {"x": data}
    if tail == "relu":
        nodes.append(oracle.node("Relu", ["c"], ["y"]))
    elif tail == "silu":
        nodes += [oracle.node("Sigmoid", ["c"], ["s"]), oracle.node("Mul", ["c", "s"], ["y"])]
    elif tail == "hardswish":
        nodes += [
            oracle.node("HardSigmoid", ["c"], ["s"], alpha=1 / 6, beta=0.5),
            oracle.node("Mul", ["c", "s"], ["y"]),
        ]
    else:
        nodes.append(oracle.node("Identity", ["c"], ["y"]))
    return oracle.model(nodes, feeds, ["y"], constants), feeds


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 8, 16, 17, 24, 32, 40, 64]),
    out_channels=st.sampled_from([1, 5, 16, 20, 32, 48, 70]),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 5), (2, 3)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    tail=st.sampled_from(["none", "relu", "silu", "hardswish"]),
)
def test_dense_convolutions(batch, channels, out_channels, size, kernel, stride, dilation, pads, tail):
    data = exact((batch, channels, *size), 1)
    weight = exact((out_channels, channels, *kernel), 2, 0.2)
    reach = [(k - 1) * dilation + 1 for k in kernel]
    if any(size[a] + pads[a] + pads[a + 2] < reach[a] for a in range(2)):
        return
    made, feeds = conv_model(
        data, weight, exact((out_channels,), 3), tail, strides=[stride] * 2, dilations=[dilation] * 2, pads=list(pads)
    )
    check(made, feeds, channels * kernel[0] * kernel[1])


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.sampled_from([8, 16, 24, 32, 72]),
    size=st.tuples(st.integers(5, 13), st.integers(5, 13)),
    kernel=st.sampled_from([3, 5]),
    stride=st.integers(1, 2),
    pad=st.integers(0, 2),
    tail=st.sampled_from(["none", "relu", "silu"]),
)
def test_depthwise_convolutions(batch, channels, size, kernel, stride, pad, tail):
    made, feeds = conv_model(
        exact((batch, channels, *size), 1), exact((channels, 1, kernel, kernel), 2), exact((channels,), 3), tail,
        strides=[stride] * 2, pads=[pad] * 4, group=channels,
    )  # fmt: skip
    check(made, feeds, kernel * kernel)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("channels", [8, 35])
def test_pooling(op: str, channels: int):
    data = {"x": exact((2, channels, 9, 10), 4)}
    windows: dict[str, Any] = {} if op.startswith("Global") else {"kernel_shape": [3, 3], "strides": [2, 2]}
    if op == "MaxPool":
        windows["pads"] = [1, 1, 1, 1]
    made = oracle.model([oracle.node(op, ["x"], ["y"], **windows)], data, ["y"])
    check(made, data, 9.0, roundings=0.0 if "Max" in op else 1.0)


def test_a_residual_block_stores_each_value_once_and_in_half_the_bytes():
    """conv, bias, relu, conv, bias, add, relu: two kernels, each with one narrowing, after the stem that makes x."""
    feeds = {"x": exact((1, 32, 8, 8), 1)}
    constants = {f"w{i}": exact((32, 32, 3, 3), 2 + i, 0.1) for i in range(3)}
    constants["b"] = exact((32,), 9)
    three = {"pads": [1, 1, 1, 1]}
    nodes = [
        oracle.node("Conv", ["x", "w0", "b"], ["c0"], **three),
        oracle.node("Relu", ["c0"], ["r0"]),
        oracle.node("Conv", ["r0", "w1", "b"], ["c1"], **three),
        oracle.node("Relu", ["c1"], ["r1"]),
        oracle.node("Conv", ["r1", "w2", "b"], ["c2"], **three),
        oracle.node("Add", ["c2", "r0"], ["s"]),
        oracle.node("Relu", ["s"], ["r2"]),
        oracle.node("GlobalMaxPool", ["r2"], ["y"]),
    ]
    made = oracle.model(nodes, feeds, ["y"], constants)
    funcs = pipeline.prim_funcs(TARGET.lower(made).module)
    convs = {name: func for name, func in funcs.items() if "conv2d" in name}
    assert len(convs) == 2  # the first two are the same computation
    for func in convs.values():
        assert func.script(show_meta=False).count("narrow_bfloat16(") == 1
        assert str(func.params[-1].ty.dtype) == "bfloat16"
    check(made, feeds, 288.0, roundings=16.0)  # relative to the outputs, which add up what three layers rounded


def test_two_convolutions_that_meet_store_one_of_them_as_bfloat16():
    """A shortcut with its own convolution: its result goes through memory, and not as float32."""
    feeds = {"x": exact((1, 32, 6, 6), 1)}
    constants = {"v": exact((64, 32, 1, 1), 2, 0.2), "w": exact((64, 32, 3, 3), 3, 0.1)}
    nodes = [
        oracle.node("Relu", ["x"], ["r"]),
        oracle.node("Conv", ["r", "w"], ["a"], pads=[1, 1, 1, 1]),
        oracle.node("Conv", ["r", "v"], ["b"]),
        oracle.node("Add", ["a", "b"], ["s"]),
        oracle.node("Relu", ["s"], ["t"]),
        oracle.node("MaxPool", ["t"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    made = oracle.model(nodes, feeds, ["y"], constants)
    convs = {name: kind for name, kind in stored_types(made).items() if "conv2d" in name}
    assert len(convs) == 2 and set(convs.values()) == {"bfloat16"}
    wanted, found = oracle.reference(made, feeds)["y"], oracle.compiled(made, feeds, TARGET)["y"]
    largest = np.abs(oracle.reference(oracle.model(nodes[:3], feeds, ["b"], constants), feeds)["b"]).max()
    assert np.abs(found - wanted).max() <= UNIT * (np.abs(wanted).max() + largest) * 1.01


def test_concat_reads_what_is_stored():
    feeds = {"x": exact((1, 32, 6, 6), 1)}
    constants = {"v": exact((32, 32, 1, 1), 2, 0.2), "w": exact((64, 32, 3, 3), 3, 0.1)}
    nodes = [
        oracle.node("Conv", ["x", "v"], ["a"]),
        oracle.node("Conv", ["x", "w"], ["b"], pads=[1, 1, 1, 1]),
        oracle.node("Concat", ["a", "b"], ["c"], axis=1),
        oracle.node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2]),
    ]
    made = oracle.model(nodes, feeds, ["y"], constants)
    assert "float32" not in {kind for name, kind in stored_types(made).items() if "conv2d" in name}
    check(made, feeds, 288.0)


def test_squeeze_and_excite_and_a_classifier():
    feeds = {"x": exact((2, 40, 7, 7), 1)}
    constants = {
        "w": exact((40, 40, 1, 1), 2, 0.2), "v1": exact((10, 40, 1, 1), 3, 0.2), "v2": exact((40, 10, 1, 1), 4, 0.2),
        "m": exact((40, 12), 5, 0.2), "b": exact((12,), 6),
    }  # fmt: skip
    nodes = [
        oracle.node("Conv", ["x", "w"], ["a"]),
        oracle.node("GlobalAveragePool", ["a"], ["p"]),
        oracle.node("Conv", ["p", "v1"], ["q"]),
        oracle.node("Relu", ["q"], ["r"]),
        oracle.node("Conv", ["r", "v2"], ["t"]),
        oracle.node("Sigmoid", ["t"], ["u"]),
        oracle.node("Mul", ["a", "u"], ["s"]),
        oracle.node("GlobalAveragePool", ["s"], ["g"]),
        oracle.node("Flatten", ["g"], ["f"]),
        oracle.node("Gemm", ["f", "m", "b"], ["y"]),
    ]
    made = oracle.model(nodes, feeds, ["y"], constants)
    wanted, found = oracle.reference(made, feeds)["y"], oracle.compiled(made, feeds, TARGET)["y"]
    # seven stored values between input and output, independent roundings: sqrt(7) units, times 8 for confidence
    assert np.abs(found - wanted).max() <= 8 * np.sqrt(7) * UNIT * np.abs(wanted).max()


def test_what_tvm_lowers_by_itself_gets_float32():
    """Transpose moves stored elements; InstanceNormalization is TVM's own and computes in float32."""
    feeds = {"x": exact((1, 24, 6, 5), 1)}
    constants = {"w": exact((24, 24, 1, 1), 2, 0.2), "g": exact((24,), 3), "h": exact((24,), 4)}
    nodes = [
        oracle.node("Conv", ["x", "w"], ["a"]),
        oracle.node("Transpose", ["a"], ["t"], perm=[0, 1, 3, 2]),
        oracle.node("InstanceNormalization", ["t", "g", "h"], ["y"]),
    ]
    made = oracle.model(nodes, feeds, ["y"], constants)
    wanted, found = oracle.reference(made, feeds)["y"], oracle.compiled(made, feeds, TARGET)["y"]
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 8 * UNIT * np.abs(wanted).max()


def test_attention_multiplies_activations_in_float32_through_their_strides():
    """Only x and the weights are bfloat16, and exact; scores and weighted values are never rounded to it."""
    batch, length, heads, width = 2, 5, 3, 8
    whole = heads * width
    x = exact((batch, length, whole), 1)
    constants = {name: exact((whole, whole), 2 + i, 0.2) for i, name in enumerate(("wq", "wk", "wv"))}
    constants |= {
        "split": np.array([batch, length, heads, width]),
        "join": np.array([batch, length, whole]),
        "scale": np.array(width**-0.5, np.float32),
    }
    nodes = []
    for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [
            oracle.node("MatMul", ["x", f"w{name}"], [f"{name}0"]),
            oracle.node("Reshape", [f"{name}0", "split"], [f"{name}1"]),
            oracle.node("Transpose", [f"{name}1"], [name], perm=order),
        ]
    nodes += [
        oracle.node("MatMul", ["q", "k"], ["scores"]),
        oracle.node("Mul", ["scores", "scale"], ["scaled"]),
        oracle.node("Softmax", ["scaled"], ["weights"], axis=-1),
        oracle.node("MatMul", ["weights", "v"], ["values"]),
        oracle.node("Transpose", ["values"], ["back"], perm=(0, 2, 1, 3)),
        oracle.node("Reshape", ["back", "join"], ["y"]),
    ]
    made = oracle.model(nodes, {"x": x}, ["y"], constants)
    check(made, {"x": x}, magnitude=float(whole), roundings=0.0)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("batch_matmul" in name for name in names) == 2
    assert sum("transpose" in name for name in names) == 1  # the result's own; operands are read through strides
