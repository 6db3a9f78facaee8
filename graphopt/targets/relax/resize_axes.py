"""Resize and Upsample in ONNX's layout, one axis after the other: every mode, any number of axes.

Along an axis, each output is a weighted sum of a few inputs: which, and with what weights, are tables made here. With
antialias, where the axis shrinks, a filter is as much wider as the axis gets shorter. Coordinates are computed in
float32, as ONNX Runtime does.

Source: ONNX, Resize; Keys, "Cubic convolution interpolation for digital image processing" (1981), equation 15.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.targets.relax.emitters import Inputs, Node
from graphopt.targets.relax.resize_coordinates import COORDINATES, ROUNDINGS
from graphopt.targets.relax.values import INJECTIVE, Builder, Value

F = np.float32
_UNROLLED = 4
"""Weights of an output that are written out; more of them are a loop."""


@dataclass(frozen=True)
class Axis:
    """What happens to one axis."""

    index: int
    size: int
    out: int
    scale: np.float32
    roi: tuple[float, float] = (0.0, 1.0)

    @property
    def stays(self) -> bool:
        return self.size == self.out and self.scale == 1 and self.roi == (0.0, 1.0)


def resized(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    """The result; None where a size, a scale or the region is known at run time only. Raises ValueError for forms that
    ONNX does not define."""
    data = inputs[0]
    if data is None or not data.shape or 0 in data.shape:
        return None
    axes = axes_of(node, inputs, data.shape)
    if axes is None:
        return None
    shape = tuple(axis.out for axis in axes)
    if 0 in shape:
        return [Value(shape, data.dtype, const=np.zeros(shape, data.dtype))]
    mode = _text(node, "mode", "nearest")
    moving = [axis for axis in axes if not axis.stays]
    places = {axis.index: _originals(node, axis) for axis in moving}
    if mode == "nearest":
        tables = [_nearest(node, axis, places[axis.index]) for axis in moving]
        done = builder.call(
            _taken,
            builder.moved(data),
            *map(builder.constant, tables),
            shape=shape,
            axes=[axis.index for axis in moving],
            pattern=INJECTIVE,
            name="resize",
        )
    elif data.dtype in ("float32", "float64", "float16"):
        wide = "float32" if data.dtype == "float16" else data.dtype
        done = builder.call(_cast, builder.plain(data), dtype=wide, name="widen") if wide != data.dtype else None
        done = builder.plain(data) if done is None else done
        for axis in moving:
            cells, weights = _filter(node, mode, axis, places[axis.index])
            tables = [builder.constant(cells), builder.constant(weights.astype(wide))]
            done = builder.call(_blended, done, *tables, axis=axis.index, name="resize")
        done = builder.call(_cast, done, dtype=data.dtype, name="narrow") if wide != data.dtype else done
    else:
        raise ValueError(f"error: mode {mode} of {data.dtype}: how it rounds is not defined")
    if _text(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        inside = {a.index: (places[a.index] >= 0) & (places[a.index] <= a.size - 1) for a in moving}
        if not all(each.all() for each in inside.values()):
            masks = [builder.constant(each.astype(np.int8)) for each in inside.values()]
            value = float(node.get("extrapolation_value", 0.0))
            done = builder.call(_masked, done, *masks, axes=list(inside), value=value, name="resize_outside")
    return [Value(shape, data.dtype, plain=done)]


def axes_of(node: Node, inputs: Inputs, shape: Sequence[int]) -> list[Axis] | None:
    """Sizes and scales of every axis; None where they are not known."""
    rank = len(shape)
    named = [int(a) % rank for a in node.get("axes", range(rank))]
    old = node.op_type == "Upsample" or node.opset < 11
    operands = [None if i >= len(inputs) else inputs[i] for i in ((1,) if old else (2, 3, 1))]
    if any(v is not None and v.const is None for v in operands):
        return None
    arrays = [None if v is None or v.const is None or not v.const.size else v.const.reshape(-1) for v in operands]
    scales, sizes, roi = [*arrays, None, None][:3]
    if scales is None and node.op_type == "Upsample" and "scales" in node.attributes:
        scales = np.asarray(node.attributes["scales"], F)
    crops = _text(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    if (scales is None) == (sizes is None) or (crops and roi is None):
        return None
    found = [Axis(i, int(n), int(n), F(1)) for i, n in enumerate(shape)]
    given = scales if scales is not None else sizes
    if given is None or len(given) != len(named):
        return None
    factors = [F(n) if given is scales else F(n) / F(shape[a]) for n, a in zip(given, named, strict=True)]
    policy = _text(node, "keep_aspect_ratio_policy", "stretch")
    one = None if scales is not None or policy == "stretch" else (min if policy == "not_larger" else max)(factors)
    for i, (axis, factor) in enumerate(zip(named, factors, strict=True)):
        size = int(shape[axis])
        if one is not None:
            factor, out = one, math.floor(F(size) * one + F(0.5))
        elif sizes is not None:
            out = int(sizes[i])
        else:
            out = math.floor(F(size) * factor)
            if crops and abs(float(F(size) * factor) - out) > 1e-4:
                raise ValueError("error: tf_crop_and_resize by scales that give no whole size")
        region = (0.0, 1.0) if not crops or roi is None else (float(roi[i]), float(roi[i + len(named)]))
        found[axis] = Axis(axis, size, out, factor, region)
    return found


def _originals(node: Node, axis: Axis) -> np.ndarray:
    """Where each output lies among the inputs, float32."""
    old = node.op_type == "Upsample" or node.opset < 11
    mode = "asymmetric" if old else _text(node, "coordinate_transformation_mode", "half_pixel")
    x = np.arange(axis.out, dtype=F)
    if mode == "tf_crop_and_resize":
        start, end = (F(v) for v in axis.roi)
        last = F(axis.size - 1)
        if axis.out == 1:
            return np.full(1, F(0.5) * (start + end) * last, F)
        return start * last + x * (end - start) * last / F(axis.out - 1)
    if mode not in COORDINATES:
        raise ValueError(f"error: coordinates {mode}")
    return np.asarray(COORDINATES[mode](x, axis.size, axis.out, axis.scale), F)


def _nearest(node: Node, axis: Axis, places: np.ndarray) -> np.ndarray:
    old = node.op_type == "Upsample" or node.opset < 11
    rounding = "floor" if old else _text(node, "nearest_mode", "round_prefer_floor")
    if rounding not in ROUNDINGS:
        raise ValueError(f"error: nearest_mode {rounding}")
    return np.clip(ROUNDINGS[rounding](places), 0, axis.size - 1).astype(np.int32)


def _filter(node: Node, mode: str, axis: Axis, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each output its inputs, int32 (out, taps), and their weights, float64."""
    if mode not in ("linear", "cubic", "bilinear", "trilinear"):
        raise ValueError(f"error: mode {mode}")
    reach = 2 if mode == "cubic" else 1
    shrink = min(float(axis.scale), 1.0) if node.get("antialias", 0) else 1.0
    x = places.astype(np.float64)
    first = np.ceil(x) - 1  # the cell on the left is at a distance in (0, 1]
    start = math.floor(-reach / shrink) + 1
    steps = np.arange(start, 2 - start)
    away = np.abs((steps[None, :] - (x - first)[:, None]) * shrink)
    weights = _cubic(away, float(node.get("cubic_coeff_a", -0.75))) if reach == 2 else np.clip(1 - away, 0, None)
    cells = (first[:, None] + steps[None, :]).astype(np.int64)
    if node.get("exclude_outside", 0):
        weights = np.where((cells < 0) | (cells >= axis.size), 0, weights)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(cells, 0, axis.size - 1).astype(np.int32), weights


def _cubic(away: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel at these distances."""
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((a * away - 5 * a) * away + 8 * a) * away - 4 * a
    return np.where(away <= 1, near, np.where(away < 2, far, 0))


def _cast(data: Any, *, dtype: str) -> Any:
    from tvm import te

    return te.compute(data.shape, lambda *i: data(*i).astype(dtype), name="cast")


def _taken(data: Any, *tables: Any, shape: tuple[int, ...], axes: list[int]) -> Any:
    from tvm import te

    of_axis = dict(zip(axes, tables, strict=True))

    def element(*i: Any) -> Any:
        return data(*(of_axis[axis](place) if axis in of_axis else place for axis, place in enumerate(i)))

    return te.compute(shape, element, name="resize")


def _blended(data: Any, cells: Any, weights: Any, *, axis: int) -> Any:
    from tvm import te

    out, taps = (int(n) for n in cells.shape)
    shape = [out if i == axis else int(n) for i, n in enumerate(data.shape)]

    def term(i: Sequence[Any], tap: Any) -> Any:
        return data(*i[:axis], cells(i[axis], tap), *i[axis + 1 :]) * weights(i[axis], tap)

    if taps <= _UNROLLED:
        return te.compute(shape, lambda *i: sum((term(i, t) for t in range(1, taps)), term(i, 0)), name="resize")
    tap = te.reduce_axis((0, taps), "tap")
    return te.compute(shape, lambda *i: te.sum(term(i, tap), axis=tap), name="resize")


def _masked(data: Any, *masks: Any, axes: list[int], value: float) -> Any:
    from tvm import te, tirx

    def element(*i: Any) -> Any:
        inside = [mask(i[axis]) != tirx.const(0, "int8") for mask, axis in zip(masks, axes, strict=True)]
        other = tirx.const(value, str(data.dtype))
        return tirx.Select(inside[0] if len(inside) == 1 else tirx.all(*inside), data(*i), other)

    return te.compute(data.shape, element, name="resize_outside")


def _text(node: Node, key: str, default: str) -> str:
    value = node.get(key, default)
    return value.decode() if isinstance(value, bytes) else str(value)
