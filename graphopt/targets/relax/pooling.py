"""Pooling, and sums, means and largest values over the positions of a picture."""

from __future__ import annotations

import numpy as np

from graphopt.targets.relax import (
    computes,
    elementwise,
    integer_layers,
    sliding_places,
)
from graphopt.targets.relax.emitters import Inputs, Node, emits, image, is_float_image, output_size, pads_of
from graphopt.targets.relax.shape_operators import reshaped
from graphopt.targets.relax.values import (
    ELEMENTWISE,
    FUSABLE_ROOT,
    Builder,
    Encoded,
    Value,
)


@emits("MaxPool", "AveragePool")
def pool(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    is_max = node.op_type == "MaxPool"
    if is_max and node.outputs > 1:
        return sliding_places.max_pool_with_places(builder, node, inputs)
    if data is None or not data.is_image or node.outputs > 1:
        return None
    if data.dtype != "float32" and not (is_max and data.dtype in computes.BYTES):
        return None
    assert data.shape is not None
    encoded, whole = data.encoded, data.shape
    data = data if encoded is None else encoded.source
    size, kernel = whole[2:], tuple(node.get("kernel_shape", ()))
    strides, dilations = tuple(node.get("strides", (1, 1))), tuple(node.get("dilations", (1, 1)))
    if len(kernel) != 2 or (not is_max and dilations != (1, 1)):
        return None
    ceil = bool(node.get("ceil_mode", 0))
    include = bool(node.get("count_include_pad", 0))
    if ceil and include:
        return None
    pads = pads_of(node, size, kernel, strides, dilations)
    out = output_size(size, kernel, strides, dilations, pads, ceil)
    reach = [(out[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 for a in range(2)]
    far = [max(pads[a + 2], reach[a] - size[a] - pads[a]) for a in range(2)]
    done = builder.call(
        computes.pool2d,
        builder.blocked(data),
        kind="max" if is_max else "average",
        size=size,
        kernel=kernel,
        strides=strides,
        pads=(pads[0], pads[1], far[0], far[1]),
        dilations=dilations,
        out_size=out,
        count_include_pad=include,
        zero_point=0 if encoded is None else encoded.zero_point,
        pattern=FUSABLE_ROOT,
    )
    shape = (*whole[:2], *out)
    if encoded is None:
        return image(builder, shape, done, data.dtype)
    if is_max:
        return [Value(shape, "float32", encoded=Encoded(image(builder, shape, done, data.dtype)[0], *encoded.scheme))]
    return image(builder, shape, _scaled(builder, done, encoded.scale))


@emits("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax")
def spatial_reduction(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data = inputs[0]
    if not is_float_image(data):
        return None
    assert data is not None and data.shape is not None
    keep = True
    if node.op_type.startswith("Reduce"):
        axes = node.get("axes", None)
        if axes is None and len(inputs) > 1 and inputs[1] is not None and inputs[1].const is not None:
            axes = inputs[1].const.tolist()
        if axes is None or sorted(a % 4 for a in axes) != [2, 3] or not data.is_blocked:
            return None
        keep = bool(node.get("keepdims", 1))
    encoded = data.encoded
    if node.op_type.endswith("Max") or node.op_type == "GlobalMaxPool":
        done = builder.call(computes.spatial_max, builder.blocked(data), pattern=FUSABLE_ROOT)
    else:
        mean = node.op_type != "ReduceSum"
        if encoded is None:
            done = builder.call(computes.spatial_sum, builder.blocked(data), mean=mean, pattern=FUSABLE_ROOT)
        else:
            found = integer_layers.spatial_sum(builder, data, encoded, mean)
            return [found] if keep else [reshaped(builder, found, data.shape[:2])]
    value = image(builder, (*data.shape[:2], 1, 1), done)[0]
    return [value] if keep else [reshaped(builder, value, data.shape[:2])]


def _scaled(builder: Builder, expression, factor: float):
    """A float32 Relax expression times a number, in registers."""

    def scale(x):
        return x * np.float32(factor)

    return builder.call(elementwise.mapped(scale, "scale"), expression, pattern=ELEMENTWISE, name="scale")
