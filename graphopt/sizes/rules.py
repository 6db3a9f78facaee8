"""What each operator makes of elements that padding put behind the real ones.

A rule is called for a node that has a padded axis at an input or an output, whose inputs' real elements are right. It
returns, for each axis of its outputs that is padded, what lies behind the real elements (of each output, where these
differ); and it raises `Unpaddable` where real elements of the output would be others than without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt.sizes.extents import Extents
from graphopt.sizes.hiders import Hiders
from graphopt.sizes.tails import ANY, FINITE, Tail, either, same

Tails = dict[int, Tail]
"""By axis."""


class Unpaddable(Exception):
    """Why the real elements of a node's output would not be those of the unpadded model."""


@dataclass
class State:
    """What is known so far. `masks`: the inputs, and their axes, that must leave something in every row; those in
    `first` must leave the first of every row."""

    extents: Extents
    tails: dict[str, Tails] = field(default_factory=dict)
    hiders: Hiders = field(default_factory=Hiders)
    masks: set[tuple[str, int]] = field(default_factory=set)
    first: set[tuple[str, int]] = field(default_factory=set)

    def of(self, value: ir.Value | None) -> Tails:
        """By padded axis; empty for a value without."""
        return {} if value is None else self.tails.get(str(value.name), {})

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Raises Unpaddable where it is not known."""
        found = None if value is None else self.extents.shape(str(value.name))
        if found is None:
            tensor = graphs.constant_of(value)
            if tensor is None:
                raise Unpaddable("shapes are not known")
            return tensor.shape
        return found

    def axes(self, value: ir.Value) -> tuple[int, ...]:
        """The padded axes. Raises Unpaddable where they are not clear."""
        found = self.extents.axes(str(value.name))
        if found is None:
            raise Unpaddable("its shape depends on the size in another way than by having it as an axis")
        return found


Rule = Callable[[ir.Node, State], Tails | list[Tails]]

ALWAYS_FINITE = frozenset({
    "Add", "Sub", "Mul", "Neg", "Abs", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid",
    "HardSwish", "Tanh", "Erf", "Gelu", "Swish", "QuickGelu", "FastGelu", "BiasGelu", "Clip", "Min", "Max", "Softplus",
    "Softsign", "Mish", "ThresholdedRelu", "PRelu", "Sin", "Cos", "Atan", "Floor", "Ceil", "Round", "Sign", "Identity",
    "Cast", "Where", "Not", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN",
    "IsInf", "QuantizeLinear", "DequantizeLinear", "Sum", "Mean", "Dropout",
})  # fmt: skip
"""Operators element by element that make numbers of numbers (sums and products of ordinary size do not overflow)."""
RISKY = frozenset({"Div", "Pow", "Sqrt", "Exp", "Log", "Reciprocal", "Mod", "Tan", "Acos", "Acosh", "Asin", "Asinh",
                   "Atanh", "Cosh", "Sinh", "BitShift"})  # fmt: skip
"""Those that may not."""


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def elementwise(node: ir.Node, state: State) -> Tails:
    out = node.outputs[0]
    rank = len(state.shape(out))
    found: Tails = {}
    for axis in state.axes(out):
        parts = [_along(value, axis - rank, state) for value in node.inputs if value is not None]
        found[axis] = _combined(node, parts)
    return found


def _along(value: ir.Value, from_end: int, state: State) -> Tail:
    """What an operand contributes behind the real elements of an axis, counted from the last."""
    shape = state.shape(value)
    axis = len(shape) + from_end
    if axis in state.of(value):
        return state.of(value)[axis]
    constant = graphs.constant_of(value)
    if constant is not None and constant.size == 1:
        return same(constant)
    if constant is not None and constant.dtype.kind == "f" and not np.isfinite(constant).all():
        return ANY
    return FINITE  # it is broadcast: its elements are real ones


def _combined(node: ir.Node, parts: list[Tail]) -> Tail:
    op = node.op_type
    masks = frozenset[tuple[str, int]]().union(*(t.masks for t in parts))
    if all(t.value is not None for t in parts):
        computed = _computed(node, [t.value for t in parts if t.value is not None])
        if computed is not None:
            return same(computed, masks)
    if op == "Where":
        which = parts[0].value
        return either(parts[1:]) if which is None else _masked(parts[1] if which.all() else parts[2], masks)
    if op in ("Add", "Sum", "Min") and any(t.is_low for t in parts) and all(t.is_low or t.is_finite for t in parts):
        return Tail("low", None, masks)
    if op == "Max" and all(t.is_low for t in parts):
        return Tail("low", None, masks)
    if op == "Sub" and parts[0].is_low and parts[1].is_finite:
        return Tail("low", None, masks)
    if op == "Mul" and all(t.is_finite for t in parts):
        zero = next((t for t in parts if t.is_zero), None)
        if zero is not None:
            return Tail("value", zero.value, masks)
    if op == "And" and any(t.is_zero for t in parts):
        return same(False, masks)
    if op in ("Identity", "Cast", "Dropout") and parts[0].is_low:
        return parts[0]
    if op == "Div" and parts[1].value is not None and parts[1].value.all() and parts[0].is_finite:
        return FINITE
    if op in RISKY:
        return ANY
    return FINITE if all(t.is_finite for t in parts) else ANY


def _masked(tail: Tail, masks: frozenset[tuple[str, int]]) -> Tail:
    return Tail(tail.kind, tail.value, tail.masks | masks)


def _computed(node: ir.Node, values: list[np.ndarray]) -> np.ndarray | None:
    """The operator of one element each; None where the reference implementation lacks it."""
    if not graphs.is_onnx(node) or any(v is None for v in node.inputs):
        return None
    from onnx.reference import ReferenceEvaluator

    names = [f"i{number}" for number in range(len(values))]
    attributes = [ir.serde.serialize_attribute(a) for a in node.attributes.values()]
    proto = onnx.helper.make_node(node.op_type, names, ["o"])
    proto.attribute.extend(attributes)
    try:
        results: Any = ReferenceEvaluator(proto).run(None, dict(zip(names, values, strict=True)))
        made = np.asarray(results[0])
    # Python of ONNX's, which raises what it likes; then nothing is known of the tail, which is always true.
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    return made if made.size == 1 else None


def matmul(node: ir.Node, state: State) -> Tails:
    """MatMul, and products with packed weights, whose left operand alone is not constant."""
    left, right = node.inputs[0], node.inputs[1]
    out = node.outputs[0]
    a, b, rank = len(state.shape(left)), len(state.shape(right)), len(state.shape(out))
    packed = node.op_type in ("MatMulNBits",)
    if packed:
        if a - 1 in state.of(left):
            raise Unpaddable("it sums over the padded axis")
        return {axis: FINITE if tail.is_finite else ANY for axis, tail in state.of(left).items()}
    if a < 2 or b < 2:
        raise Unpaddable("it multiplies a vector")
    _contracted(state.of(left).get(a - 1), state.of(right).get(b - 2))
    found: Tails = {}
    for axis in state.axes(out):
        from_end = axis - rank
        parts = []
        if from_end != -1 and a + from_end in state.of(left):
            parts.append(state.of(left)[a + from_end])
        if from_end != -2 and b + from_end in state.of(right):
            parts.append(state.of(right)[b + from_end])
        found[axis] = _product(parts)
    return found


def _product(parts: list[Tail]) -> Tail:
    """Behind the real elements of a product's axis that `parts` of the operands have."""
    zero = next((t for t in parts if t.is_zero), None)
    if zero is not None and all(t.is_finite for t in parts):
        return Tail("value", zero.value, zero.masks)
    return FINITE if all(t.is_finite for t in parts) else ANY


def _contracted(one: Tail | None, other: Tail | None) -> None:
    """Raises Unpaddable where a sum over an axis would have terms that are not zero behind the real ones."""
    if one is None and other is None:
        return
    if one is None or other is None:
        raise Unpaddable("it sums over the padded axis")
    if not ((one.is_zero and other.is_finite) or (other.is_zero and one.is_finite)):
        raise Unpaddable("it sums over the padded axis, and what is behind is not zero")


def gemm(node: ir.Node, state: State) -> Tails:
    left, right = node.inputs[0], node.inputs[1]
    rows = 1 if graphs.attribute(node, "transA", 0) else 0
    columns = 0 if graphs.attribute(node, "transB", 0) else 1
    _contracted(state.of(left).get(1 - rows), state.of(right).get(1 - columns))
    found: Tails = {}
    for axis in state.axes(node.outputs[0]):
        tail = state.of(left).get(rows) if axis == 0 else state.of(right).get(columns)
        found[axis] = FINITE if tail is None or tail.is_finite else ANY
    return found


def softmax(node: ir.Node, state: State) -> Tails:
    value = _first(node)
    rank = len(state.shape(value))
    axis = int(graphs.attribute(node, "axis", -1)) % rank
    found = {other: FINITE if tail.is_finite or tail.is_low else ANY for other, tail in state.of(value).items()}
    along = state.of(value).get(axis)
    if along is not None:
        if not along.is_low:
            raise Unpaddable("it is over the padded axis, and what is behind is not masked")
        _leaves_something(value, along, axis == rank - 1, state)
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        found[axis] = same(np.zeros(1, dtype), along.masks)
    return found


def _leaves_something(value: ir.Value, tail: Tail, last: bool, state: State) -> None:
    """Note what must hold at run time so that real elements of every row stand out against those masked by `tail`.
    `last`: the padded axis is the last. Raises Unpaddable where nothing that can be checked makes sure of it."""
    told, fixed = state.hiders.of(value)
    if told - {name for name, _ in tail.masks}:
        raise Unpaddable("values that are fed may hide what is real of a row")
    if len(told) + len(fixed) > 1 and not (len(told) == len(fixed) == 1 and last and state.hiders.shows_first(*fixed)):
        raise Unpaddable("several masks together may leave nothing of a row")
    if fixed and not (last and state.hiders.shows_something(*fixed)):
        raise Unpaddable("a mask that depends on the size leaves nothing of some rows")
    (state.first if fixed and told else state.masks).update(place for place in tail.masks if place[0] in told)


def normalization(node: ir.Node, state: State) -> Tails:
    """LayerNormalization and its kin: over the axes from `axis` on."""
    rank = len(state.shape(node.inputs[0]))
    first = int(graphs.attribute(node, "axis", -1)) % rank
    if any(axis >= first for axis in state.axes(node.outputs[0])):
        raise Unpaddable("it is over the padded axis")
    if any(any(axis >= len(state.shape(v)) + first - rank for axis in state.of(v)) for v in node.inputs[1:] if v):
        raise Unpaddable("its parameters have the padded axis")
    return _as_finite(node, state)


def over_batches(node: ir.Node, state: State) -> Tails:
    """Operators that treat the elements of axis 0 one by one, as one has channels and places behind it."""
    if set(state.of(node.inputs[0])) - {0} or any(state.of(v) for v in node.inputs[1:]):
        raise Unpaddable("it is over places or channels, and the padded axis is one of them")
    return _as_finite(node, state)


def _as_finite(node: ir.Node, state: State) -> Tails:
    parts = [t for v in node.inputs for t in state.of(v).values()]
    kept = FINITE if all(t.is_finite for t in parts) else ANY
    return dict.fromkeys(state.axes(node.outputs[0]), kept)


def transpose(node: ir.Node, state: State) -> Tails:
    rank = len(state.shape(node.inputs[0]))
    order = [int(axis) for axis in graphs.attribute(node, "perm", tuple(reversed(range(rank))))]
    return {order.index(axis): tail for axis, tail in state.of(node.inputs[0]).items()}


def reshape(node: ir.Node, state: State) -> Tails:
    """Reshape, Flatten, Squeeze, Unsqueeze: an axis stays one where as many elements lie behind it as before."""
    value, out = node.inputs[0], node.outputs[0]
    before, after = state.shape(value), state.shape(out)
    places = {int(np.prod(after[axis + 1 :], dtype=np.int64)): axis for axis in state.axes(out)}
    found: Tails = {}
    for axis, tail in state.of(value).items():
        behind = int(np.prod(before[axis + 1 :], dtype=np.int64))
        if behind not in places or before[axis] != after[places[behind]]:
            raise Unpaddable("it merges the padded axis with another one")
        found[places[behind]] = tail
    if len(found) != len(places):
        raise Unpaddable("it makes a padded axis of others")
    return found


def broadcast(node: ir.Node, state: State) -> Tails:
    """Expand."""
    value, out = _first(node), node.outputs[0]
    rank = len(state.shape(out))
    return {axis: _along(value, axis - rank, state) for axis in state.axes(out)}


def concat(node: ir.Node, state: State) -> Tails:
    axis = int(graphs.attribute(node, "axis", 0)) % len(state.shape(node.outputs[0]))
    if any(axis in state.of(v) for v in node.inputs):
        raise Unpaddable("it puts something behind the padded axis")
    axes = state.axes(node.outputs[0])
    return {each: either(state.of(v).get(each, FINITE) for v in node.inputs) for each in axes}


def split(node: ir.Node, state: State) -> Tails:
    axis = int(graphs.attribute(node, "axis", 0)) % len(state.shape(node.inputs[0]))
    if axis in state.of(node.inputs[0]):
        raise Unpaddable("it cuts the padded axis")
    return dict(state.of(node.inputs[0]))


def slice_(node: ir.Node, state: State) -> Tails:
    value, out = node.inputs[0], node.outputs[0]
    before, after = state.shape(value), state.shape(out)
    moved = [axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    steps = graphs.integers_of(graphs.input_of(node, 4)) or [1]
    starts = graphs.integers_of(graphs.input_of(node, 1)) or graphs.attribute(node, "starts", None)
    given = graphs.integers_of(graphs.input_of(node, 3)) or graphs.attribute(node, "axes", None)
    given = None if given is None else [int(axis) % len(before) for axis in given]
    padded_in, padded_out = set(state.of(value)), set(state.axes(out))
    found = {axis: tail for axis, tail in state.of(value).items() if axis in padded_out}
    if any(step != 1 for step in steps) and padded_in | padded_out:
        raise Unpaddable("it takes elements in another order or not each")
    for axis in padded_in.symmetric_difference(padded_out) | (padded_in & set(moved)):
        # The first elements of a padded axis are real ones, if they are no more than the smallest size has; a padded
        # axis cut out of a longer one has real elements first, if it starts where that does.
        place = given.index(axis) if given and axis in given else axis if given is None else None
        start = None if starts is None or place is None or place >= len(starts) else starts[place]
        enough = axis in padded_out or start is None or start + after[axis] <= state.extents.low
        if start is None or start < 0 or (axis in padded_out and start != 0) or not enough:
            raise Unpaddable("it cuts the padded axis elsewhere than at its beginning")
        if axis in padded_out:
            found[axis] = FINITE
    return found


def gather(node: ir.Node, state: State) -> Tails:
    value, indices, out = _first(node), node.inputs[1], node.outputs[0]
    rank, chosen = len(state.shape(value)), len(state.shape(indices))
    axis = int(graphs.attribute(node, "axis", 0)) % rank
    if axis in state.of(value):
        wanted = graphs.constant_of(indices)
        if wanted is None or wanted.size == 0 or wanted.min() < 0 or wanted.max() >= state.extents.low:
            raise Unpaddable("it picks elements of the padded axis that may not be real ones")
    found = {
        (each if each < axis else each + chosen - 1): tail for each, tail in state.of(value).items() if each != axis
    }
    found |= {axis + each: FINITE for each in state.of(indices)}
    if set(found) != set(state.axes(out)):
        raise Unpaddable("its padded axes are not clear")
    return found


def reduction(node: ir.Node, state: State) -> Tails:
    value = node.inputs[0]
    rank = len(state.shape(value))
    axes = graphs.integers_of(graphs.input_of(node, 1))
    if axes is None:
        axes = graphs.attribute(node, "axes", None)
    over = {int(axis) % rank for axis in (range(rank) if axes is None else axes)}
    for axis in over & set(state.of(value)):
        tail = state.of(value)[axis]
        if node.op_type in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare") and tail.is_zero:
            continue
        if node.op_type == "ReduceMax" and tail.is_low and value is not None:
            _leaves_something(value, tail, axis == rank - 1, state)
            continue
        raise Unpaddable("it is over the padded axis, and what is behind counts")
    kept = bool(graphs.attribute(node, "keepdims", 1))
    found: Tails = {}
    for axis, tail in state.of(value).items():
        if axis not in over:
            place = axis if kept else axis - sum(other < axis for other in over)
            found[place] = FINITE if tail.is_finite else ANY
    return found


def pad(node: ir.Node, state: State) -> Tails:
    before, after = state.shape(node.inputs[0]), state.shape(node.outputs[0])
    if any(before[axis] != after[axis] for axis in state.of(node.inputs[0])):
        raise Unpaddable("it puts something around the padded axis")
    return _as_finite(node, state)


def tile(node: ir.Node, state: State) -> Tails:
    before, after = state.shape(node.inputs[0]), state.shape(node.outputs[0])
    if any(before[axis] != after[axis] for axis in state.of(node.inputs[0])):
        raise Unpaddable("it repeats the padded axis")
    return {axis: state.of(node.inputs[0]).get(axis, FINITE) for axis in state.axes(node.outputs[0])}


def attention(node: ir.Node, state: State) -> Tails:
    """Attention without a cache: keys behind the real ones must be masked, or be later than every real query."""
    query, key, value = node.inputs[:3]
    mask = graphs.input_of(node, 3)
    if any(v is not None for v in node.inputs[4:]) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Unpaddable("it has a cache, or shows its scores")
    steps = [len(state.shape(v)) - 2 for v in (query, key, value)]
    inside = [set(state.of(v)) - {0, at} for v, at in zip((query, key, value), steps, strict=True)]
    if any(inside):
        raise Unpaddable("it sums over the padded axis")
    queries, keys, values = (at in state.of(v) for v, at in zip((query, key, value), steps, strict=True))
    if keys != values:
        raise Unpaddable("it has padded keys or values, not both")
    if keys:
        _masked_keys(node, mask, queries, state)
    parts = [t for v in node.inputs[:3] for t in state.of(v).values()]
    if keys and not all(t.is_finite for t in parts):
        raise Unpaddable("what is behind may not be finite")
    return dict.fromkeys(state.axes(node.outputs[0]), FINITE if all(t.is_finite for t in parts) else ANY)


def _masked_keys(node: ir.Node, mask: ir.Value | None, queries: bool, state: State) -> None:
    """Raises Unpaddable where real queries see padded keys."""
    if graphs.attribute(node, "is_causal", 0) and queries:
        return
    tail = None if mask is None else state.of(mask).get(len(state.shape(mask)) - 1)
    if tail is None:
        raise Unpaddable("its padded keys are not masked")
    hidden = tail.is_low or (tail.is_zero and tail.value is not None and tail.value.dtype == np.bool_)
    if not hidden or mask is None:
        raise Unpaddable("its padded keys are not masked")
    _leaves_something(mask, tail, True, state)


def rotary(node: ir.Node, state: State) -> Tails:
    """RotaryEmbedding: of every position on its own; its angles are read, or picked by position."""
    value = node.inputs[0]
    inside = {len(state.shape(value)) - 1}
    if len(state.shape(value)) == 4:
        inside.add(1)
    if inside & set(state.of(value)):
        raise Unpaddable("the padded axis is that of heads or of their elements")
    return _as_finite(node, state)


def recurrent(node: ir.Node, state: State) -> list[Tails]:
    """RNN, GRU, LSTM: sequences do not mix, and going forward a step knows none behind it."""
    x, hidden = state.of(node.inputs[0]), [state.of(v) for v in node.inputs[5:7]]
    mixed = any(set(tails) - {1} for tails in hidden) or any(state.of(v) for v in node.inputs[1:5])
    if graphs.attribute(node, "layout", 0) or set(x) - {0, 1} or mixed:
        raise Unpaddable("it mixes the elements of the padded axis")
    steps, batch = 0 in x, 1 in x or any(hidden)
    if steps and graphs.attribute(node, "direction", "forward") != "forward":
        raise Unpaddable("it begins at the padded end")
    if steps and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Unpaddable("its last state is read, which is that of a padded step")
    whole: Tails = ({0: FINITE} if steps else {}) | ({2: FINITE} if batch else {})
    return [whole, *([{1: FINITE}] * 2 if batch else [{}] * 2)]


def running_sum(node: ir.Node, state: State) -> Tails:
    """CumSum: from the beginning on, it never reaches what is behind."""
    if graphs.attribute(node, "reverse", 0):
        raise Unpaddable("it sums from the padded end")
    return _as_finite(node, state)


def _rules() -> Mapping[str, Rule]:
    found: dict[str, Rule] = dict.fromkeys(ALWAYS_FINITE | RISKY, elementwise)
    found |= dict.fromkeys(("MatMul", "MatMulNBits"), matmul)
    found |= dict.fromkeys(("Softmax", "LogSoftmax"), softmax)
    found |= dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"), normalization)
    found |= dict.fromkeys(
        ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "BatchNormalization",
         "InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth", "Resize"), over_batches,
    )  # fmt: skip
    found |= dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape)
    reductions = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
    found |= dict.fromkeys([f"Reduce{name}" for name in reductions], reduction)
    return found | {
        "Gemm": gemm, "Transpose": transpose, "Expand": broadcast, "Concat": concat, "Split": split, "Slice": slice_,
        "Gather": gather, "CumSum": running_sum, "Pad": pad, "Tile": tile, "Attention": attention,
        "RotaryEmbedding": rotary, "RNN": recurrent, "GRU": recurrent, "LSTM": recurrent,
    }  # fmt: skip


RULES = _rules()
