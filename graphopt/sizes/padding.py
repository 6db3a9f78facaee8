"""A proof that a dimension may be padded: that the outputs for the real part are those of the unpadded model.

Every node is looked at once, in order. Of each tensor it is shown that its real elements are right, from what is known
of the elements behind those of its inputs (`rules`): attention masks make them so negative that Softmax gives them
zero, products with zero leave sums as they are, and so on. Whatever depends on sizes alone (causal masks, positions)
is computed for every size, and compared. A model in which a padded element would count is refused by name.

What is taken for granted: intermediate results are finite; scores are well below 1e4 in magnitude, where a mask adds
-1e4; and, checked at every call, masks leave something of every row (`hiders`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import graph as graphs
from graphopt import model as models
from graphopt.errors import ModelError, TargetError
from graphopt.sizes.extents import Extents, evaluated, without_data
from graphopt.sizes.rules import RULES, State, Unpaddable
from graphopt.sizes.tails import ANY, FINITE, LOW, Tail, same

_SHAPE_OPERANDS = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,),
    "ReduceSum": (1,), "ReduceMean": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceL1": (1,),
    "ReduceL2": (1,), "ReduceSumSquare": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "CumSum": (1,),
    "Resize": (2, 3), "Tile": (1,), "Pad": (1,),
}  # fmt: skip
"""By operator, the inputs that say what is done, not what with: their rules look at shapes."""


@dataclass(frozen=True)
class Padding:
    """A dimension may be padded with zeros. `masks`: the inputs, and their axes, that must leave something of every
    row; those in `first` must leave the first element."""

    masks: frozenset[tuple[str, int]] = frozenset()
    first: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class Refusal:
    """Why a dimension may not be padded, and the node, or the output, that forbids it."""

    reason: str
    node: str


def prove(model: ir.Model, places: Sequence[tuple[str, int]], low: int, high: int, work: Path) -> Padding | Refusal:
    """Whether sizes from `low` to `high` of a dimension may be computed as `high`, with inputs padded by zeros.

    `places`: the inputs, and their axes, that have the dimension; all other dimensions are fixed. Raises ModelError as
    `fix_inputs` does.
    """
    if low >= high:
        return Padding()
    extents = Extents.of(model, places, low, high)
    state = State(extents)
    for spec in models.signature(model).inputs:
        padded = [place for place in places if place[0] == spec.name]
        state.hiders.add_input(spec.name)
        state.tails[spec.name] = {place[1]: same(np.zeros(1, spec.dtype), frozenset({place})) for place in padded}
    fixed = without_data(model)
    try:
        _judge_fixed(model, fixed, places, state, work)
    except Unpaddable as why:
        return Refusal(*map(str, why.args))
    for node in model.graph:
        if all(value in fixed for value in node.outputs):
            continue
        try:
            _follow(node, state)
        except Unpaddable as why:
            return Refusal(f"{node.op_type}: {why}", node.name or str(node.outputs[0].name))
    for value in model.graph.outputs:
        if extents.axes(str(value.name)) is None:
            return Refusal("its shape depends on the size in another way than by having it as an axis", str(value.name))
    return Padding(frozenset(state.masks), frozenset(state.first))


def _follow(node: ir.Node, state: State) -> None:
    state.hiders.follow(node)
    inputs = [v for v in node.inputs if v is not None]
    touched = any(state.of(v) for v in inputs)
    if graphs.holds_subgraphs(node):
        raise Unpaddable("what is inside is not looked at")
    made = {i: v for i, v in enumerate(node.outputs) if v.name and (v.uses() or v.is_graph_output())}
    if not touched and not any(state.axes(v) for v in made.values()):
        return
    rule = RULES.get(node.op_type)
    if rule is None:
        raise Unpaddable("no rule says what it makes of padded elements")
    found = rule(node, state)
    for place, value in made.items():
        tails = found if isinstance(found, dict) else found[place]
        if set(tails) != set(state.axes(value)):
            raise Unpaddable("its padded axes are not clear")
        state.tails[str(value.name)] = dict(tails)


def _judge_fixed(
    model: ir.Model, fixed: set[ir.Value], places: Sequence[tuple[str, int]], state: State, work: Path
) -> None:
    """Look at what no data reaches, for every size. Raises Unpaddable, with the reason and the reader's name."""
    readers: dict[ir.Value, ir.Node] = {}
    for node in model.graph:
        if all(value in fixed for value in node.outputs):
            continue
        judged = [v for i, v in enumerate(node.inputs) if i not in _SHAPE_OPERANDS.get(node.op_type, ())]
        readers.update({v: node for v in judged if v in fixed and v.producer() is not None})
    for value in model.graph.outputs:
        if value in fixed and (producer := value.producer()) is not None:
            readers.setdefault(value, producer)
    low, high = state.extents.low, state.extents.high
    try:
        found = evaluated(model, list(readers), places, range(low, high + 1), work)
    except (ModelError, TargetError) as error:
        raise Unpaddable(f"what depends on sizes alone cannot be computed: {error}", "") from error
    for value, node in readers.items():
        name = str(value.name)
        arrays = {size: by_name[name] for size, by_name in found.items()}
        axes = _axes(arrays[low].shape, arrays[high].shape, low, high)
        label = node.name or str(node.outputs[0].name)
        if axes is None:
            raise Unpaddable(f"{node.op_type}: the shape of {name!r} depends on the size in another way", label)
        for size, array in arrays.items():
            whole = arrays[high][_first(axes, size, array.ndim)]
            if whole.shape != array.shape or not np.array_equal(whole, array, equal_nan=array.dtype.kind == "f"):
                raise Unpaddable(f"{node.op_type}: {name!r} depends on the size itself", label)
        state.hiders.add_fixed(name, arrays)
        state.tails[name] = {axis: _tail(arrays[high], axis, axes, range(low, high)) for axis in axes}


def _axes(small: tuple[int, ...], large: tuple[int, ...], low: int, high: int) -> tuple[int, ...] | None:
    if len(small) != len(large) or any(a != b and (a, b) != (low, high) for a, b in zip(small, large, strict=True)):
        return None
    return tuple(axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if a != b)


def _first(axes: Sequence[int], size: int, rank: int) -> tuple[slice, ...]:
    return tuple(slice(size) if axis in axes else slice(None) for axis in range(rank))


def _tail(array: np.ndarray, axis: int, axes: Sequence[int], sizes: Sequence[int]) -> Tail:
    """What lies behind the real elements of an axis, whichever of `sizes` they are."""
    lows, numbers, first = True, True, None
    for size in sizes:
        behind = array[
            tuple(
                slice(size, None) if each == axis else slice(size) if each in axes else slice(None)
                for each in range(array.ndim)
            )
        ]
        if behind.size == 0:
            continue
        first = behind.reshape(-1)[:1] if first is None else first
        if first.size and not (behind == first[0]).all():
            first = np.empty(0, array.dtype)
        lows &= array.dtype.kind == "f" and bool((behind <= LOW).all())
        numbers &= bool(np.isfinite(behind).all())
        if not (first.size or lows or numbers):
            return ANY
    if first is not None and first.size:
        return same(first)
    return Tail("low") if lows else FINITE if numbers else ANY
