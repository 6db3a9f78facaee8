"""Resize in blocked form: where each row and column comes from is a table made here, so a vector of channels is read
with plain loads, whatever the coordinates. What has no such form is `resize_axes`'s.
"""

from __future__ import annotations

import math

import numpy as np

from graphopt.targets.relax import computes, resize_axes
from graphopt.targets.relax.emitters import Inputs, Node, emits, image, is_float_image
from graphopt.targets.relax.resize_coordinates import COORDINATES, ROUNDINGS
from graphopt.targets.relax.values import FUSABLE_ROOT, INJECTIVE, Builder, Value

F = np.float32


@emits("Resize", "Upsample")
def resize(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    return _in_blocks(builder, node, inputs) or resize_axes.resized(builder, node, inputs)


def _in_blocks(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    mode, coordinates = _text(node, "mode", "nearest"), _text(node, "coordinate_transformation_mode", "half_pixel")
    moves = mode == "nearest" and data is not None and data.is_image and data.dtype in computes.BYTES
    if (
        node.op_type != "Resize"
        or not (is_float_image(data) or moves)
        or node.opset < 11
        or mode not in ("nearest", "linear")
    ):
        return None
    if coordinates not in COORDINATES or "axes" in node.attributes or node.get("antialias", 0):
        return None
    if _text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    assert data is not None and data.shape is not None
    found = _geometry(data.shape, inputs)
    if found is None:
        return None
    out, scales = found
    size = (int(data.shape[2]), int(data.shape[3]))
    originals = [COORDINATES[coordinates](np.arange(out[a], dtype=F), size[a], out[a], scales[a]) for a in (0, 1)]
    if mode == "nearest":
        rounding = _text(node, "nearest_mode", "round_prefer_floor")
        if rounding not in ROUNDINGS:
            return None
        tables = [
            np.clip(ROUNDINGS[rounding](x), 0, n - 1).astype(np.int32) for x, n in zip(originals, size, strict=True)
        ]
        constants = [builder.constant(table) for table in tables]
        made = builder.call(
            computes.gather_cells, builder.blocked(data), *constants, width=size[1], pattern=INJECTIVE, name="resize"
        )
        return image(builder, (*data.shape[:2], *out), made, data.dtype)
    constants = [builder.constant(table) for x, n in zip(originals, size, strict=True) for table in _neighbours(x, n)]
    # A root, so that no reader in another layout computes an element of it where vectors cannot help.
    made = builder.call(
        computes.blend_cells, builder.blocked(data), *constants, width=size[1], pattern=FUSABLE_ROOT, name="resize"
    )
    return image(builder, (*data.shape[:2], *out), made)


def _text(node: Node, key: str, default: str) -> str:
    value = node.get(key, default)
    return value.decode() if isinstance(value, bytes) else str(value)


def _geometry(shape, inputs: Inputs) -> tuple[tuple[int, int], tuple[np.float32, np.float32]] | None:
    """Output height and width, and both scales; None where they are not constant or channels change."""
    scales, sizes = (inputs[i] if len(inputs) > i else None for i in (2, 3))
    if sizes is not None and sizes.const is not None and sizes.const.size == 4:
        out = [int(v) for v in sizes.const]
        factors = [F(o) / F(i) for o, i in zip(out, shape, strict=True)]
    elif scales is not None and scales.const is not None and scales.const.size == 4:
        factors = [F(v) for v in scales.const]
        out = [math.floor(F(i) * f) for i, f in zip(shape, factors, strict=True)]
    else:
        return None
    if out[:2] != [int(v) for v in shape[:2]] or min(out) < 1:
        return None
    return (out[2], out[3]), (factors[2], factors[3])


def _neighbours(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each coordinate the index before, the one after, and how far it is towards the latter."""
    inside = np.clip(x, F(0), F(size - 1))
    before = inside.astype(np.int32)
    return before, np.minimum(before + 1, size - 1).astype(np.int32), inside - before.astype(F)
