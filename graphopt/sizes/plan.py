"""Which functions a library is to have, and what is padded in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import model as models
from graphopt.errors import SpecError, nearest
from graphopt.sizes.extents import Extents
from graphopt.sizes.grammar import Range, parse
from graphopt.sizes.padding import Refusal, prove

Place = tuple[str, int]
"""An input, or an output, and an axis."""


@dataclass(frozen=True)
class Entry:
    """One function: the sizes of each dimension that it is used for; its own are the largest."""

    function: str
    sizes: Mapping[str, Range]

    @property
    def largest(self) -> dict[str, int]:
        return {name: high for name, (_, high) in self.sizes.items()}

    @property
    def smallest(self) -> dict[str, int]:
        return {name: low for name, (low, _) in self.sizes.items()}

    @property
    def is_padded(self) -> bool:
        return self.smallest != self.largest

    def __str__(self) -> str:
        return " ".join(f"{n}={low}" + (f"..{high}" if low < high else "") for n, (low, high) in self.sizes.items())


@dataclass(frozen=True)
class SizePlan:
    """`dimensions`: the places of each in the inputs; `shapes`: the inputs' declared shapes. `outputs` and `masks` are
    known once padding is proved: where outputs have a dimension, and the inputs that must leave something of each row;
    those in `first` must leave its first element."""

    dimensions: Mapping[str, tuple[Place, ...]]
    shapes: Mapping[str, tuple[int | str | None, ...]]
    entries: tuple[Entry, ...]
    outputs: Mapping[Place, str] = field(default_factory=dict)
    masks: frozenset[Place] = frozenset()
    first: frozenset[Place] = frozenset()

    @classmethod
    def of(cls, signature: models.Signature, texts: Sequence[str]) -> SizePlan:
        """Raises SpecError: unreadable, an unknown dimension, or one that is left open."""
        dimensions = _dimensions(signature)
        wanted = parse(texts)
        for name in {name for sizes in wanted for name in sizes}:
            if name not in dimensions:
                near = nearest(name, dimensions)
                known = ", ".join(dimensions) or "none"
                hint = f"did you mean {near!r}?" if near else f"its dynamic dimensions: {known}"
                raise SpecError(f"--sizes: the model has no dynamic dimension {name!r}", hint=hint)
        entries = []
        for number, sizes in enumerate(wanted):
            whole: dict[str, Range] = {}
            for name, places in dimensions.items():
                if name not in sizes and any(axis != 0 for _, axis in places):
                    raise SpecError(f"--sizes leaves the dimension {name!r} open", hint=f"say {name}=N too")
                whole[name] = sizes.get(name, (1, 1))
            entries.append(Entry(f"main_{number}", whole))
        return cls(dimensions, {spec.name: spec.shape for spec in signature.inputs}, tuple(entries))

    def input_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs where the dimensions have these sizes."""
        found = {name: list(shape) for name, shape in self.shapes.items()}
        for dimension, size in sizes.items():
            for name, axis in self.dimensions[dimension]:
                found[name][axis] = size
        return {name: tuple(int(d or 0) for d in shape) for name, shape in found.items()}

    @property
    def middle(self) -> Entry:
        """What is measured first, where no data says what sizes are usual."""
        return self.entries[len(self.entries) // 2]

    def proved(self, model: ir.Model, work: Path) -> SizePlan:
        """The plan with `outputs` and `masks` for `model`. Raises SpecError where a padded element would count."""
        outputs: dict[Place, str] = {}
        masks, first = set[Place](), set[Place]()
        for entry in self.entries:
            for dimension, (low, high) in entry.sizes.items():
                if low == high:
                    continue
                for others in ({**entry.largest}, {**entry.smallest}):
                    fixed = _others_fixed(model, self, {**others, dimension: high}, dimension)
                    places = self.dimensions[dimension]
                    found = prove(fixed, places, low, high, work)
                    if isinstance(found, Refusal):
                        raise SpecError(
                            f"--sizes {entry}: {dimension} cannot be padded up to {high}: {found.reason}"
                            + (f" (node {found.node!r})" if found.node else ""),
                            hint=f"list the sizes that matter: --sizes '{dimension}=A,B,C'",
                        )
                    masks |= found.masks
                    first |= found.first
                    extents = Extents.of(fixed, places, low, high)
                    for value in model.graph.outputs:
                        for axis in extents.axes(str(value.name)) or ():
                            outputs[str(value.name), axis] = dimension
                    if entry.largest == {**entry.smallest, dimension: high}:
                        break  # there is nothing else to vary
        return dataclasses.replace(self, outputs=outputs, masks=frozenset(masks), first=frozenset(first))

    def to_dict(self) -> dict[str, Any]:
        """As engine.json has it."""
        outputs: dict[str, list[list[Any]]] = {}
        for (name, axis), dimension in self.outputs.items():
            outputs.setdefault(name, []).append([axis, dimension])
        return {
            "dimensions": {name: [list(place) for place in places] for name, places in self.dimensions.items()},
            "outputs": outputs,
            "guards": [[*place, False] for place in sorted(self.masks)] + [[*p, True] for p in sorted(self.first)],
            "entries": {e.function: {n: list(r) for n, r in e.sizes.items()} for e in self.entries},
        }


def _dimensions(signature: models.Signature) -> dict[str, tuple[Place, ...]]:
    """The dynamic dimensions of the inputs; one without a name is called `input:axis`."""
    found: dict[str, list[Place]] = {}
    for spec in signature.inputs:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                found.setdefault(size or f"{spec.name}:{axis}", []).append((spec.name, axis))
    return {name: tuple(places) for name, places in found.items()}


def _others_fixed(model: ir.Model, plan: SizePlan, sizes: Mapping[str, int], dimension: str) -> ir.Model:
    """A copy of the model whose dimensions other than one are fixed."""
    fixed = model.clone()
    shapes = plan.input_shapes(sizes)
    moving = set(plan.dimensions[dimension])
    for value in fixed.graph.inputs:
        if value.name in shapes:
            name = str(value.name)
            own = [ir.SymbolicDim(dimension) if (name, i) in moving else d for i, d in enumerate(shapes[name])]
            value.shape = ir.Shape(own)
    return fixed
