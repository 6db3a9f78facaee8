"""Convolutions of every shape, through import, blocked layout, schedule and machine code, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.relax.grouping import merge_groups
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import TARGET, agree, close, compiled, model, node, reference, sum_tolerance, uniform

CASES = settings(max_examples=15, deadline=None, derandomize=True)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@CASES
@given(
    channels=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 24, 32, 58]),
    outs=st.sampled_from([1, 3, 8, 16, 20, 33, 64]),
    size=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=pairs,
    dilations=pairs,
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    bias=st.booleans(),
    after_conv=st.booleans(),
)
def test_dense(channels, outs, size, kernel, strides, dilations, pads, bias, after_conv):
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    assume(all(size[a] + pads[a] + pads[a + 2] >= reach[a] for a in range(2)))
    x = uniform(1, 1, channels, *size)
    constants = {"w": uniform(2, outs, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5}
    nodes, source = [], "x"
    if after_conv:  # the convolution under test then reads blocked activations with filler channels
        constants["first"] = uniform(4, channels, channels, 1, 1) / channels**0.5
        nodes.append(node("Conv", ["x", "first"], ["a"]))
        source = "a"
    operands = [source, "w"]
    if bias:
        constants["b"] = uniform(3, outs)
        operands.append("b")
    nodes.append(node("Conv", operands, ["y"], kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads))
    terms = channels * kernel[0] * kernel[1] + channels
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(terms))


@CASES
@given(
    channels=st.sampled_from([2, 8, 16, 19, 32, 58]),
    size=st.tuples(st.integers(3, 17), st.integers(3, 17)),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (3, 2), (7, 7)]),
    strides=pairs,
    dilations=pairs,
    pads=st.tuples(*[st.integers(0, 3)] * 4),
)
def test_depthwise(channels, size, kernel, strides, dilations, pads):
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    assume(all(size[a] + pads[a] + pads[a + 2] >= reach[a] for a in range(2)))
    x = uniform(1, 2, channels, *size)
    constants = {"w": uniform(2, channels, 1, *kernel), "b": uniform(3, channels)}
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], group=channels, strides=strides, dilations=dilations, pads=pads),
        node("Relu", ["a"], ["y"]),
    ]
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(kernel[0] * kernel[1]))


@CASES
@given(
    groups=st.sampled_from([2, 3, 4, 5, 8, 32]),
    ins=st.sampled_from([1, 2, 4, 7, 8, 16]),
    outs=st.sampled_from([1, 2, 4, 5, 8, 16]),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    stride=st.integers(1, 2),
    after_conv=st.booleans(),
)
def test_grouped(groups, ins, outs, batch, size, stride, after_conv):
    channels = groups * ins
    x = uniform(1, batch, channels, *size)
    constants = {"w": uniform(2, groups * outs, ins, 3, 3) / (9 * ins) ** 0.5, "b": uniform(3, groups * outs)}
    nodes, source = [], "x"
    if after_conv:
        constants["first"] = uniform(4, channels, channels, 1, 1) / channels**0.5
        nodes.append(node("Conv", ["x", "first"], ["a"]))
        source = "a"
    window = {"group": groups, "pads": [1, 1, 1, 1], "strides": [stride, stride]}
    nodes.append(node("Conv", [source, "w", "b"], ["y"], **window))
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(ins * 9 + channels))


@CASES
@given(
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.sampled_from([1, 3, 8, 16]),
    outs=st.sampled_from([1, 2, 16, 24]),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    kernel=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 3), (4, 4), (5, 2)]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    extra=st.booleans(),
)
def test_transposed(groups, channels, outs, size, kernel, strides, pads, extra):
    assume(all((size[a] - 1) * strides[a] + kernel[a] > pads[a] + pads[a + 2] for a in range(2)))
    x = uniform(1, 1, groups * channels, *size)
    constants = {"w": uniform(2, groups * channels, outs, *kernel), "b": uniform(3, groups * outs)}
    window = {"strides": strides, "pads": pads, "output_padding": [int(extra and s > 1) for s in strides]}
    made = model([node("ConvTranspose", ["x", "w", "b"], ["y"], group=groups, **window)], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, sum_tolerance(channels * kernel[0] * kernel[1]))


@pytest.mark.parametrize("more", [-3, -2, -1, 0, 1])
@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
def test_a_transposed_convolution_whose_output_is_given(mode, more):
    """Smaller than all products span, as large, and larger."""
    x = uniform(1, 1, 4, 5, 6)
    shape = [(5 - 1) * 2 + 3 + more, (6 - 1) * 3 + 3 + more]
    window = {"strides": (2, 3), "auto_pad": mode, "output_shape": shape}
    made = model([node("ConvTranspose", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], {"w": uniform(2, 4, 3, 3, 3)})
    agree(made, {"x": x}, sum_tolerance(4 * 9))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 3)])
def test_a_transposed_convolution_that_multiplies_the_size(mode, strides):
    x = uniform(1, 1, 4, 5, 6)
    window = {"strides": strides, "auto_pad": mode}
    made = model([node("ConvTranspose", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], {"w": uniform(2, 4, 3, 4, 4)})
    agree(made, {"x": x}, sum_tolerance(4 * 16))


def test_a_dilated_transposed_convolution_of_stride_one_dilates_once():
    x = uniform(1, 1, 4, 5, 6)
    window = {"dilations": [2, 1], "pads": [0, 1, 0, 1]}
    made = model([node("ConvTranspose", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], {"w": uniform(2, 4, 3, 3, 3)})
    agree(made, {"x": x}, sum_tolerance(36))


@pytest.mark.parametrize("groups", [1, 16])
def test_a_transposed_convolution_multiplies_no_zeros(groups):
    """Four phases of 2x2 taps, not one of 4x4 over an input spread with zeros."""
    x = uniform(1, 1, 16, 5, 5)
    constants = {"w": uniform(2, 16, 16 // groups, 4, 4)}
    window = {"strides": [2, 2], "pads": [1, 1, 1, 1], "group": groups}
    made = model([node("ConvTranspose", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert not any("dilate" in name for name in names)
    assert any("interleave" in name for name in names)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding(mode):
    x = uniform(1, 1, 5, 10, 11)
    constants = {"w": uniform(2, 18, 5, 4, 3)}
    made = model([node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[2, 2])], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, sum_tolerance(60))


def test_one_dimensional():
    x = uniform(1, 2, 12, 30)
    constants = {"w": uniform(2, 20, 12, 5), "b": uniform(3, 20)}
    made = model([node("Conv", ["x", "w", "b"], ["y"], pads=[2, 1], strides=[2])], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, sum_tolerance(60))


@pytest.mark.parametrize(
    ("groups", "width", "fewer"), [(4, 32, 4), (32, 4, 8), (55, 8, 28), (3, 24, 1), (7, 5, 1), (6, 16, 6)]
)
def test_groups_are_merged_to_whole_blocks(groups, width, fewer):
    kernel = uniform(1, groups * width, width, 3, 3)
    merged, found = merge_groups(kernel, groups, 16, 16)
    assert found == fewer
    assert float(np.abs(merged).sum()) == pytest.approx(float(np.abs(kernel).sum()), rel=1e-5)


def _residual(size: int = 8):
    x = uniform(1, 1, 16, size, size)
    constants = {"w": uniform(2, 64, 16, 3, 3), "v": uniform(3, 64, 64, 1, 1) / 8, "b": uniform(4, 64)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "v", "b"], ["c"]),
        node("Add", ["c", "a"], ["d"]),
        node("Relu", ["d"], ["y"]),
    ]
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


def test_epilogue_is_one_kernel():
    """Bias, residual addition and activation leave no kernel of their own."""
    made, feeds = _residual()
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert sum("conv2d" in n for n in names) == 2
    assert not [n for n in names if n.startswith(("add", "relu"))]
    agree(made, feeds, sum_tolerance(16 * 9 + 64))


@pytest.mark.parametrize("target", [Cpu(threads=1), Cpu(mcpu="x86-64-v3", threads=1)], ids=str)
def test_every_decision_is_right(target):
    """Each candidate the tuner may pick computes the same."""
    made, feeds = _residual()
    wanted = reference(made, feeds)
    lowered = target.lower(made)
    spaces = {}
    for name, func in pipeline.prim_funcs(lowered.module).items():
        found = schedules.choices(Workload(func.with_attr("global_symbol", "main"), target.machine()))
        spaces[name] = [(choice.template, choice.decision) for choice in found]
    longest = max(map(len, spaces.values()))
    assert longest >= 10
    for i in range(min(longest, 12)):
        chosen = {name: space[i % len(space)] for name, space in spaces.items()}
        close(compiled(made, feeds, target, chosen), wanted, sum_tolerance(16 * 9 + 64))


def test_lowered_instruction_set():
    """`mcpu=x86-64-v3` generates 256-bit code in blocks of 8 channels."""
    target = Cpu(mcpu="x86-64-v3", threads=1)
    made, feeds = _residual()
    text = target.lower(made).module.script(show_meta=False)
    assert 'R.Tensor((1, 8, 64, 8), dtype="float32")' in text
    agree(made, feeds, sum_tolerance(16 * 9 + 64), target)


@pytest.mark.parametrize("threads", [0, 2])
def test_parallel_code(threads):
    made, feeds = _residual(24)
    agree(made, feeds, sum_tolerance(16 * 9 + 64), Cpu(threads=threads))


def test_channels_never_leave_blocks_between_convolutions():
    """No layout change between neighbouring convolutions, even with filler channels and activations in between."""
    x = uniform(1, 1, 3, 9, 9)
    constants = {"w": uniform(2, 20, 3, 3, 3), "v": uniform(3, 36, 20, 3, 3), "m": np.array(6, np.float32)}
    constants |= {"zero": np.array(0, np.float32)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Clip", ["a", "zero", "m"], ["b"]),
        node("Sigmoid", ["b"], ["c"]),
        node("Mul", ["b", "c"], ["d"]),
        node("Conv", ["d", "v"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    names = list(pipeline.prim_funcs(TARGET.lower(made).module))
    assert not [n for n in names if n.startswith("block")]
    assert len([n for n in names if "unblock" in n]) == 1  # the output
    agree(made, {"x": x}, sum_tolerance(27 * 20 * 9))


def test_tiles_of_one_column_skip_padding():
    """Single columns at the borders, which read fewer taps than those between them."""
    x, constants = uniform(1, 1, 16, 9, 9), {"w": uniform(2, 64, 16, 3, 3)}
    made = model([node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"x": x}, ["y"], constants)
    (name,) = (n for n in pipeline.prim_funcs(TARGET.lower(made).module) if "conv2d" in n)
    tile = {"rows": 1, "columns": 1, "outs": 4, "panel": 1, "order": "weights"}
    found = compiled(made, {"x": x}, TARGET, {name: ("conv2d_blocked", tile)})
    close(found, reference(made, {"x": x}), sum_tolerance(16 * 9))
