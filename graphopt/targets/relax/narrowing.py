"""int32 to int8 with a zero point added and bounds kept: on ARM by saturating instructions, on vectors of 8 and 16.

The form. `graphopt.narrow_bytes(x, zero_point, least, largest)` is an operator of graphopt's own, int32 -> int8,
elementwise, pure and vectorisable: min(max(x + zero_point, least), largest). On ARM, such vectors become SQXTN to 16
bits, SQADD of the zero point and SQXTN to 8, each of which saturates, so that bounds cost something only where they are
narrower than the type: half the instructions of additions, minima and maxima in 32 bits. Elsewhere the operator is
these.

Source: Arm Architecture Reference Manual for A-profile, C7.2 (SQXTN, SQADD).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from graphopt.targets.relax import own_operators
from graphopt.targets.relax.rounding import in_one, shuffle

OPERATOR = "graphopt.narrow_bytes"


def narrowed(x, zero_point: int, least: int, largest: int):
    """int8 of an int32 expression plus `zero_point`, within the bounds."""
    from tvm import tirx

    register()
    numbers = (tirx.const(number, "int32") for number in (zero_point, least, largest))
    return tirx.call_intrin("int8", OPERATOR, x, *numbers)


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process."""
    own_operators.register(OPERATOR, "int32 to int8, with a zero point and bounds", "narrow_to_int8", _lowered)


def _lowered(body, features: frozenset[str]):
    from tvm import tirx

    definitions: dict[str, str] = {}

    def replacement(call, lanes: int):
        x, *numbers = call.args
        zero_point, least, largest = (_number(each) for each in numbers)
        if lanes not in (8, 16) or "asimd" not in features:
            return _plain(x, zero_point, least, largest, lanes)
        name = f"graphopt_narrow{lanes}_{zero_point}_{least}_{largest}".replace("-", "m")
        definitions[name] = _definition(name, lanes, zero_point, least, largest)
        return tirx.call_pure_extern(f"int8x{lanes}", name, x)

    body = own_operators.replaced(body, OPERATOR, replacement)
    return own_operators.importing(body, [definitions[name] for name in sorted(definitions)], _DECLARED)


def _number(constant: Any) -> int:
    """Of a constant, or of a vector of it."""
    from tvm import tirx

    scalar: Any = constant.value if isinstance(constant, tirx.Broadcast) else constant
    return int(scalar.value)


def _plain(x: Any, zero_point: int, least: int, largest: int, lanes: int):
    from tvm import tirx

    def spread(number: int) -> Any:
        wide: Any = lanes
        constant = tirx.const(number, "int32")
        return constant if lanes == 1 else tirx.Broadcast(constant, wide)

    whole = x + spread(zero_point) if zero_point else x
    bounded: Any = tirx.min(tirx.max(whole, spread(least)), spread(largest))
    return bounded.astype("int8" if lanes == 1 else f"int8x{lanes}")


_DECLARED = (
    "declare <4 x i16> @llvm.aarch64.neon.sqxtn.v4i16(<4 x i32>)",
    "declare <8 x i8> @llvm.aarch64.neon.sqxtn.v8i8(<8 x i16>)",
    "declare <8 x i16> @llvm.sadd.sat.v8i16(<8 x i16>, <8 x i16>)",
    *(f"declare <{n} x i8> @llvm.{f}.v{n}i8(<{n} x i8>, <{n} x i8>)" for n in (8, 16) for f in ("smax", "smin")),
)


def _definition(name: str, lanes: int, zero_point: int, least: int, largest: int) -> str:
    """LLVM IR."""
    lines, bytes_ = [], []
    point = ", ".join([f"i16 {zero_point}"] * 8)
    for first in range(0, lanes, 8):
        words = []
        for i in (first, first + 4):
            lines.append(f"%x{i} = {shuffle('%x', 'poison', f'<{lanes} x i32>', range(i, i + 4))}")
            lines.append(f"%w{i} = call <4 x i16> @llvm.aarch64.neon.sqxtn.v4i16(<4 x i32> %x{i})")
            words.append(f"%w{i}")
        joined, eight = in_one(words, 4, "i16")
        lines += joined
        if zero_point:
            lines.append(f"%z{first} = call <8 x i16> @llvm.sadd.sat.v8i16(<8 x i16> {eight}, <8 x i16> <{point}>)")
            eight = f"%z{first}"
        lines.append(f"%b{first} = call <8 x i8> @llvm.aarch64.neon.sqxtn.v8i8(<8 x i16> {eight})")
        bytes_.append(f"%b{first}")
    joined, last = in_one(bytes_, 8, "i8")
    lines += joined
    kind = f"<{lanes} x i8>"
    for bound, function, limit in ((least, "smax", -128), (largest, "smin", 127)):
        if bound != limit:
            bounds = ", ".join([f"i8 {bound}"] * lanes)
            lines.append(f"%{function} = call {kind} @llvm.{function}.v{lanes}i8({kind} {last}, {kind} <{bounds}>)")
            last = f"%{function}"
    body = "\n  ".join([*lines, f"ret {kind} {last}"])
    return f"define {kind} @{name}(<{lanes} x i32> %x) {{\n  {body}\n}}"
