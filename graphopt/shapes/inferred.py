"""The shapes of all values of a model, as far as shape inference and constant evaluation carry."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.shapes.constants import fold_constants, lift_constants
from graphopt.shapes.facts import ShapeFacts, store_known_vectors
from graphopt.shapes.inference import infer_facts

_MOST_ROUNDS = 50
_FOLDED_BYTES = 1 << 20


def inferred_shapes(model: ir.Model) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the main graph's values by name, None for each dimension that stays unknown.

    Where a shape depends on the contents of a tensor that is itself computed from shapes or constants, those contents
    are computed. `model` is not changed.
    """
    scratch = model.clone()
    for value in scratch.graph.outputs:  # a declared output may name dimensions that can be worked out
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    found: dict[str, tuple[int | None, ...]] = {}
    lift_constants(scratch)
    for _ in range(_MOST_ROUNDS):
        facts = infer_facts(scratch)
        _record(scratch, facts, found)
        if not store_known_vectors(scratch, facts) + fold_constants(scratch, _FOLDED_BYTES, computed=found):
            break
    return found


def _record(model: ir.Model, facts: ShapeFacts, found: dict[str, tuple[int | None, ...]]) -> None:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [v for node in model.graph for v in node.outputs if v.name]
    for value in values:
        shape = facts.shape(value)
        if shape is not None:
            found[str(value.name)] = tuple(d if isinstance(d, int) else None for d in shape)
