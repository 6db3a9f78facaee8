"""Products of unsigned bytes with signed ones, four to a 32-bit lane, by the instructions that a processor has.

`uint8` bytes of the input are broadcast, a quad to every lane; `int8` weights are a quad a lane. What each adds to a
vector of 32-bit sums, in order of preference:

- `vnni`: VPDPBUSD, one instruction, exact (AVX512-VNNI on whole registers, AVX-VNNI on 32 bytes);
- `pairs`: VPMADDUBSW, then VPMADDWD by ones, then an addition. Two products are added in 16 bits, with saturation, so
  this is exact only where the weights of each pair are small enough (annotation PAIRS): those quantized to 7 bits are;
- `words`: the bytes of even and of odd places apart as 16-bit words, each multiplied by VPMADDWD: exact for all
  weights, which are stored as words. Taken from SSSE3 on (x86-64-v2); older processors have no template.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (VPDPBUSD, PMADDUBSW, PMADDWD).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from graphopt.targets.relax.integer_computes import PAIRS, QUAD
from graphopt.targets.schedules.workload import Machine

Way = Literal["vnni", "pairs", "words"]
_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256", 4: "llvm.x86.avx512.vpdpbusd.128"}
_PAIRS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}
_WORDS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


def way(machine: Machine, block: Any) -> Way | None:
    """The best exact way for the weights of an integer block; None where the machine is no x86 processor."""
    best = best_way(machine)
    return "words" if best == "pairs" and not int(block.annotations[PAIRS]) else best


def best_way(machine: Machine) -> Way | None:
    """The same for small weights."""
    features = machine.features
    if not features & {"ssse3", "avx2", "avx512f"}:
        return None
    if ("avx512_vnni" if machine.lanes == 16 else "avx_vnni") in features and machine.lanes > 4:
        return "vnni"
    if machine.lanes == 16 and "avx512bw" not in features:
        return None
    return "pairs"


def as_words(weight: np.ndarray) -> np.ndarray:
    """(..., 4 * n) int8 quads -> (..., 2, 2 * n) int16: the weights of even places, then those of odd ones."""
    quads = weight.reshape(*weight.shape[:-1], -1, 2, 2).astype(np.int16)  # quad, pair, place in the pair
    return np.ascontiguousarray(np.moveaxis(quads, -1, -3)).reshape(*weight.shape[:-1], 2, -1)


def products(way: Way, lanes: int, sums: Any, quad: Any, weights: list[Any]) -> Any:
    """`sums` (int32 x lanes) plus the products of `quad` (one int32 with four bytes) and a vector of weights.

    `weights` is one vector (int8 x 4 lanes), for `words` two (int16 x 2 lanes).
    """
    from tvm import tirx

    wide: Any = lanes
    spread = tirx.Broadcast(quad, wide)
    if way == "vnni":
        return _call(_VNNI[lanes], "int32", lanes, sums, _as("int8", QUAD * lanes, spread), weights[0])
    if way == "pairs":
        pairs = _call(_PAIRS[lanes], "int16", 2 * lanes, _as("int8", QUAD * lanes, spread), weights[0])
        count: Any = 2 * lanes
        ones = tirx.Broadcast(tirx.const(1, "int16"), count)
        return sums + _call(_WORDS[lanes], "int32", lanes, pairs, ones)
    low: Any = tirx.Broadcast(tirx.const(0x00FF00FF, "int32"), wide)
    eight: Any = tirx.Broadcast(tirx.const(8, "int32"), wide)
    even, odd = spread & low, (spread >> eight) & low
    for half, weight in zip((even, odd), weights, strict=True):
        sums = sums + _call(_WORDS[lanes], "int32", lanes, _as("int16", 2 * lanes, half), weight)
    return sums


def quad_at(buffer: Any, indices: tuple[Any, ...], quad: Any) -> Any:
    """Four neighbouring bytes along the last axis, the `quad`-th, as one int32."""
    from tvm import tirx

    four: Any = QUAD
    one = tirx.const(1, "int32")
    return tirx.reinterpret("int32", tirx.BufferLoad(buffer, [*indices, tirx.Ramp(quad * QUAD, one, four)]))


def _as(kind: str, lanes: int, vector: Any) -> Any:
    from tvm import tirx

    return tirx.reinterpret(f"{kind}x{lanes}", vector)


def _call(name: str, kind: str, lanes: int, *operands: Any) -> Any:
    from tvm import tirx

    return tirx.call_llvm_pure_intrin(f"{kind}x{lanes}", name, *operands)
