"""Half of erf(x / sqrt(2)), what GELU multiplies x by less a half, from a table in vector registers.

The form. `graphopt.normal_share(x)` is an operator of graphopt's own, float32 -> float32, elementwise, pure and
vectorisable. It is lowered to LLVM IR for AVX-512: |x| below END falls into one of 32 intervals, each of which has a
cubic through Chebyshev's nodes. A coefficient of 16 lanes is one VPERMI2PS from two registers. That is 14 instructions
where a polynomial for the whole range takes 24, and within 2e-7 of the exact value, as it is.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (VPERMI2PS).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from graphopt.targets.relax import own_operators

OPERATOR = "graphopt.normal_share"
END = 5.6
"""The function is 1/2 in float32 from here on."""
INTERVALS, DEGREE, LANES = 32, 3, 16
FEATURE = "avx512f"


def normal_share(x):
    """erf(x / sqrt(2)) / 2 of a float32 expression. Only for processors with FEATURE."""
    from tvm import tirx

    register()
    return tirx.call_intrin("float32", OPERATOR, x)


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process, as `lookup.register`."""
    own_operators.register(OPERATOR, "the normal distribution less a half", "normal_share", _lowered)


@lru_cache(maxsize=1)
def coefficients() -> np.ndarray:
    """float32 (DEGREE + 1, INTERVALS), of t ** 0 first, where t goes from 0 to 1 in each interval."""
    nodes = (np.cos((2 * np.arange(DEGREE + 1) + 1) * np.pi / (2 * DEGREE + 2)) + 1) / 2
    width = END / INTERVALS
    columns = []
    for interval in range(INTERVALS):
        values = [math.erf((interval + t) * width * math.sqrt(0.5)) / 2 for t in nodes]
        columns.append(np.polynomial.polynomial.polyfit(nodes, values, DEGREE))
    return np.array(columns).T.astype(np.float32)


def _lowered(body, features: frozenset[str]):
    from tvm import tirx

    definitions: dict[int, str] = {}

    def replacement(call, lanes: int):
        assert FEATURE in features, f"{OPERATOR} is for processors with {FEATURE}"
        definitions[LANES] = _vector()
        if lanes != LANES:
            definitions[lanes] = _of_vectors(lanes)
        return tirx.call_pure_extern("float32" if lanes == 1 else f"float32x{lanes}", _name(lanes), call.args[0])

    body = own_operators.replaced(body, OPERATOR, replacement)
    kind = _kind("float")
    declared = [f"declare {kind} @llvm.fma.v{LANES}f32({kind}, {kind}, {kind})",
                f"declare {kind} @llvm.x86.avx512.vpermi2var.ps.512({kind}, {_kind('i32')}, {kind})"]  # fmt: skip
    found = [definitions[lanes] for lanes in sorted(definitions, key=lambda n: (n != LANES, n))]
    return own_operators.importing(body, found, declared)


def _name(lanes: int) -> str:
    return f"graphopt_normal_share_{lanes}"


def _kind(element: str, lanes: int = LANES) -> str:
    return element if lanes == 1 else f"<{lanes} x {element}>"


def _float(number: float) -> str:
    """As LLVM IR writes a float32: the bits of the double of the same value."""
    return f"0x{int(np.float64(np.float32(number)).view(np.uint64)):016X}"


def _vector() -> str:
    floats, integers = _kind("float"), _kind("i32")

    def splat(element: str, text: str) -> str:
        return "<" + ", ".join([f"{element} {text}"] * LANES) + ">"

    def table(numbers: np.ndarray) -> str:
        return f"{floats} <" + ", ".join(f"float {_float(x)}" for x in numbers) + ">"

    least = splat("float", _float(np.nextafter(np.float32(END), np.float32(0)) - np.float32(1e-4)))
    lines = [
        f"define {floats} @{_name(LANES)}({floats} %x) {{",
        f"  %bits = bitcast {floats} %x to {integers}",
        f"  %unsigned = and {integers} %bits, {splat('i32', str(0x7FFFFFFF))}",
        f"  %size = bitcast {integers} %unsigned to {floats}",
        f"  %inside = fcmp olt {floats} %size, {least}",
        f"  %bounded = select <{LANES} x i1> %inside, {floats} %size, {floats} {least}",
        f"  %scaled = fmul {floats} %bounded, {splat('float', _float(INTERVALS / END))}",
        f"  %index = fptosi {floats} %scaled to {integers}",
        f"  %whole = sitofp {integers} %index to {floats}",
        f"  %t = fsub {floats} %scaled, %whole",
    ]
    for power, row in enumerate(coefficients()):
        lines.append(
            f"  %c{power} = call {floats} @llvm.x86.avx512.vpermi2var.ps.512({table(row[:LANES])}, "
            f"{integers} %index, {table(row[LANES:])})"
        )
    total = f"%c{DEGREE}"
    for power in range(DEGREE - 1, -1, -1):
        lines.append(f"  %s{power} = call {floats} @llvm.fma.v{LANES}f32({floats} {total}, {floats} %t, "
                     f"{floats} %c{power})")  # fmt: skip
        total = f"%s{power}"
    lines += [
        f"  %sign = and {integers} %bits, {splat('i32', str(-0x80000000))}",
        f"  %found = bitcast {floats} {total} to {integers}",
        f"  %signed = or {integers} %found, %sign",
        f"  %result = bitcast {integers} %signed to {floats}",
        f"  ret {floats} %result",
        "}",
    ]
    return "\n".join(lines)


def _of_vectors(lanes: int) -> str:
    """Any number of lanes by vectors of 16, the last one filled up."""
    kind, vector = _kind("float", lanes), _kind("float")
    lines = [f"define {kind} @{_name(lanes)}({kind} %x) {{"]
    if lanes == 1:
        lines += [f"  %v = insertelement {vector} zeroinitializer, float %x, i32 0",
                  f"  %r = call {vector} @{_name(LANES)}({vector} %v)",
                  f"  %e = extractelement {vector} %r, i32 0", "  ret float %e", "}"]  # fmt: skip
        return "\n".join(lines)
    whole = "poison"
    for number, start in enumerate(range(0, lanes, LANES)):
        taken = ", ".join(f"i32 {min(start + k, lanes - 1)}" for k in range(LANES))
        widened = ", ".join(f"i32 {k}" if k < LANES else "i32 poison" for k in range(lanes))
        placed = ", ".join(
            f"i32 {lanes + k - start}" if start <= k < start + LANES else f"i32 {k}" for k in range(lanes)
        )
        lines += [
            f"  %i{number} = shufflevector {kind} %x, {kind} poison, <{LANES} x i32> <{taken}>",
            f"  %r{number} = call {vector} @{_name(LANES)}({vector} %i{number})",
            f"  %x{number} = shufflevector {vector} %r{number}, {vector} poison, <{lanes} x i32> <{widened}>",
            f"  %w{number} = shufflevector {kind} {whole}, {kind} %x{number}, <{lanes} x i32> <{placed}>",
        ]
        whole = f"%w{number}"
    return "\n".join([*lines, f"  ret {kind} {whole}", "}"])
