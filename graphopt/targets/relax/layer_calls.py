"""Which kernel computes which layer: found by the weights it reads.

Fusion renames and merges what the importer emits, but the constants stay the objects they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graphopt.targets.relax import pipeline


def layer_calls(module: Any, made_for: Iterable[tuple[Any, str]]) -> tuple[tuple[str, str], ...]:
    """The calls of kernels that `main` makes, in order: the kernel's name, and the label of its layer.

    A kernel's layer is the ONNX node that its largest constant was made for; '' where it has none.
    """
    labels = dict(made_for)
    found = []
    for name, arguments in pipeline.calls(module):
        held = [argument for argument in arguments if argument in labels]
        largest = max(held, key=_elements, default=None)
        found.append((name, "" if largest is None else labels[largest]))
    return tuple(found)


def _elements(constant: Any) -> int:
    count = 1
    for extent in constant.ty.shape.values:
        count *= int(extent)
    return count
