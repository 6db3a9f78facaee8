"""Multiplication by elements of vectors: its kernels are right on any machine, and fit ARM's registers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.targets import schedules
from graphopt.targets.arm import Arm
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules import by_element, conv2d_blocked, winograd
from graphopt.targets.schedules.conv2d_by_element import packed_weight
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import TARGET, agree, close, compiled, model, node, reference, sum_tolerance, uniform

CASES = settings(max_examples=6, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class AsOnArm(Cpu):
    """Schedules for ARM, machine code for this processor: LLVM spreads the elements here."""

    def machine(self):
        return Arm(mcpu="cortex-a72", threads=self.threads).machine()

    @property
    def capabilities(self):
        return dataclasses.replace(super().capabilities, float_lanes=by_element.LANES)


AS_ON_ARM = AsOnArm(threads=1)
pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))


def workload_of(made, block: str, target: Cpu | Arm = AS_ON_ARM) -> tuple[str, Workload]:
    functions = pipeline.prim_funcs(target.lower(made).module)
    workloads = {
        name: Workload(f.with_attr("global_symbol", "main"), target.machine()) for name, f in functions.items()
    }
    return next((name, w) for name, w in workloads.items() if w.anchor(block) is not None)


@CASES
@given(
    channels=st.sampled_from([4, 6, 8, 16, 20]),
    outs=st.sampled_from([3, 8, 12, 20, 28]),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 12), st.integers(4, 12)),
    kernel=st.sampled_from([(1, 1), (1, 3), (3, 3), (3, 2), (5, 5)]),
    strides=pairs,
    dilations=pairs,
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    pick=st.integers(0, 23),
)
def test_convolutions(channels, outs, batch, size, kernel, strides, dilations, pads, pick):
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    assume(all(size[a] + pads[a] + pads[a + 2] >= reach[a] for a in range(2)))
    x = uniform(1, batch, channels, *size)
    window = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    nodes = [node("Conv", ["x", "w", "b"], ["a"], **window), node("Relu", ["a"], ["y"])]
    made = model(nodes, {"x": x}, ["y"], {"w": uniform(2, outs, channels, *kernel), "b": uniform(3, outs)})
    name, workload = workload_of(made, "conv2d")
    space = conv2d_blocked.match(workload)
    assume(space)  # narrow blocks with few outputs take another template
    assert space is not None
    decision = space[pick % len(space)]
    found = compiled(made, {"x": x}, AS_ON_ARM, {name: (conv2d_blocked.NAME, decision)})
    close(found, reference(made, {"x": x}), sum_tolerance(channels * kernel[0] * kernel[1]))


@CASES
@given(
    channels=st.integers(1, 3),
    outs=st.sampled_from([8, 12, 20]),
    size=st.tuples(st.integers(5, 12), st.integers(5, 14)),
    kernel=st.sampled_from([(3, 3), (2, 4), (5, 5), (1, 7), (3, 2)]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    pick=st.integers(0, 23),
)
def test_pictures_in_planes(channels, outs, size, kernel, strides, pads, pick):
    assume(all(size[a] + pads[a] + pads[a + 2] >= kernel[a] for a in range(2)))
    x = uniform(1, 1, channels, *size)
    nodes = [node("Conv", ["x", "w", "b"], ["y"], kernel_shape=kernel, strides=strides, pads=pads)]
    made = model(nodes, {"x": x}, ["y"], {"w": uniform(2, outs, channels, *kernel), "b": uniform(3, outs)})
    name, workload = workload_of(made, "conv2d")
    space = conv2d_blocked.match(workload)
    assume(space)
    assert space is not None
    decision = space[pick % len(space)]
    found = compiled(made, {"x": x}, AS_ON_ARM, {name: (conv2d_blocked.NAME, decision)})
    close(found, reference(made, {"x": x}), sum_tolerance(channels * kernel[0] * kernel[1]))


@pytest.mark.parametrize(("kernel", "stride", "outs"), [(3, 1, 4), (3, 2, 4), (7, 2, 3), (5, 1, 2), (2, 3, 1)])
def test_tiles_of_planes_fit_the_registers(kernel, stride, outs):
    def used(positions: int) -> int:
        return positions * outs + -(-((positions - 1) * stride + kernel) // by_element.LANES) + by_element.SPARE

    most = by_element.most_positions_in_planes(outs, stride, kernel)
    assert used(most) <= by_element.REGISTERS < used(most + 1)


@CASES
@given(
    groups=st.sampled_from([2, 3]), ins=st.sampled_from([4, 8]), outs=st.sampled_from([4, 12]), stride=st.integers(1, 2)
)
def test_groups(groups, ins, outs, stride):
    x = uniform(1, 1, groups * ins, 7, 6)
    window = {"group": groups, "pads": [1, 1, 1, 1], "strides": [stride, stride]}
    made = model(
        [node("Conv", ["x", "w"], ["y"], **window)], {"x": x}, ["y"], {"w": uniform(2, groups * outs, ins, 3, 3)}
    )
    agree(made, {"x": x}, sum_tolerance(ins * 9), AS_ON_ARM)


@CASES
@given(
    channels=st.sampled_from([8, 12, 20]),
    outs=st.sampled_from([8, 12, 16]),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    pick=st.integers(0, 7),
)
def test_winograd(channels, outs, size, pick):
    x = uniform(1, 1, channels, *size)
    made = model(
        [node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"x": x}, ["y"], {"w": uniform(2, outs, channels, 3, 3)}
    )
    name, workload = workload_of(made, "conv2d")
    space = winograd.match(workload)
    assert space is not None
    decision = space[pick % len(space)]
    found = compiled(made, {"x": x}, AS_ON_ARM, {name: (winograd.NAME, decision)})
    close(found, reference(made, {"x": x}), winograd.error_factor(decision) * sum_tolerance(channels * 9))


def test_panels_of_input_channels():
    """Sums that wait in memory for the next panel."""
    x = uniform(1, 1, 32, 9, 9)
    made = model([node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"x": x}, ["y"], {"w": uniform(2, 16, 32, 3, 3)})
    name, workload = workload_of(made, "conv2d")
    cut = [d for d in conv2d_blocked.match(workload) or [] if d["panel"] < 8]
    assert cut
    for decision in cut[:2]:
        found = compiled(made, {"x": x}, AS_ON_ARM, {name: (conv2d_blocked.NAME, decision)})
        close(found, reference(made, {"x": x}), sum_tolerance(32 * 9))


def test_weights_lie_in_the_order_of_their_use():
    weight = np.arange(6 * 4 * 1 * 3 * 4 * 4, dtype=np.float32).reshape(6, 4, 1, 3, 4, 4)
    packed = packed_weight(weight, groups=2, sizes=[2, 1], panel=2)
    assert sorted(packed) == sorted(weight.reshape(-1))
    two = packed[: 2 * 4 * 3 * 16].reshape(2, 1, 3, 2, 4, 2, 4)  # the first tile of the first group: two output blocks
    for panel, kw, ico, lane, out in np.ndindex(2, 3, 2, 4, 2):
        np.testing.assert_array_equal(two[panel, 0, kw, ico, lane, out], weight[out, panel * 2 + ico, 0, kw, lane])
    one = packed[2 * 4 * 3 * 16 : 3 * 4 * 3 * 16].reshape(2, 1, 3, 2, 4, 1, 4)
    np.testing.assert_array_equal(one[1, 0, 2, 1, 3, 0], weight[2, 3, 0, 2, 3])
    assert packed[3 * 4 * 3 * 16] == weight[3, 0, 0, 0, 0, 0]  # the second group


@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a76"])
def test_first_guesses_fit_the_registers(core):
    machine = Arm(mcpu=core).machine()
    assert by_element.has(machine) and machine.registers == 32
    for outs in range(1, 7):
        positions = by_element.most_positions(outs)
        assert positions * (outs + 1) + by_element.SPARE <= machine.registers
        assert (positions + 1) * (outs + 1) + by_element.SPARE > machine.registers
    x = uniform(1, 1, 32, 14, 14)
    made = model([node("Conv", ["x", "w"], ["y"])], {"x": x}, ["y"], {"w": uniform(2, 96, 32, 1, 1)})
    _, workload = workload_of(made, "conv2d", Arm(mcpu=core))
    first = schedules.choices(workload)[0]
    assert first.template == conv2d_blocked.NAME
    assert first.decision["rows"] * (first.decision["outs"] + 1) + by_element.SPARE <= 32


def test_this_processor_spreads_numbers_as_before():
    if TARGET.machine().lanes == by_element.LANES:
        pytest.skip("this machine is an ARM itself")
    assert not by_element.has(TARGET.machine())
