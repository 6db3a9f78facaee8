"""Where a dimension is an axis of a tensor, and what tensors hold that depend on its size alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphopt import graph as graphs
from graphopt import model as models
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.shapes.inferred import inferred_shapes
from graphopt.shapes.onnx_inference import infer_shapes

Shape = tuple[int, ...]
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
                     "Multinomial", "Dropout"})  # fmt: skip


@dataclass(frozen=True)
class Extents:
    """Of a model whose other dimensions are fixed: its tensors where the dimension is `low` and where it is `high`."""

    low: int
    high: int
    at_low: Mapping[str, Sequence[int | None]]
    at_high: Mapping[str, Sequence[int | None]]

    @classmethod
    def of(cls, model: ir.Model, places: Sequence[tuple[str, int]], low: int, high: int) -> Extents:
        """`places`: the inputs, and their axes, that have the dimension. Raises ModelError as `fix_inputs` does."""
        at = [inferred_shapes(models.fix_inputs(model, input_shapes(model, places, size))) for size in (low, high)]
        return cls(low, high, *at)

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor where the dimension is `high`; None where it is not known."""
        found = self.at_high.get(name)
        if found is None or any(d is None for d in found):
            return None
        return tuple(d for d in found if d is not None)

    def axes(self, name: str) -> tuple[int, ...] | None:
        """The axes of a tensor that are the dimension; None where a size is unknown, or another function of it."""
        small, large = self.at_low.get(name), self.at_high.get(name)
        if small is None or large is None or len(small) != len(large):
            return None
        found = []
        for axis, (a, b) in enumerate(zip(small, large, strict=True)):
            if a is None or b is None or (a != b and (a, b) != (self.low, self.high)):
                return None
            if a != b:
                found.append(axis)
        return tuple(found)


def input_shapes(model: ir.Model, places: Sequence[tuple[str, int]], size: int) -> dict[str, Shape]:
    """The shapes of the inputs that have a dimension, of which every other is fixed, where it is of this size."""
    found: dict[str, list[int]] = {}
    for name, axis in places:
        spec = next(s for s in models.signature(model).inputs if s.name == name)
        shape = found.setdefault(name, [d if isinstance(d, int) else size for d in spec.shape])
        shape[axis] = size
    return {name: tuple(shape) for name, shape in found.items()}


def without_data(model: ir.Model) -> set[ir.Value]:
    """The values that depend on shapes and constants alone."""
    found: set[ir.Value] = {v for v in model.graph.initializers.values() if not v.is_graph_input()}
    for node in model.graph:
        if graphs.holds_subgraphs(node) or node.op_type in _RANDOM:
            continue
        if graphs.is_onnx(node, "Shape", "Size") or all(v is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def evaluated(
    model: ir.Model, values: Sequence[ir.Value], places: Sequence[tuple[str, int]], sizes: Sequence[int], work: Path
) -> dict[int, dict[str, np.ndarray]]:
    """What values that no data reaches are, by size. Raises what ONNX Runtime does where it cannot compute them."""
    if not values:
        return {size: {} for size in sizes}
    copy = model.clone()
    infer_shapes(copy)
    by_name = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(by_name[v.name] for v in values)
    RemoveUnusedNodesPass()(copy)
    signature = models.signature(copy)
    path = work / "without-data.onnx"
    models.save(copy, path)
    run = OnnxRuntimeEngine(path, 1).run
    found = {}
    for size in sizes:
        shapes = input_shapes(model, places, size)
        feeds = {
            spec.name: np.zeros(shapes.get(spec.name, [d if isinstance(d, int) else 1 for d in spec.shape]), spec.dtype)
            for spec in signature.inputs
        }
        found[size] = run(feeds)
    return found
