"""bfloat16 in tensor expressions: stored as bfloat16, computed in float32.

The form. A tensor in memory has TVM's element type `bfloat16`. A kernel reads it through `widen(x)`, which is
`tirx.Cast("float32", x)` and becomes a move with zero extension and a shift; it computes in float32, and writes
`narrow(y)`, which is `reinterpret("bfloat16", graphopt.narrow(y))`: `graphopt.narrow` is an operator of graphopt's own,
float32 -> uint16, elementwise, pure and vectorisable. TVM's own cast to bfloat16 rounds with six integer operations and
turns some NaN into 0 or infinity, and its LLVM backend has no bfloat16 type, so the instruction cannot be named there.

How it is compiled. `register` adds one pass at the end of TVM's pipeline for schedulable functions, where calls have
their final vector width: where the target has avx512_bf16 it imports a few lines of LLVM IR (`fptrunc`, selected as
VCVTNEPS2BF16), elsewhere it writes the integer rounding out. Functions without the operator pass unchanged.

Numerics: round to nearest even; NaN stays NaN; infinities stay. VCVTNEPS2BF16 flushes denormal float32 to zero, the
integer form keeps them.

Source: Intel Architecture Instruction Set Extensions Programming Reference, VCVTNEPS2BF16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from graphopt.targets.relax import own_operators

OPERATOR = "graphopt.narrow"
FEATURE = "avx512_bf16"
DTYPE = "bfloat16"
HALF = "float16"
NARROW = (DTYPE, HALF)
"""What float32 images may be stored as."""


def widen(x):
    """float32 of a bfloat16 or float16 expression, exact; a float32 expression stays as it is."""
    return x.astype("float32")


def narrow(x):
    """bfloat16 of a float32 expression, rounded to nearest even."""
    from tvm import tirx

    register()
    return tirx.reinterpret(DTYPE, tirx.call_intrin("uint16", OPERATOR, x))


def cast(dtype: str):
    """A function from a float32 expression to a narrower one by the target's own conversion, nearest even."""
    return lambda x: x.astype(dtype)


def narrow_array(array: np.ndarray, dtype: str = DTYPE) -> np.ndarray:
    """A float array as float16, or numpy's (ml_dtypes') bfloat16, rounded to nearest even.

    float16 ends at 65504: larger numbers become infinite.
    """
    if dtype == HALF:
        with np.errstate(over="ignore"):
            return np.asarray(array, np.float32).astype(np.float16)
    import ml_dtypes

    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16)


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process.

    `narrow` does so by itself. A process that reads a function with the operator (from JSON, say) calls this first.
    """
    own_operators.register(OPERATOR, "float32 to bfloat16 bits, nearest even", "narrow_bfloat16", _lowered)


def _lowered(body, features: frozenset[str]):
    from tvm import tirx

    widths: set[int] = set()

    def replacement(call, lanes: int):
        if FEATURE not in features:
            return _rounded(call.args[0], lanes)
        widths.add(lanes)
        return tirx.call_pure_extern(_typed("uint16", lanes), _function(lanes), call.args[0])

    body = own_operators.replaced(body, OPERATOR, replacement)
    return own_operators.importing(body, [_definition(lanes) for lanes in sorted(widths)])


def _typed(kind: str, lanes: int) -> str:
    return kind if lanes == 1 else f"{kind}x{lanes}"


def _function(lanes: int) -> str:
    return f"graphopt_narrow_{lanes}"


def _definition(lanes: int) -> str:
    """LLVM IR; TVM marks what it imports as always inlined."""
    single, rounded, bits = ("float", "bfloat", "i16")
    if lanes > 1:
        single, rounded, bits = (f"<{lanes} x {kind}>" for kind in (single, rounded, bits))
    return f"""define {bits} @{_function(lanes)}({single} %x) {{
  %rounded = fptrunc {single} %x to {rounded}
  %bits = bitcast {rounded} %rounded to {bits}
  ret {bits} %bits
}}"""


def _rounded(x, lanes: int):
    """Nearest even by integers: add half of the last place, less one where the last kept bit is 0, and cut."""
    from tvm import tirx

    count: Any = lanes

    def splat(number: int) -> Any:
        scalar = tirx.const(number, "uint32")
        return scalar if lanes == 1 else tirx.Broadcast(scalar, count)

    name: Any = tirx.Var("narrowed", _typed("float32", lanes))
    bits: Any = tirx.Var("bits", _typed("uint32", lanes))
    high = bits >> splat(16)
    nearest: Any = (bits + splat(0x7FFF) + (high & splat(1))) >> splat(16)
    kept = tirx.Select(name != name, high | splat(0x40), nearest)  # a quiet NaN
    whole = tirx.Let(bits, tirx.reinterpret(_typed("uint32", lanes), name), kept)
    return tirx.Let(name, x, whole.astype(_typed("uint16", lanes)))
