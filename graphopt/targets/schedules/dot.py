"""Products of bytes, four to a 32-bit lane, by the instructions that a processor has.

Bytes of the input are broadcast, a quad to every lane; `int8` weights are a quad a lane. What each way adds to a vector
of 32-bit sums, in order of preference. On x86, where the input's bytes are unsigned:

- `vnni`: VPDPBUSD, one instruction, exact (AVX512-VNNI on whole registers, AVX-VNNI on 32 bytes);
- `pairs`: VPMADDUBSW, then VPMADDWD by ones, then an addition. Two products are added in 16 bits, with saturation, so
  this is exact only where the weights of each pair are small enough (annotation PAIRS): those quantized to 7 bits are;
- `words`: the bytes of even and of odd places apart as 16-bit words, each multiplied by VPMADDWD: exact for all
  weights, which are stored as words. Taken from SSSE3 on (x86-64-v2); older processors have no template.

On ARM, where they are signed:

- `sdot`: SDOT, one instruction; the quad is a lane of a register that holds four of them;
- `smlal`: a quad's two pairs apart. SMULL and SMLAL add the products of both, in 8 places of 16 bits, which hold them
  unless all four factors are -128 (annotation PAIRS); SADALP adds neighbours to the 32-bit sums. Weights are stored as
  pairs;
- `smull`: the same, each pair added by itself.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (VPDPBUSD, PMADDUBSW, PMADDWD); Arm
Architecture Reference Manual for A-profile, C7.2 (SDOT, SMULL, SMLAL, SADALP).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from graphopt.targets.relax.integer_computes import PAIRS, QUAD
from graphopt.targets.schedules.workload import Machine

Way = Literal["vnni", "pairs", "words", "sdot", "smlal", "smull"]
ARM_WAYS = ("sdot", "smlal", "smull")
_SAFER: dict[str, Way] = {"pairs": "words", "smlal": "smull"}
"""What is taken where products do not fit 16 bits."""
_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256", 4: "llvm.x86.avx512.vpdpbusd.128"}
_PAIRS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}
_WORDS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


def way(machine: Machine, block: Any) -> Way | None:
    """The best exact way for the weights of an integer block; None where the machine has none."""
    best = best_way(machine)
    if best in _SAFER and not int(block.annotations[PAIRS]):
        return _SAFER[best]
    return best


def best_way(machine: Machine) -> Way | None:
    """The same for small weights."""
    features = machine.features
    if "asimd" in features:
        return "sdot" if "asimddp" in features else "smlal"
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


def small_products(way: Way, lanes: int, sums: Any, quad: Any, weights: Any) -> Any:
    """The same as `products` for one vector of quads (int8 x 4 lanes) of weights from 0 to 15, whatever the way.

    Four products with such weights fit 16 bits: where they are made there, ADDP adds neighbours before SADALP does.
    """
    from tvm import tirx

    if way not in ("smlal", "smull"):
        return products(way, lanes, sums, quad, [weights])
    half: Any = 2 * lanes
    twice = _as("int8", 2 * lanes, tirx.Broadcast(quad, tirx.const(2, "int32")))
    name = f"llvm.aarch64.neon.smull.v{2 * lanes}i16"
    words = []
    for first in (0, 2 * lanes):
        part = tirx.Shuffle([weights], [tirx.const(first + i, "int32") for i in range(2 * lanes)])
        words.append(_call(name, "int16", half, twice, part))
    added = _call(f"llvm.aarch64.neon.addp.v{2 * lanes}i16", "int16", half, *words)
    return tirx.call_pure_extern(f"int32x{lanes}", "graphopt_sadalp", sums, added)


def as_pairs(weight: np.ndarray) -> np.ndarray:
    """(..., 4 * n) int8 quads -> (..., 2, 2 * n): the first pairs of all quads, then the second ones."""
    quads = weight.reshape(*weight.shape[:-1], -1, 2, 2)  # quad, pair, place in the pair
    return np.ascontiguousarray(np.moveaxis(quads, -2, -3)).reshape(*weight.shape[:-1], 2, -1)


def products(way: Way, lanes: int, sums: Any, quad: Any, weights: list[Any]) -> Any:
    """`sums` (int32 x lanes) plus the products of `quad` (one int32 with four bytes; for `smlal` and `smull` its pairs,
    a list of two int16) and a vector of weights.

    `weights` is one vector (int8 x 4 lanes); for `words` two (int16 x 2 lanes), for `smlal` and `smull` two (int8 x 2
    lanes).
    """
    from tvm import tirx

    wide: Any = lanes
    if way in ("smlal", "smull"):
        words = _words(lanes, quad, weights)
        for each in [words[0] + words[1]] if way == "smlal" else words:
            sums = tirx.call_pure_extern(f"int32x{lanes}", "graphopt_sadalp", sums, each)
        return sums
    spread = tirx.Broadcast(quad, wide)
    if way == "sdot":
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return _call(name, "int32", lanes, sums, weights[0], _as("int8", QUAD * lanes, spread))
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


DEFINITIONS = {
    "smlal": """define <4 x i32> @graphopt_sadalp(<4 x i32> %sums, <8 x i16> %words) {
  %r = call <4 x i32> asm sideeffect "sadalp $0.4s, $2.8h", "=w,0,w"(<4 x i32> %sums, <8 x i16> %words)
  ret <4 x i32> %r
}"""
}
DEFINITIONS["smull"] = DEFINITIONS["smlal"]
"""LLVM IR that a function with such products imports. The addition is written in assembly, or else the compiler, which
may add integers in any order, adds those of several quads first and has no registers for them. As a side effect, since
it is moved behind the products otherwise."""


def most_positions(way: Way) -> Callable[[int], int] | None:
    """How many positions' sums fit 32 registers beside the weights of some vectors of outputs, where products take more
    than a weight and a scalar: for `smlal` and `smull` a quad's weights are read together, two broadcast pairs are in
    use, and each position holds its quads in a register."""
    if way in ("smlal", "smull"):
        return lambda vectors: (29 - 2 * vectors) // (vectors + 1)
    return None


def _words(lanes: int, pairs: list[Any], weights: list[Any]) -> list[Any]:
    """int16 x 2 lanes for each pair: its products with the weights."""
    from tvm import tirx

    wide: Any = lanes
    found = []
    for pair, weight in zip(pairs, weights, strict=True):
        name = f"llvm.aarch64.neon.smull.v{2 * lanes}i16"
        found.append(_call(name, "int16", 2 * lanes, _as("int8", 2 * lanes, tirx.Broadcast(pair, wide)), weight))
    return found


def quads_at(buffer: Any, indices: tuple[Any, ...], first: Any, count: int) -> Any:
    """`count` neighbouring quads along the last axis, from the `first` on, as bytes."""
    from tvm import tirx

    whole: Any = QUAD * count
    return tirx.BufferLoad(buffer, [*indices, tirx.Ramp(first * QUAD, tirx.const(1, "int32"), whole)])


def quad_of(way: Way, quads: Any, lane: int) -> Any:
    """What `products` wants of one quad of a vector of bytes."""
    from tvm import tirx

    count = int(quads.ty.dtype.lanes) // QUAD
    if way in ("smlal", "smull"):
        pairs = tirx.reinterpret(f"int16x{2 * count}", quads)
        return [tirx.Shuffle([pairs], [tirx.const(2 * lane + half, "int32")]) for half in range(2)]
    if count == 1:
        return tirx.reinterpret("int32", quads)
    return tirx.Shuffle([tirx.reinterpret(f"int32x{count}", quads)], [tirx.const(lane, "int32")])


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
