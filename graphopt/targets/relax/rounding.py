"""float32 to int32, rounded half to even: one instruction that TVM's own casts, which truncate, do not reach.

The form. `graphopt.round(x)` is an operator of graphopt's own, float32 -> int32, elementwise, pure and vectorisable.
`register` adds a pass at the end of TVM's pipeline for schedulable functions that makes CVTPS2DQ of it on x86, and
FCVTNS on ARM, at each width that code is generated for, and a rounding followed by a conversion elsewhere. |x| must be
below 2^31.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (CVTPS2DQ); Arm Architecture Reference
Manual for A-profile, C7.2 (FCVTNS).
"""

from __future__ import annotations

from functools import lru_cache

from graphopt.targets.relax import own_operators

OPERATOR = "graphopt.round"
_CALLS = {
    ("avx512f", 16): (
        "@llvm.x86.avx512.mask.cvtps2dq.512",
        ", <16 x i32> zeroinitializer, i16 -1, i32 4",
        ", <16 x i32>, i16, i32",
    ),
    ("avx2", 8): ("@llvm.x86.avx.cvt.ps2dq.256", "", ""),
    ("ssse3", 4): ("@llvm.x86.sse2.cvtps2dq", "", ""),
    ("avx2", 4): ("@llvm.x86.sse2.cvtps2dq", "", ""),
    ("asimd", 4): ("@llvm.aarch64.neon.fcvtns.v4i32.v4f32", "", ""),
    ("asimd", 8): ("@llvm.aarch64.neon.fcvtns.v4i32.v4f32", "", ""),
    ("asimd", 16): ("@llvm.aarch64.neon.fcvtns.v4i32.v4f32", "", ""),
}
"""By extension and lanes: LLVM's intrinsic, its further operands (all lanes; the current rounding mode) and their
types."""


def rounded(x):
    """int32 of a float32 expression below 2^31 in magnitude, rounded half to even."""
    from tvm import tirx

    register()
    return tirx.call_intrin("int32", OPERATOR, x)


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process.

    A process that reads a function with the operator (from JSON, say) calls this first.
    """
    own_operators.register(OPERATOR, "float32 to int32, half to even", "round_to_int32", _lowered)


def _lowered(body, features: frozenset[str]):
    from tvm import tirx

    known = {lanes: (feature, lanes) for feature, lanes in _CALLS if feature in features}
    widths: set[int] = set()

    def replacement(call, lanes: int):
        if lanes not in known:
            kind = "int32" if lanes == 1 else f"int32x{lanes}"
            return tirx.nearbyint(call.args[0]).astype(kind)
        widths.add(lanes)
        return tirx.call_pure_extern(f"int32x{lanes}", f"graphopt_round_{lanes}", call.args[0])

    body = own_operators.replaced(body, OPERATOR, replacement)
    found = [known[lanes] for lanes in sorted(widths)]
    return own_operators.importing(body, [_definition(*key) for key in found], [_declaration(*key) for key in found])


def _declaration(feature: str, lanes: int) -> str:
    name, _, types = _CALLS[feature, lanes]
    width = 4 if feature == "asimd" else lanes
    return f"declare <{width} x i32> {name}(<{width} x float>{types})"


def _definition(feature: str, lanes: int) -> str:
    """LLVM IR; TVM marks what it imports as always inlined."""
    name, operands, _ = _CALLS[feature, lanes]
    if feature == "asimd" and lanes > 4:
        return _in_quarters(name, lanes)
    single, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    return f"""define {whole} @graphopt_round_{lanes}({single} %x) {{
  %r = call {whole} {name}({single} %x{operands})
  ret {whole} %r
}}"""


def _in_quarters(name: str, lanes: int) -> str:
    """LLVM IR for 8 or 16 lanes of a function that takes four."""
    lines, parts = [], []
    for first in range(0, lanes, 4):
        part = shuffle("%x", "poison", f"<{lanes} x float>", range(first, first + 4))
        lines += [f"%x{first} = {part}", f"%r{first} = call <4 x i32> {name}(<4 x float> %x{first})"]
        parts.append(f"%r{first}")
    joined, result = in_one(parts, 4)
    body = "\n  ".join([*lines, *joined])
    return f"""define <{lanes} x i32> @graphopt_round_{lanes}(<{lanes} x float> %x) {{
  {body}
  ret <{lanes} x i32> {result}
}}"""


def in_one(parts: list[str], lanes: int, kind: str = "i32") -> tuple[list[str], str]:
    """LLVM IR that joins a power of two of vectors, and the name of the result."""
    lines = []
    while len(parts) > 1:
        joined = []
        for left, right in zip(parts[::2], parts[1::2], strict=True):
            joined.append(f"{left}j")
            lines.append(f"{left}j = {shuffle(left, right, f'<{lanes} x {kind}>', range(2 * lanes))}")
        parts, lanes = joined, 2 * lanes
    return lines, parts[0]


def shuffle(left: str, right: str, kind: str, places: range) -> str:
    """LLVM IR: elements of two vectors of one type, side by side."""
    numbers = ", ".join(f"i32 {i}" for i in places)
    return f"shufflevector {kind} {left}, {kind} {right}, <{len(places)} x i32> <{numbers}>"
