"""ConvTranspose whose padding follows from `output_shape` or `auto_pad`, as one that says its `pads`.

    total = stride (size - 1) + output_padding + dilation (kernel - 1) + 1 - output_shape

Half of it at each end of an axis; where it is odd, the larger half at the start, with SAME_UPPER at the end. Without
`output_shape`, SAME_* means size * stride. Where the total is negative, there are so many places more behind the last
product, as `output_padding` makes them.

Source: ONNX, ConvTranspose.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from graphopt.targets.relax.nodes import attributes


def with_pads(node: onnx.NodeProto, data: Sequence[int], weight: Sequence[int]) -> onnx.NodeProto:
    """The node itself where its padding is explicit; `data` and `weight` are the shapes (N, C, ...), (C, M, ...)."""
    given = attributes(node)
    mode = given.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if "output_shape" not in given and not mode.startswith("SAME"):
        return node
    size, kernel = data[2:], weight[2:]
    ones = (1,) * len(size)
    strides, dilations = given.get("strides", ones), given.get("dilations", ones)
    wanted = given.get("output_shape", [n * s for n, s in zip(size, strides, strict=True)])[-len(size) :]
    extra = given.get("output_padding", (0,) * len(size))
    start, end, behind = [], [], []
    for n, k, s, d, out, more in zip(size, kernel, strides, dilations, wanted, extra, strict=True):
        total = s * (n - 1) + more + d * (k - 1) + 1 - out
        behind.append(more + max(-total, 0))
        total = max(total, 0)
        small, large = total // 2, total - total // 2
        start.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    explicit = onnx.NodeProto()
    explicit.CopyFrom(node)
    del explicit.attribute[:]
    replaced = ("output_shape", "auto_pad", "pads", "output_padding")
    explicit.attribute.extend(a for a in node.attribute if a.name not in replaced)
    explicit.attribute.append(onnx.helper.make_attribute("pads", [*start, *end]))
    explicit.attribute.append(onnx.helper.make_attribute("output_padding", behind))
    return explicit
