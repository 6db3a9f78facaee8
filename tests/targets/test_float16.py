"""float16 on ARM, emulated: within what rounding in float16 explains of ONNX Runtime's float32.

The bound, for one output. Operands are numbers that float16 holds. Adding a term to a partial sum s rounds it by at
most u |s|, u = 2^-11: an error of standard deviation u |s| / sqrt(3) at most. With random signs the squares of the
partial sums of n terms add up to about q n^2 / 2, q being the mean square of a term; N terms in runs of n, and then the
runs, to q N (n + N / n) / 2. With Q = q N, the sum of the terms' squares, the error's standard deviation is at most

    u sqrt(Q (n + N / n) / 6)

Allowed are 8 of these, and a rounding of the result's size for each operation behind the sum.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphopt.errors import TargetError
from graphopt.plugins import parse_target
from graphopt.remote.engine import RemoteEngine
from graphopt.targets import schedules
from graphopt.targets.arm import Arm
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import half, pipeline
from graphopt.targets.schedules import conv2d_blocked, winograd
from graphopt.targets.schedules.workload import Workload
from tests.targets import oracle

TARGET = Arm(mcpu="cortex-a76", threads=1, precision="float16")
UNIT = 2.0**-11
CASES = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = itertools.count()


def exact(seed: int, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1] that float16 holds."""
    return oracle.uniform(seed, *shape).astype(np.float16).astype(np.float32)


def workloads(made) -> dict[str, Workload]:
    functions = pipeline.prim_funcs(TARGET.lower(made).module)
    return {name: Workload(f.with_attr("global_symbol", "main"), TARGET.machine()) for name, f in functions.items()}


def run(made, feeds, device, folder, decisions=None):
    """Outputs on an emulated cortex-a76; `decisions` by the name of the anchor's block."""
    address = device("cortex-a76")
    lowered = TARGET.lower(made)
    for anchor, choice in (decisions or {}).items():
        for name, workload in workloads(made).items():
            if workload.anchor(anchor) is not None:
                lowered.decisions[name] = choice
    built = folder / str(next(NUMBERS))
    built.mkdir()
    TARGET.build(lowered, built)
    return RemoteEngine(built, address).run(feeds)


def squared(feeds, nodes, constants, outputs):
    """The sums of the terms' squares: the same layers, on squares."""
    again = oracle.model(nodes, feeds, outputs, {k: v**2 for k, v in constants.items()})
    return oracle.reference(again, {k: v**2 for k, v in feeds.items()})


def deviation(squares: np.ndarray, terms: int) -> np.ndarray:
    """Standard deviation of a sum's error; see above."""
    one = min(terms, half.TERMS)
    return UNIT * np.sqrt(squares * (one + terms / one) / 6)


def check(found: np.ndarray, wanted: np.ndarray, spread: np.ndarray, behind: float = 3.0) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    allowed = 8 * spread + behind * UNIT * (np.abs(wanted) + 1)
    excess = np.abs(found - wanted) - allowed
    assert (excess <= 0).all(), f"{excess.max():.3g} beyond {allowed.flat[excess.argmax()]:.3g}"
    assert not np.array_equal(found, wanted)  # it really is float16


def convolution(channels: int, outs: int, kernel: tuple[int, int], groups: int = 1, **window):
    """Nodes and constants of Conv with a bias, behind a Relu that makes its input an image in memory."""
    constants = {"w": exact(2, outs, channels // groups, *kernel), "b": exact(3, outs)}
    nodes = [oracle.node("Conv", ["x", "w", "b"], ["y"], kernel_shape=kernel, group=groups, **window)]
    return nodes, constants


def is_half(workload: Workload) -> bool:
    return workload.number == "float16"


@CASES
@given(
    case=st.sampled_from([(3, 8, 1), (8, 5, 1), (12, 20, 1), (40, 24, 1), (16, 32, 2), (24, 24, 3), (40, 10, 5)]),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 11), st.integers(4, 12)),
    kernel=st.sampled_from([(1, 1), (1, 3), (3, 3), (3, 2), (5, 5)]),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    pick=st.integers(0, 23),
)
def test_dense_and_grouped_convolutions(device, tmp_path, case, batch, size, kernel, strides, dilations, pads, pick):
    channels, outs, groups = case
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    assume(all(size[a] + pads[a] + pads[a + 2] >= reach[a] for a in range(2)))
    feeds = {"x": exact(1, batch, channels, *size)}
    nodes, constants = convolution(channels, outs, kernel, groups, strides=strides, dilations=dilations, pads=pads)
    made = oracle.model(nodes, feeds, ["y"], constants)
    (workload,) = [w for w in workloads(made).values() if w.anchor("conv2d") is not None]
    assert is_half(workload)
    space = schedules.choices(workload)
    choice = space[pick % len(space)]
    found = run(made, feeds, device, tmp_path, {"conv2d": (choice.template, choice.decision)})
    terms = channels // groups * kernel[0] * kernel[1] + 1
    spread = deviation(squared(feeds, nodes, constants, ["y"])["y"], terms)
    if choice.template == winograd.NAME:
        spread = np.full_like(spread, spread.max()) * winograd.error_factor(choice.decision)
    check(found["y"], oracle.reference(made, feeds)["y"], spread)


@pytest.mark.parametrize(
    ("channels", "kernel", "size", "pads"),
    [
        (1200, (1, 1), (3, 5), (0, 0, 0, 0)),  # runs are parts of the channels
        (72, (3, 3), (5, 6), (1, 1, 1, 1)),  # taps
        (24, (3, 5), (6, 4), (1, 2, 0, 1)),  # rows of the window
        (80, (3, 3), (7, 9), (2, 2, 2, 2)),
    ],
)
def test_sums_of_many_terms_are_cut_into_runs(device, tmp_path, channels, kernel, size, pads):
    feeds = {"x": exact(1, 1, channels, *size)}
    nodes, constants = convolution(channels, 16, kernel, pads=pads)
    made = oracle.model(nodes, feeds, ["y"], constants)
    (workload,) = [w for w in workloads(made).values() if w.anchor("conv2d") is not None]
    space = conv2d_blocked.match(workload) or []
    spread = deviation(squared(feeds, nodes, constants, ["y"])["y"], channels * kernel[0] * kernel[1])
    wanted = oracle.reference(made, feeds)["y"]
    one_row = [d for d in space if d["rows"] == 1 and d["columns"] < size[1]][:1]
    panels = [d for d in space if d["panel"] < -(-channels // half.LANES)][:1]
    for decision in [space[0], *one_row, *panels]:
        found = run(made, feeds, device, tmp_path, {"conv2d": (conv2d_blocked.NAME, decision)})
        check(found["y"], wanted, spread)


@pytest.mark.parametrize("side", winograd.SIDES)
def test_winograd_in_runs(device, tmp_path, side):
    channels = half.TERMS + 24
    feeds = {"x": exact(1, 1, channels, 7, 6)}
    nodes, constants = convolution(channels, 16, (3, 3), pads=(1, 1, 1, 1))
    made = oracle.model(nodes, feeds, ["y"], constants)
    (workload,) = [w for w in workloads(made).values() if w.anchor("conv2d") is not None]
    decision = next(d for d in winograd.match(workload) or [] if d["tile"] == side)
    found = run(made, feeds, device, tmp_path, {"conv2d": (winograd.NAME, decision)})
    spread = deviation(squared(feeds, nodes, constants, ["y"])["y"], channels * 9)
    whole = np.full_like(spread, spread.max()) * winograd.error_factor(decision)
    check(found["y"], oracle.reference(made, feeds)["y"], whole)


@CASES
@given(
    channels=st.sampled_from([3, 8, 13, 24]),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    kernel=st.sampled_from([(3, 3), (5, 5), (1, 3)]),
    stride=st.integers(1, 2),
    pick=st.integers(0, 23),
)
def test_depthwise_convolutions(device, tmp_path, channels, size, kernel, stride, pick):
    feeds = {"x": exact(1, 1, channels, *size)}
    nodes, constants = convolution(
        channels, channels, kernel, channels, strides=[stride] * 2, pads=[k // 2 for k in kernel] * 2
    )
    made = oracle.model(nodes, feeds, ["y"], constants)
    (workload,) = [w for w in workloads(made).values() if w.anchor("depthwise") is not None]
    assert is_half(workload)
    space = schedules.choices(workload)
    choice = space[pick % len(space)]
    found = run(made, feeds, device, tmp_path, {"depthwise": (choice.template, choice.decision)})
    spread = deviation(squared(feeds, nodes, constants, ["y"])["y"], kernel[0] * kernel[1])
    check(found["y"], oracle.reference(made, feeds)["y"], spread)


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 700, 96), (1, 30, 40), (5, 400, 50), (33, 64, 24)])
def test_matrix_products(device, tmp_path, rows, depth, columns):
    feeds = {"x": exact(1, rows, depth)}
    constants = {"w": exact(2, depth, columns), "b": exact(3, columns)}
    nodes = [oracle.node("MatMul", ["x", "w"], ["a"]), oracle.node("Add", ["a", "b"], ["y"])]
    made = oracle.model(nodes, feeds, ["y"], constants)
    (workload,) = [w for w in workloads(made).values() if w.anchor("packed_matmul") is not None]
    assert is_half(workload)
    spread = deviation(squared(feeds, nodes, constants, ["y"])["y"], depth)
    wanted = oracle.reference(made, feeds)["y"]
    for choice in schedules.choices(workload)[:2]:
        found = run(made, feeds, device, tmp_path, {"packed_matmul": (choice.template, choice.decision)})
        check(found["y"], wanted, spread)


def test_chains_behind_a_convolution(device, tmp_path):
    """Activations of float16, of float32 and of both, pooling, a residual; all in one graph."""
    feeds = {"x": exact(1, 1, 16, 9, 10)}
    nodes, constants = convolution(16, 16, (3, 3), pads=(1, 1, 1, 1))
    tails = {"relu": "Relu", "leaky": "LeakyRelu", "swish": "HardSwish", "sigmoid": "Sigmoid"}
    more = [oracle.node(op, ["y"], [name]) for name, op in tails.items()]
    more += [
        oracle.node("Mul", ["y", "sigmoid"], ["silu"]),
        oracle.node("Add", ["relu", "x"], ["sum"]),
        oracle.node("Mul", ["relu", "half"], ["scaled"]),
        oracle.node("MaxPool", ["relu"], ["most"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        oracle.node("AveragePool", ["relu"], ["mean"], kernel_shape=[3, 3], strides=[2, 2]),
        oracle.node("GlobalAveragePool", ["y"], ["whole"]),
    ]
    constants["half"] = np.array(0.5, np.float32)
    outputs = [*tails, "silu", "sum", "scaled", "most", "mean", "whole"]
    made = oracle.model([*nodes, *more], feeds, outputs, constants)
    found, wanted = run(made, feeds, device, tmp_path), oracle.reference(made, feeds)
    layer = {k: constants[k] for k in "wb"}
    spread = deviation(squared(feeds, nodes, layer, ["y"])["y"], 16 * 9 + 1).max()
    for name in outputs:
        check(found[name], wanted[name], 2 * np.full_like(wanted[name], spread), behind=4)


def test_softmax_and_normalization_stay_in_float32():
    feeds = {"x": exact(1, 1, 16, 4, 4)}
    nodes, constants = convolution(16, 16, (1, 1))
    more = [
        oracle.node("Softmax", ["y"], ["s"], axis=1),
        oracle.node("InstanceNormalization", ["y", "g", "h"], ["n"]),
    ]
    constants |= {"g": np.ones(16, np.float32), "h": np.zeros(16, np.float32)}
    found = workloads(oracle.model([*nodes, *more], feeds, ["s", "n"], constants))
    reductions = {
        name: w
        for name, w in found.items()
        if any(int(v.iter_type) == 2 for b in w.blocks.values() for v in b.iter_vars)
    }
    assert len(reductions) > 1
    for workload in reductions.values():
        assert is_half(workload) == (workload.anchor("conv2d") is not None)


def test_a_constant_that_float16_does_not_hold_keeps_its_chain_in_float32(device, tmp_path):
    feeds = {"x": exact(1, 1, 8, 4, 4)}
    nodes, constants = convolution(8, 8, (1, 1))
    constants |= {"big": np.full((1, 8, 1, 1), 1e6, np.float32), "small": np.full((1, 8, 1, 1), 1e-6, np.float32)}
    more = [oracle.node("Mul", ["y", "big"], ["l"]), oracle.node("Mul", ["l", "small"], ["z"])]
    made = oracle.model([*nodes, *more], feeds, ["z"], constants)
    found, wanted = run(made, feeds, device, tmp_path)["z"], oracle.reference(made, feeds)["z"]
    check(found, wanted, np.full_like(wanted, deviation(np.full(1, 9.0), 9)[0]))


def test_images_and_weights_take_half_the_bytes():
    feeds = {"x": exact(1, 1, 16, 8, 8)}
    nodes, constants = convolution(16, 16, (3, 3), pads=(1, 1, 1, 1))
    more = [oracle.node("Relu", ["y"], ["r"]), oracle.node("Conv", ["r", "w", "b"], ["z"], pads=(1, 1, 1, 1))]
    made = oracle.model([*nodes, *more], feeds, ["z"], constants)
    convs = [w for w in workloads(made).values() if w.anchor("conv2d") is not None]
    assert convs and all(is_half(w) for w in convs)
    first = next(w for w in convs if "relu" in "".join(w.blocks))
    assert {str(p.ty.dtype) for p in first.func.params} == {"float16"}
    assert first.machine.lanes == half.LANES and TARGET.machine().lanes == half.LANES // 2


@pytest.mark.parametrize("text", ["arm{mcpu=a76,precision=fp16}", "arm{mcpu=a76,precision=float16}"])
def test_the_precision_has_two_names(text):
    target = parse_target(text)
    assert target == Arm(mcpu="cortex-a76", precision="float16") and parse_target(str(target)) == target


@pytest.mark.parametrize("target", [Arm(mcpu="cortex-a72", precision="fp16"), Cpu(mcpu="haswell", precision="fp16")])
def test_a_processor_without_float16_arithmetic_is_refused(target):
    feeds = {"x": exact(1, 1, 8, 4, 4)}
    nodes, constants = convolution(8, 8, (1, 1))
    with pytest.raises(TargetError, match=r"has no float16 instructions \(asimdhp\)"):
        target.lower(oracle.model(nodes, feeds, ["y"], constants))
