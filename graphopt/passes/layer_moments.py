"""What is computed of each layer from the moments of its input on calibration data, and kept with the data.

Returning layers to float, and searching, build variants of a model again and again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.model import digest
from graphopt.passes.base import Context
from graphopt.passes.quantization.moments import Moments, collect_moments, covariance_elements, in_parts
from graphopt.passes.weight_layers import WeightLayer, find_layers

T = TypeVar("T")

_moments: weakref.WeakKeyDictionary[Dataset, tuple[tuple[str, int], dict[str, Moments]]] = weakref.WeakKeyDictionary()
_results: weakref.WeakKeyDictionary[Dataset, dict[tuple, Any]] = weakref.WeakKeyDictionary()


def for_each_layer(
    model: ir.Model,
    layers: Sequence[WeightLayer],
    recipe: Hashable,
    compute: Callable[[WeightLayer, Moments | None], T],
    context: Context,
    uses_data: bool,
) -> dict[WeightLayer, T]:
    """`compute(layer, moments)` for all `layers`; without moments if there is no data or it is not used.

    `recipe` is all the result depends on besides model, data and seed. Raises ModelError and DataError as
    `collect_statistics` does.
    """
    found: dict[WeightLayer, T] = {}
    if context.data is None or not uses_data:
        with context.progress.task("change weights", len(layers)) as advance:
            for each in layers:
                found[each] = compute(each, None)
                advance(1)
        return found
    known = _results.setdefault(context.data, {})
    identity = digest(model)
    keys = {each: (identity, context.seed, recipe, each.name, len(each.sharers)) for each in layers}
    missing = [each for each in layers if keys[each] not in known]
    with context.progress.task("change weights", len(missing)) as advance:
        for each, moments in _moments_of(model, missing, context):
            known[keys[each]] = compute(each, moments)
            advance(1)
    return {each: known[keys[each]] for each in layers}


def _moments_of(
    model: ir.Model, wanted: Sequence[WeightLayer], context: Context
) -> Iterator[tuple[WeightLayer, Moments]]:
    """Each of `wanted` with the moments of its input on `context.data`, some layers at a time.

    All of the model's layers are measured: engines may fuse otherwise, and so round otherwise, where other values are
    watched, and what is excluded is to change nothing for the others. The moments of the last model asked for are kept
    with the data where they are small. Raises ModelError and DataError as `collect_statistics` does.
    """
    assert context.data is not None
    names = {each.name: each for each in wanted}
    key = digest(model), context.seed
    known_key, known = _moments.get(context.data, (None, {}))
    if known_key == key and names.keys() <= known.keys():
        yield from ((each, known[each.name]) for each in wanted)
        return
    everything = find_layers(model, "moments", (), ())[0]
    parts = list(in_parts(everything, lambda each: covariance_elements(each.groups, each.taps)))
    for part in parts:
        if not any(each.name in names for each in part):
            continue
        found = collect_moments(model, [each.layer for each in part], context.data, context.seed, context.progress)
        if len(parts) == 1:
            _moments[context.data] = key, {each.name: found[each.layer] for each in part}
        for each in part:
            moments = found.pop(each.layer)
            if each.name in names:
                yield names[each.name], moments
