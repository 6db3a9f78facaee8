"""Pixel shuffle.

    Reshape(x, [N, C, r, r, H, W]), Transpose 0,1,4,2,5,3, Reshape [N, C, rH, rW]  =  DepthToSpace(x, r, mode=CRD)
    Reshape(x, [N, r, r, C, H, W]), Transpose 0,3,4,1,5,2, Reshape [N, C, rH, rW]  =  DepthToSpace(x, r, mode=DCR)

With one channel the two are the same, and DCR, the only mode before opset 11, serves both. Only elements move: equal
bit for bit.

Conditions: C, r, H and W known, the batch the same before and after.
Reference: Shi et al., Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
Neural Network, CVPR 2016, section 3.2.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.fusion.pattern import Fusion, View, Writer, producer

ANCHORS = ("Reshape",)
OPSET = 1
_CRD, _DCR = (0, 1, 4, 2, 5, 3), (0, 3, 4, 1, 5, 2)


def match(node: ir.Node, view: View) -> Fusion | None:
    moved = producer(node.inputs[0], "Transpose")
    opened = producer(moved.inputs[0], "Reshape") if moved is not None else None
    perm = tuple(g.attribute(moved, "perm", ())) if moved is not None else ()
    if moved is None or opened is None or perm not in (_CRD, _DCR):
        return None
    source = opened.inputs[0]
    before, six, after = view.shape(source), view.shape(opened.outputs[0]), view.shape(node.outputs[0])
    if source is None or before is None or six is None or after is None or (len(before), len(six)) != (4, 6):
        return None
    sizes = before[1:]
    if not all(isinstance(size, int) for size in (*sizes, *six[1:])):
        return None
    size, channels = (six[2], six[1]) if perm == _CRD else (six[1], six[3])
    pair = (six[2], six[3]) if perm == _CRD else (six[1], six[2])
    if pair != (size, size) or six[0] != before[0] or six[4:] != before[2:]:
        return None
    if after != (before[0], channels, before[2] * size, before[3] * size):
        return None
    mode = "DCR" if perm == _DCR or channels == 1 else "CRD"
    needed = 11 if mode == "CRD" else OPSET

    def build(writer: Writer) -> ir.Value:
        attributes = {"blocksize": size} if mode == "DCR" else {"blocksize": size, "mode": mode}
        return writer.node("DepthToSpace", [source], attributes)

    return Fusion(node, frozenset([node, moved, opened]), needed, build)
