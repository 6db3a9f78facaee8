"""Whole small models, with every decision that any template offers for their kernels, against ONNX Runtime.

Hypothesis draws the model, the instruction set and one alternative decision; the first guess is run too. The long form
runs all alternatives. A failure shows the decision of each kernel, so that `apply` can be repeated alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import pipeline
from graphopt.targets.schedules.workload import Workload
from tests.targets.oracle import close, compiled, model, node, reference, sum_tolerance, uniform

CPUS = [
    cpu
    for cpu in ("native", "x86-64-v3", "skylake-avx512")
    if cpu == "native" or capabilities.X86_FEATURES[cpu] <= capabilities.host_features()
]
TARGETS = [Cpu(mcpu=cpu, threads=threads) for cpu in CPUS for threads in (1, 2)]
MOST_ALTERNATIVES = 24
"""Decisions of one kernel that the long form tries, spread evenly over its space."""
CHANNELS = [1, 2, 3, 5, 8, 12, 16, 17, 24, 31, 32, 40, 48]
FEW = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink is to compile hundreds of times
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
MANY = settings(FEW, max_examples=60)


@dataclass
class Example:
    """A model under construction; `value` is the tensor that the next node takes, of `shape`."""

    shape: tuple[int, ...]
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    value: str = "x"
    terms: int = 4
    """Products in all the sums that follow one another: what tolerances grow with."""
    drawn: str = ""

    def __post_init__(self):
        self.inputs = {"x": uniform(self.seed, *self.shape)}

    def constant(self, *shape: int, scale: float = 1.0) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = uniform(self.seed + 1 + len(self.constants), *shape) * np.float32(scale)
        return name

    def add(self, op: str, *more: str, shape: tuple[int, ...] | None = None, terms: int = 0, **attributes: Any) -> str:
        """Append a node that takes `value` and `more`; its output is the new `value`."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, [self.value, *more], [name], **attributes))
        self.value, self.shape = name, shape or self.shape
        self.terms += terms
        self.drawn += f" {op}{list(self.shape)}{attributes or ''}"
        return name

    def made(self):
        return model(self.nodes, self.inputs, [self.value], self.constants)


def conv(
    example: Example, outs: int, kernel, strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0), groups=1, bias=False
):
    """A convolution whose weights keep sums of random numbers near one."""
    batch, channels, *size = example.shape
    reach = [(kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    room = [size[a] + pads[a] + pads[a + 2] - reach[a] for a in range(2)]
    assume(min(room) >= 0)
    fan_in = channels // groups * kernel[0] * kernel[1]
    operands = [example.constant(outs, channels // groups, *kernel, scale=(3 / fan_in) ** 0.5)]
    if bias:
        operands.append(example.constant(outs))
    shape = (batch, outs, *(room[a] // strides[a] + 1 for a in range(2)))
    example.add(
        "Conv", *operands, shape=shape, terms=fan_in,
        kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads, group=groups,
    )  # fmt: skip


def activation(example: Example, kind: str) -> None:
    if kind == "SiLU":
        before = example.value
        example.add("Sigmoid")
        example.add("Mul", before)
    elif kind == "Clip":
        names = [example.constant() for _ in range(2)]
        example.constants |= {names[0]: np.array(-0.25, np.float32), names[1]: np.array(0.5, np.float32)}
        example.add("Clip", *names)
    elif kind == "PRelu":
        example.add("PRelu", example.constant(example.shape[1], *[1] * (len(example.shape) - 2)))
    elif kind:
        example.add(kind)


activations = st.sampled_from(["", "Relu", "Clip", "SiLU", "HardSwish", "Sigmoid", "LeakyRelu", "PRelu", "Tanh"])
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
seeds = st.integers(0, 99)
kernels = st.sampled_from([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (7, 7), (1, 7), (4, 3)])


@st.composite
def convolutions(draw) -> Example:
    """All attributes of Conv, after a 1x1 (so that it reads blocked channels) or at once, and what fuses with it."""
    batch, size = draw(st.integers(1, 4)), draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    form = draw(st.sampled_from(["dense", "dense", "depthwise", "grouped", "multiplier"]))
    groups, wide = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([1, 2, 4, 8, 16]))
    channels = groups * wide if form == "grouped" else draw(st.sampled_from(CHANNELS))
    outs = draw(st.sampled_from(CHANNELS))
    if form == "depthwise":
        groups, outs = channels, channels
    elif form == "multiplier":
        groups, outs = channels, 2 * channels
    elif form == "grouped":
        outs = groups * draw(st.sampled_from([1, 2, 4, 8, 16]))
    else:
        groups = 1
    example = Example((batch, channels, *size), draw(seeds))
    if draw(st.booleans()):
        conv(example, channels, (1, 1))
    plain = draw(st.booleans())
    kernel, pads = draw(kernels), draw(st.tuples(*[st.integers(0, 2)] * 4))
    strides, dilations = ((1, 1), (1, 1)) if plain else (draw(pairs), draw(pairs))
    conv(example, outs, kernel, strides, dilations, pads, groups, draw(st.booleans()))
    activation(example, draw(activations))
    if draw(st.booleans()):  # a residual of the same shape
        other = example.value
        conv(example, example.shape[1], (1, 1))
        example.add("Add", other)
        activation(example, draw(st.sampled_from(["", "Relu"])))
    return example


@st.composite
def transposed(draw) -> Example:
    batch, channels, outs = draw(st.integers(1, 2)), draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    size, kernel, strides = draw(st.tuples(st.integers(1, 9), st.integers(1, 9))), draw(kernels), draw(pairs)
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2)]))
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    extra = tuple(draw(st.integers(0, max(s - 1, 0))) for s in strides)
    out = [
        (size[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 + extra[a] - pads[a] - pads[a + 2]
        for a in range(2)
    ]
    assume(min(out) >= 1)
    example = Example((batch, channels, *size), draw(seeds))
    fan_in = channels * kernel[0] * kernel[1]
    weight = example.constant(channels, outs, *kernel, scale=(3 / fan_in) ** 0.5)
    example.add(
        "ConvTranspose", weight, shape=(batch, outs, *out), terms=fan_in, kernel_shape=kernel, strides=strides,
        dilations=dilations, pads=pads, output_padding=extra,
    )  # fmt: skip
    activation(example, draw(activations))
    return example


@st.composite
def pools(draw) -> Example:
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from(CHANNELS))
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    example = Example((batch, channels, *size), draw(seeds))
    if draw(st.booleans()):
        conv(example, channels, (1, 1))
    op = draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"]))
    if op.startswith("Global"):
        example.add(op, shape=(batch, channels, 1, 1), terms=math.prod(size))
        return example
    kernel, strides = draw(kernels), draw(pairs)
    pads = tuple(draw(st.integers(0, min(2, kernel[a % 2] - 1))) for a in range(4))
    assume(all(size[a] + pads[a] + pads[a + 2] >= kernel[a] for a in range(2)))
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    else:
        attributes["ceil_mode"] = draw(st.integers(0, 1))
    shape = tuple((size[a] + pads[a] + pads[a + 2] - kernel[a]) // strides[a] + 1 for a in range(2))
    example.add(op, shape=(batch, channels, *shape), terms=math.prod(kernel), **attributes)
    return example


@st.composite
def products(draw) -> Example:
    """MatMul with a constant, Gemm, and the product of two activations, with bias and activation."""
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    rows, depth, columns = (draw(st.sampled_from([1, 2, 5, 7, 16, 19, 33, 64])) for _ in range(3))
    form = draw(st.sampled_from(["MatMul", "Gemm", "both"]))
    example = Example((rows, depth) if form == "Gemm" else (*lead, rows, depth), draw(seeds))
    scale = (3 / depth) ** 0.5
    if form == "Gemm":
        transposed = draw(st.integers(0, 1))
        weight = example.constant(*((columns, depth) if transposed else (depth, columns)), scale=scale)
        example.add("Gemm", weight, example.constant(columns), shape=(rows, columns), terms=depth, transB=transposed)
    elif form == "MatMul":
        weight = example.constant(depth, columns, scale=scale)
        example.add("MatMul", weight, shape=(*lead, rows, columns), terms=depth)
        if draw(st.booleans()):
            example.add("Add", example.constant(columns))
    else:
        example.inputs["z"] = uniform(example.seed + 50, *lead, depth, columns) * np.float32(scale)
        example.add("MatMul", "z", shape=(*lead, rows, columns), terms=depth)
    activation(example, draw(st.sampled_from(["", "Relu", "Sigmoid", "SiLU", "Tanh"])))
    return example


@st.composite
def normalizations(draw) -> Example:
    """Softmax along any axis, LayerNormalization, and its decomposed form."""
    shape = draw(st.sampled_from([(1, 7), (3, 16), (2, 5, 33), (1, 4, 6, 64), (2, 197), (4, 1, 10)]))
    example = Example(shape, draw(seeds))
    form = draw(st.sampled_from(["softmax", "layer", "decomposed"]))
    width = shape[-1]
    if form == "softmax":
        axis = draw(st.integers(-len(shape), len(shape) - 1))
        example.add("Softmax", axis=axis, terms=shape[axis])
        return example
    if form == "layer":
        weights = [example.constant(width), example.constant(width)]
        example.add("LayerNormalization", *weights, axis=-1, terms=8 * width)
        return example
    before = example.value
    mean = example.add("ReduceMean", axes=[-1], shape=(*shape[:-1], 1), terms=8 * width)
    example.value = before
    centred = example.add("Sub", mean, shape=shape)
    example.add("Mul", centred)
    example.add("ReduceMean", axes=[-1], shape=(*shape[:-1], 1))
    epsilon = example.constant()
    example.constants[epsilon] = np.array(1e-3, np.float32)
    example.add("Add", epsilon)
    deviation = example.add("Sqrt")
    example.value = centred
    example.add("Div", deviation, shape=shape)
    return example


@st.composite
def networks(draw) -> Example:
    """A few blocks as real networks have them: residual, inverted residual with Squeeze-and-Excite, concatenation."""
    batch, channels = draw(st.integers(1, 2)), draw(st.sampled_from([3, 8, 12, 16, 24, 32]))
    size = draw(st.integers(4, 15))
    example = Example((batch, 3, size, size), draw(seeds))
    conv(example, channels, (3, 3), pads=(1, 1, 1, 1), strides=draw(st.sampled_from([(1, 1), (2, 2)])), bias=True)
    activation(example, draw(activations))
    for kind in draw(st.lists(st.sampled_from(["residual", "excite", "concat", "split", "norm"]), max_size=3)):
        before, shape = example.value, example.shape
        width = shape[1]
        if kind == "residual":
            conv(example, width, (3, 3), pads=(1, 1, 1, 1), bias=True)
            activation(example, "Relu")
            conv(example, width, (3, 3), pads=(1, 1, 1, 1))
            example.add("Add", before)
            activation(example, "Relu")
        elif kind == "excite":
            conv(example, width, (3, 3), pads=(1, 1, 1, 1), groups=width, bias=True)
            activation(example, "HardSwish")
            scaled = example.value
            example.add("GlobalAveragePool", shape=(*shape[:2], 1, 1))
            conv(example, max(width // 4, 1), (1, 1), bias=True)
            activation(example, "Relu")
            conv(example, width, (1, 1), bias=True)
            example.add("HardSigmoid")
            example.add("Mul", scaled, shape=shape)
            conv(example, width, (1, 1))
            example.add("Add", before)
        elif kind == "concat":
            conv(example, draw(st.sampled_from([5, 16, 24])), (1, 1), bias=True)
            activation(example, "Relu")
            first, first_width = example.value, example.shape[1]
            example.value, example.shape = before, shape
            conv(example, draw(st.sampled_from([8, 16, 20])), (3, 3), pads=(1, 1, 1, 1))
            activation(example, "Relu")
            joined = (*shape[:1], width + first_width + example.shape[1], *shape[2:])
            example.add("Concat", first, before, axis=1, shape=joined)
        elif kind == "norm":
            scale, shift, mean, variance = (example.constant(width) for _ in range(4))
            example.constants[variance] = np.abs(example.constants[variance]) + np.float32(0.5)
            example.add("BatchNormalization", scale, shift, mean, variance)
            activation(example, "Relu")
        elif width % 2 == 0:  # channel shuffle
            batch_, _, high, wide = shape
            for dims, perm in (((batch_, 2, width // 2, high, wide), [0, 2, 1, 3, 4]), (shape, None)):
                name = example.constant()
                example.constants[name] = np.array(dims, np.int64)
                example.add("Reshape", name, shape=tuple(dims))
                if perm:
                    example.add("Transpose", perm=perm, shape=tuple(dims[i] for i in perm))
    example.add("GlobalAveragePool", shape=(*example.shape[:2], 1, 1))
    example.add("Flatten", shape=example.shape[:2])
    depth = example.shape[1]
    example.add("Gemm", example.constant(depth, 10), shape=(example.shape[0], 10), terms=depth)
    return example


KINDS = {
    "convolution": convolutions(),
    "transposed": transposed(),
    "pool": pools(),
    "product": products(),
    "normalization": normalizations(),
    "network": networks(),
}


def offered(target: Cpu, made) -> dict[str, list[schedules.Choice]]:
    """By kernel of the lowered model: all the ways to schedule it."""
    lowered = target.lower(made)
    machine = target.machine()
    functions = pipeline.prim_funcs(lowered.module)
    return {n: schedules.choices(Workload(f.with_attr("global_symbol", "main"), machine)) for n, f in functions.items()}


def error_factor(chosen: Iterable[schedules.Choice]) -> float:
    """How many times the error of a plain sum the least exact of these choices may have, as its template says."""
    factors = [1.0]
    for choice in chosen:
        stated = getattr(schedules.template_named(choice.template), "error_factor", None)
        if stated is not None:
            factors.append(float(stated(dict(choice.decision))))
    return max(factors)


def agree_with(example: Example, target: Cpu, chosen: Mapping[str, schedules.Choice]) -> None:
    made = example.made()
    note(f"{target} {example.drawn}")
    note("\n".join(f"{name}: {choice.template} {dict(choice.decision)}" for name, choice in chosen.items()))
    decisions = {name: (choice.template, choice.decision) for name, choice in chosen.items()}
    found = compiled(made, example.inputs, target, decisions)
    tolerance = sum_tolerance(example.terms) * error_factor(chosen.values())
    close(found, reference(made, example.inputs), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_first_guess_and_an_alternative(kind):
    @FEW
    @given(KINDS[kind], st.sampled_from(TARGETS), st.integers(1, 1 << 20))
    def check(example: Example, target: Cpu, position: int):
        choices = offered(target, example.made())
        agree_with(example, target, {name: found[0] for name, found in choices.items()})
        if any(len(found) > 1 for found in choices.values()):
            agree_with(example, target, {name: found[position % len(found)] for name, found in choices.items()})

    check()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_alternative(kind):
    @MANY
    @given(KINDS[kind], st.sampled_from(TARGETS))
    def check(example: Example, target: Cpu):
        choices = offered(target, example.made())
        most = min(max(len(found) for found in choices.values()), MOST_ALTERNATIVES)
        for turn in range(most):
            spread = {name: found[_spread(turn, most, len(found))] for name, found in choices.items()}
            agree_with(example, target, spread)

    check()


def _spread(turn: int, turns: int, choices: int) -> int:
    """Which of `choices` to take in one of `turns` turns: all of them, or evenly over them with first and last."""
    return turn % choices if choices <= turns else turn * (choices - 1) // max(turns - 1, 1)
