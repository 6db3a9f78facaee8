"""Functions of a byte as tables of 256 bytes, read from vector registers.

Whatever elementwise operators do between DequantizeLinear and QuantizeLinear is a function from one byte to another.
Where that is long (Sigmoid, x * Sigmoid(x)), looking it up is faster than computing it, and exact.

The form. `graphopt.lookup(q, w0, ..., w63)` is an operator of graphopt's own, int32 -> int32, elementwise, pure and
vectorisable: its low byte is byte `q` of the table whose 64 little-endian words are w0 to w63, its other bytes are
arbitrary. `register` adds a pass at the end of TVM's pipeline for schedulable functions that imports a few lines of
LLVM IR for each table: with AVX-512 the 64 words are four registers, from which two VPERMI2D pick a word a lane, and
a shift by 8 * (q % 4) picks its byte; on ARM the 256 bytes are sixteen registers, of which TBL and three TBX read four
each, 16 bytes at once: where a byte less 64, 128 or 192 is none of 0 to 63, TBX leaves what was found before. Elsewhere
each lane is a load.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (VPERMI2D); Arm Architecture Reference
Manual for A-profile, C7.2 (TBL, TBX).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from graphopt.targets.relax import own_operators

OPERATOR = "graphopt.lookup"
WORDS = 64
LANES = 16
"""That are looked up at once."""


def looked_up(table: np.ndarray, dtype: str):
    """A function of a byte, uint8 or int8: the entry of `table` (256 uint8 or int8), as `dtype`. An int8 stands for the
    entry of the same bits without a sign."""
    from tvm import tirx

    register()
    words = [tirx.const(int(word), "int32") for word in np.ascontiguousarray(table).view("<i4")]

    def apply(q):
        return tirx.call_intrin("int32", OPERATOR, q.astype("uint8").astype("int32"), *words).astype(dtype)

    return apply


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process.

    A process that reads a function with the operator (from JSON, say) calls this first.
    """
    own_operators.register(OPERATOR, "a byte of a table of 256", "lookup_byte", _lowered)


def _lowered(body, features: frozenset[str]):
    from tvm import tirx

    way = _WAYS["avx512f" if "avx512f" in features else "asimd" if "asimd" in features else ""]
    definitions: dict[str, str] = {}

    def replacement(call, lanes: int):
        words = [int(getattr(word, "value", word)) for word in call.args[1:]]
        name = f"graphopt_lookup_{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}_{lanes}"
        definitions[name] = _definition(name, words, lanes, way)
        return tirx.call_pure_extern("int32" if lanes == 1 else f"int32x{lanes}", name, call.args[0])

    body = own_operators.replaced(body, OPERATOR, replacement)
    found = [definitions[name] for name in sorted(definitions)]
    return own_operators.importing(body, found, way.declarations)


_KIND, _PERMUTE = "<16 x i32>", "@llvm.x86.avx512.vpermi2var.d.512"


@dataclass(frozen=True)
class _Way:
    """How a processor reads a table, by how many lanes at once; a single lane is always a load."""

    readers: Mapping[int, Callable[[str, Sequence[int]], str]]
    """The widest first."""
    declarations: Sequence[str] = ()


def _definition(name: str, words: Sequence[int], lanes: int, way: _Way) -> str:
    """LLVM IR; TVM marks what it imports as always inlined."""
    if lanes == 1:
        return _load(name, words)
    if lanes in way.readers:
        return way.readers[lanes](name, words)
    part = next((width for width in way.readers if lanes % width == 0), 1)
    inner = f"{name}_part"
    kind = "i32" if part == 1 else f"<{part} x i32>"
    lines = [_definition(inner, words, part, way), f"define <{lanes} x i32> @{name}(<{lanes} x i32> %q) {{"]
    whole = "poison"
    for start in range(0, lanes, part):
        n = start // part
        if part == 1:
            lines += [f"  %i{n} = extractelement <{lanes} x i32> %q, i32 {start}",
                      f"  %r{n} = call i32 @{inner}(i32 %i{n})",
                      f"  %w{n} = insertelement <{lanes} x i32> {whole}, i32 %r{n}, i32 {start}"]  # fmt: skip
        else:
            taken = ", ".join(f"i32 {start + k}" for k in range(part))
            placed = ", ".join(
                f"i32 {lanes + k - start}" if start <= k < start + part else f"i32 {k}" for k in range(lanes)
            )
            widened = ", ".join(f"i32 {k}" if k < part else "i32 poison" for k in range(lanes))
            lines += [
                f"  %i{n} = shufflevector <{lanes} x i32> %q, <{lanes} x i32> poison, <{part} x i32> <{taken}>",
                f"  %r{n} = call {kind} @{inner}({kind} %i{n})",
                f"  %x{n} = shufflevector {kind} %r{n}, {kind} poison, <{lanes} x i32> <{widened}>",
                f"  %w{n} = shufflevector <{lanes} x i32> {whole}, <{lanes} x i32> %x{n}, <{lanes} x i32> <{placed}>",
            ]
        whole = f"%w{n}"
    return "\n".join([*lines, f"  ret <{lanes} x i32> {whole}", "}"])


def _load(name: str, words: Sequence[int]) -> str:
    table = ", ".join(f"i32 {word}" for word in words)
    return f"""@{name}_table = private unnamed_addr constant [{WORDS} x i32] [{table}]
define i32 @{name}(i32 %q) {{
  %at = getelementptr i8, ptr @{name}_table, i32 %q
  %byte = load i8, ptr %at
  %wide = zext i8 %byte to i32
  ret i32 %wide
}}"""


def _permutation(name: str, words: Sequence[int]) -> str:
    kind = f"<{LANES} x i32>"
    tables = [
        f"{kind} <" + ", ".join(f"i32 {word}" for word in words[start : start + LANES]) + ">"
        for start in range(0, WORDS, LANES)
    ]

    def splat(number: int) -> str:
        return "<" + ", ".join([f"i32 {number}"] * LANES) + ">"

    return f"""define {kind} @{name}({kind} %q) {{
  %word = lshr {kind} %q, {splat(2)}
  %low = call {kind} {_PERMUTE}({tables[0]}, {kind} %word, {tables[1]})
  %high = call {kind} {_PERMUTE}({tables[2]}, {kind} %word, {tables[3]})
  %upper = icmp ugt {kind} %q, {splat(127)}
  %found = select <{LANES} x i1> %upper, {kind} %high, {kind} %low
  %place = and {kind} %q, {splat(3)}
  %shift = shl {kind} %place, {splat(3)}
  %byte = lshr {kind} %found, %shift
  ret {kind} %byte
}}"""


def _bytes_by_table(lanes: int, name: str, words: Sequence[int]) -> str:
    """Four registers of the table at a time, `lanes` bytes of 8 or 16; four lanes are the lower half of eight."""
    width = max(lanes, 8)
    kind, entries = f"<{width} x i8>", np.array(words, "<i4").view(np.uint8).reshape(4, 4, 16)

    def vector(numbers: Sequence[int]) -> str:
        return "<" + ", ".join(f"i8 {number}" for number in numbers) + ">"

    lines = [
        f"define <{lanes} x i32> @{name}(<{lanes} x i32> %q) {{",
        f"  %t = trunc <{lanes} x i32> %q to <{lanes} x i8>",
    ]
    index = "%t"
    if lanes < width:
        places = ", ".join(f"i32 {min(i, lanes)}" for i in range(width))
        lines.append(
            f"  %i = shufflevector <{lanes} x i8> %t, <{lanes} x i8> zeroinitializer, <{width} x i32> <{places}>"
        )
        index = "%i"
    found = ""
    for quarter, registers in enumerate(entries):
        tables = ", ".join(f"<16 x i8> {vector(register)}" for register in registers)
        at = index
        if quarter:
            at = f"%at{quarter}"
            lines.append(f"  {at} = sub {kind} {index}, {vector([64 * quarter - 256 * (quarter > 1)] * width)}")
        read = f"@llvm.aarch64.neon.tb{'x' if quarter else 'l'}4.v{width}i8"
        before = f"{kind} {found}, " if quarter else ""
        lines.append(f"  %f{quarter} = call {kind} {read}({before}{tables}, {kind} {at})")
        found = f"%f{quarter}"
    if lanes < width:
        places = ", ".join(f"i32 {i}" for i in range(lanes))
        lines.append(f"  %part = shufflevector {kind} {found}, {kind} poison, <{lanes} x i32> <{places}>")
        found = "%part"
    lines += [f"  %r = zext <{lanes} x i8> {found} to <{lanes} x i32>", f"  ret <{lanes} x i32> %r", "}"]
    return "\n".join(lines)


def _table_instructions(width: int) -> list[str]:
    kind, tables = f"<{width} x i8>", ", ".join(["<16 x i8>"] * 4)
    return [f"declare {kind} @llvm.aarch64.neon.tbl4.v{width}i8({tables}, {kind})",
            f"declare {kind} @llvm.aarch64.neon.tbx4.v{width}i8({kind}, {tables}, {kind})"]  # fmt: skip


_WAYS: Mapping[str, _Way] = {
    "avx512f": _Way({LANES: _permutation}, (f"declare {_KIND} {_PERMUTE}({_KIND}, {_KIND}, {_KIND})",)),
    "asimd": _Way(
        {lanes: partial(_bytes_by_table, lanes) for lanes in (16, 8, 4)},
        (*_table_instructions(16), *_table_instructions(8)),
    ),
    "": _Way({}),
}
"""By the extension of the processor that it needs."""
