"""Quantize a picture of up to four planes, pixel by pixel, a vector of pixels at a time.

Idea: neighbours in a plane are neighbours in memory, so a vector of each plane loads, scales and rounds at once; its
bytes are shifted to their place in a 32-bit lane and joined, and the lanes are the pixels as a dot product reads them.

Loop order: n, row (parallel) / vector of pixels / planes unrolled. The last vector of a row begins earlier instead of
being shorter. The frame is written row by row.

Register budget: none is planned; one vector a plane.

Source: ONNX operator QuantizeLinear; Intel 64 and IA-32 Architectures Optimization Reference Manual, section 17.6
(conversion between planar and interleaved pixels).
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax import rounding
from graphopt.targets.relax.integer_computes import PIXELS, QUAD, SCALE
from graphopt.targets.schedules.loops import loop, nest, rooted, sequence
from graphopt.targets.schedules.workload import PARALLEL_ELEMENTS, Decision, Kernel, Workload, work

NAME = "pixels"
VERSION = 1
ANCHOR = "pixels"


def match(workload: Workload) -> list[Decision] | None:
    """One decision, where the function is nothing but `pixels` and a row holds a vector."""
    block = workload.anchor(ANCHOR)
    if block is None or len(workload.blocks) > 1 or workload.machine.lanes < QUAD:
        return None
    return [{}] if int(block.annotations[PIXELS][1]) >= workload.machine.lanes else None


def apply(workload: Workload, decision: Decision) -> Kernel:
    """The function written anew."""
    from tvm import tirx

    block = workload.blocks[ANCHOR]
    height, width, top, left, bottom, right, zero_point = (int(x) for x in block.annotations[PIXELS])
    scale, lanes = float.fromhex(str(block.annotations[SCALE])), workload.machine.lanes
    data, out = list(workload.func.params)
    batch, channels = (int(d) for d in data.shape[:2])
    wide, high = left + width + right, top + height + bottom
    one: Any = tirx.const(1, "int32")
    many: Any = lanes
    whole_bytes: Any = QUAD * lanes
    kind = str(out.ty.dtype)
    blank = sum((zero_point & 255) << 8 * c for c in range(channels))

    def ramp(first: Any, count: Any) -> Any:
        return tirx.Ramp(tirx.const(first, "int32") if isinstance(first, int) else first, one, count)

    def store(n: Any, place: Any, pixels: Any) -> Any:
        zero = tirx.const(0, "int32")
        whole = ramp(place * QUAD, whole_bytes)
        return tirx.BufferStore(out, tirx.reinterpret(f"{kind}x{QUAD * lanes}", pixels), [n, zero, zero, whole])

    def spread(number: int) -> Any:
        signed = number - (1 << 32) if number >= 1 << 31 else number
        return tirx.Broadcast(tirx.const(signed, "int32"), many)

    def at(n: Any, y: Any, x: Any) -> Any:
        total: Any = None
        for c in range(channels):
            plane = tirx.const(c, "int32")
            level = _levels(tirx.BufferLoad(data, [n, plane, y, ramp(x, many)]), scale, zero_point, lanes, kind)
            placed = level << spread(8 * c) if c else level
            total = placed if total is None else total | placed
        return store(n, (y + top) * wide + left + x, total)

    def row(n: Any, y: Any) -> Any:
        full = width // lanes
        n, y = (tirx.const(i, "int32") if isinstance(i, int) else i for i in (n, y))
        body = [loop("x", full, lambda i: at(n, y, i * lanes))]
        if width % lanes:
            body.append(at(n, y, width - lanes))
        begin = (y + top) * wide
        return sequence([*_blank(n, begin, left), *body, *_blank(n, begin + left + width, right)])

    def _blank(n: Any, first: Any, count: int) -> list[Any]:
        """Pixels of the frame beside a row, one at a time."""
        found = []
        for i in range(count):
            zero = tirx.const(0, "int32")
            four: Any = QUAD
            quad: Any = tirx.const(blank - (1 << 32) if blank >= 1 << 31 else blank, "int32")
            place = tirx.Ramp((first + i) * QUAD, one, four)
            found.append(tirx.BufferStore(out, tirx.reinterpret(f"{kind}x4", quad), [n, zero, zero, place]))
        return found

    def edge(n: Any, first: int, rows: int) -> Any:
        """Whole rows of the frame: at least a vector wide, so the last one overlaps."""
        n = tirx.const(n, "int32") if isinstance(n, int) else n
        count = rows * wide
        body = [loop("x", count // lanes, lambda i: store(n, i * lanes + first * wide, spread(blank)))]
        if count % lanes:
            body.append(store(n, tirx.const(first * wide + count - lanes, "int32"), spread(blank)))
        return sequence(body)

    parallel = work(block) >= PARALLEL_ELEMENTS * QUAD and workload.machine.threads != 1
    parts = [nest({"n": batch, "y": height}, row, parallel)]
    for first, rows in ((0, top), (top + height, high - top - height)):
        if rows:
            parts.append(loop("n", batch, lambda n, first=first, rows=rows: edge(n, first, rows)))
    return Kernel(workload.func.with_body(rooted(sequence(parts))))


def _levels(x: Any, scale: float, zero_point: int, lanes: int, kind: str) -> Any:
    """`elementwise.quantize_of` to `kind` on a vector: int32 whose lowest byte it is, the others 0."""
    import numpy as np
    from tvm import tirx

    rounding.register()

    many: Any = lanes

    def spread(number: float) -> Any:
        return tirx.Broadcast(tirx.const(float(np.float32(number)), "float32"), many)

    least, largest = np.iinfo(kind).min, np.iinfo(kind).max
    bounded = tirx.max(tirx.min(x / spread(scale), spread(largest - zero_point)), spread(least - zero_point))
    whole: Any = tirx.call_intrin(f"int32x{lanes}", rounding.OPERATOR, bounded)
    level: Any = whole + tirx.Broadcast(tirx.const(zero_point, "int32"), many) if zero_point else whole
    return level & tirx.Broadcast(tirx.const(255, "int32"), many) if kind == "int8" else level
