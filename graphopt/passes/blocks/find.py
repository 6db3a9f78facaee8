"""Residual blocks y = x + f(x) of a model: where they begin and end, what is inside, what they cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Skip
from graphopt.passes.layer_macs import layer_macs
from graphopt.shapes.inferred import inferred_shapes

KERNELS = (3, 1)
"""Sizes of the convolution that may stand for a block, the mildest change first."""
LAYERS = ("Conv", "Gemm", "MatMul")

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Block:
    """A residual block, by names: it means the same in the model's clones, and where other blocks were merged."""

    name: str
    """The label of the Add."""
    entry: str
    """The value x."""
    output: str
    """The Add's output y."""
    inner: tuple[str, ...]
    """One output of each node of f, in graph order."""
    layers: tuple[str, ...]
    """Labels of the Conv, Gemm and MatMul nodes of f."""
    channels: int
    places: int
    """Height times width of x, and of y."""
    macs: float
    """Multiply-accumulates of f, for one sample."""

    def merged_macs(self, kernel: int) -> float:
        """Multiply-accumulates of a kernel x kernel convolution in its place, for one sample."""
        return float(self.channels**2 * kernel**2 * self.places)

    def overlaps(self, other: Block) -> bool:
        """Whether one is inside the other."""
        return self.output in other.inner or other.output in self.inner


def find_blocks(model: ir.Model, exclude: Collection[str] = ()) -> tuple[list[Block], list[Skip], float]:
    """The blocks in graph order, why other additions of two computed values are none, and the model's MACs.

    `exclude`: labels of Adds, and of nodes inside, whose blocks are left alone.
    """
    shapes, macs = inferred_shapes(model), layer_macs(model)
    order = {node: index for index, node in enumerate(model.graph)}
    found: list[Block] = []
    skipped: list[Skip] = []
    for add in model.graph:
        if not g.is_onnx(add, "Add") or any(_is_constant(value) for value in add.inputs):
            continue
        tried = [_block(add, side, order, shapes, macs, exclude) for side in (0, 1)]
        blocks = [each for each in tried if isinstance(each, Block)]
        found += blocks[:1]
        # Of two refusals the more telling is that of the side on which something lies between the Add's inputs.
        if not blocks:
            skipped.append(Skip(g.label(add), max((str(each) for each in tried), key=lambda r: r != _APART)))
    return found, skipped, float(sum(macs.values()))


_APART = "neither of its inputs is made from the other alone"


def _block(
    add: ir.Node,
    side: int,
    order: dict[ir.Node, int],
    shapes: dict[str, Dims],
    macs: dict[ir.Node, float],
    exclude: Collection[str],
) -> Block | str:
    """The block whose x is the Add's input `side`; or why there is none."""
    entry, branch = add.inputs[side], add.inputs[1 - side]
    assert entry is not None and branch is not None
    inner = _between(entry, branch, order)
    if inner is None:
        return _APART
    inside = sorted(inner, key=order.__getitem__)
    layers = [node for node in inside if g.is_onnx(node, *LAYERS)]
    if not any(node.op_type == "Conv" for node in layers):
        return "there is no convolution inside"
    refusal = _refuses(add, inside) or _shape_refusal(entry, branch, add.outputs[0], layers, shapes)
    if refusal is not None:
        return refusal
    if any(g.label(node) in exclude for node in (add, *inside)):
        return "excluded by name"
    _, channels, height, width = shapes[str(entry.name)]
    assert channels is not None and height is not None and width is not None
    batch = shapes[str(entry.name)][0] or 1  # a dynamic batch counts as one
    block = Block(
        g.label(add),
        str(entry.name),
        str(add.outputs[0].name),
        tuple(next(str(value.name) for value in node.outputs if value.name) for node in inside),
        tuple(g.label(node) for node in layers),
        channels,
        height * width,
        sum(macs.get(node, 0.0) for node in inside) / batch,
    )
    if block.merged_macs(min(KERNELS)) >= block.macs:
        return "one convolution would be no less arithmetic"
    return block


def _between(entry: ir.Value, branch: ir.Value, order: dict[ir.Node, int]) -> set[ir.Node] | None:
    """The nodes that make `branch` out of `entry` and constants; None where it needs anything else."""
    maker = entry.producer()
    first = -1 if maker is None else order[maker]
    inner: set[ir.Node] = set()
    waiting: list[ir.Value] = [branch]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is entry or _is_constant(value) or node in inner:
            continue
        if node is None or order.get(node, -1) < first:  # made before x is: not from x
            return None
        inner.add(node)
        waiting += [each for each in node.inputs if each is not None]
    return inner if any(value is entry for node in inner for value in node.inputs) else None


def _refuses(add: ir.Node, inside: list[ir.Node]) -> str | None:
    known = set(inside)
    for node in inside:
        if g.holds_subgraphs(node):
            return f"{g.label(node)!r} inside holds a subgraph"
        for value in node.outputs:
            if value.is_graph_output():
                return f"{value.name!r} inside is an output of the model"
            for usage in value.uses():
                if usage.node is not add and usage.node not in known:
                    return f"{value.name!r} inside is also read by {g.label(usage.node)!r}"
    return None


def _shape_refusal(
    entry: ir.Value, branch: ir.Value, output: ir.Value, layers: list[ir.Node], shapes: dict[str, Dims]
) -> str | None:
    """Why x, f(x) and y are not float32 images of one known size."""
    own = shapes.get(str(entry.name))
    if own is None or shapes.get(str(branch.name)) is None:
        return "its shapes are not known"
    if len(own) != 4:
        return f"it has {len(own)} dimensions, only images of shape (N, C, H, W) are done"
    if any(d is None for d in own[1:]):
        return "channels, height or width depend on the data; fix the dynamic dimensions"
    for value in (branch, output):
        shape = shapes.get(str(value.name))
        if shape is None or shape[1:] != own[1:] or len(shape) != 4 or (shape[0] or own[0]) != (own[0] or shape[0]):
            return f"{value.name!r} has another shape than {entry.name!r}"
    values = [entry, branch, output, *(value for node in layers for value in node.inputs if value is not None)]
    if any(value.dtype not in (None, ir.DataType.FLOAT) for value in values):
        return "its values are not float32"
    return None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and g.tensor_of(value) is not None and not value.is_graph_input()
