"""Functions of a byte as tables of 256 bytes, read from vector registers.

Whatever elementwise operators do between DequantizeLinear and QuantizeLinear is a function from one byte to another.
Where that is long (Sigmoid, x * Sigmoid(x)), looking it up is faster than computing it, and exact.

The form. `graphopt.lookup(q, w0, ..., w63)` is an operator of graphopt's own, int32 -> int32, elementwise, pure and
vectorisable: its low byte is byte `q` of the table whose 64 little-endian words are w0 to w63, its other bytes are
arbitrary. `register` adds a pass at the end of TVM's pipeline for schedulable functions that imports a few lines of
LLVM IR for each table: with AVX-512 the 64 words are four registers, from which two VPERMI2D pick a word a lane, and
a shift by 8 * (q % 4) picks its byte; elsewhere each lane is a load.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (VPERMI2D).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from graphopt.capabilities import X86_FEATURES

OPERATOR = "graphopt.lookup"
WORDS = 64
LANES = 16


def looked_up(table: np.ndarray, dtype: str):
    """A function of an integer expression from 0 to 255: the entry of `table` (256 uint8 or int8), as `dtype`."""
    from tvm import tirx

    register()
    words = [tirx.const(int(word), "int32") for word in np.ascontiguousarray(table).view("<i4")]

    def apply(q):
        return tirx.call_intrin("int32", OPERATOR, q.astype("int32"), *words).astype(dtype)

    return apply


@lru_cache(maxsize=1)
def register() -> None:
    """Make the operator known to TVM and let TVM's pipeline lower it; once a process.

    A process that reads a function with the operator (from JSON, say) calls this first.
    """
    import tvm
    from tvm.ir import _ffi_api, register_op_attr
    from tvm.tirx import compilation_pipeline

    _ffi_api.RegisterOp(OPERATOR, "a byte of a table of 256")  # pyright: ignore[reportAttributeAccessIssue]
    register_op_attr(OPERATOR, "TVectorizable", True)
    register_op_attr(OPERATOR, "TCallEffectKind", 1)  # pure
    register_op_attr(OPERATOR, "TScriptPrinterName", "lookup_byte")
    stock = compilation_pipeline.PIPELINE_MAP["s_tir"]
    lowering = tvm.transform.module_pass(lambda module, _: _lower(module), opt_level=0, name="LowerLookup")

    def with_lowering():
        passes, host, device = stock()
        return tvm.transform.Sequential([passes, lowering]), host, device

    compilation_pipeline.register_tir_pipeline("s_tir", with_lowering)


def _lower(module):
    """Replace the operator in every function of a module."""
    from tvm import tirx

    for name, func in module.functions_items():
        if isinstance(func, tirx.PrimFunc):
            function: Any = func
            body = _lowered(function.body, _permutes(func))
            if not body.same_as(function.body):
                module.update_func(name, func.with_body(body))
    return module


def _permutes(func) -> bool:
    target = func.attrs.get("target") if func.attrs is not None else None
    mcpu = str(target.attrs.get("mcpu", "")) if target is not None else ""
    return "avx512f" in X86_FEATURES.get(mcpu, frozenset())


def _lowered(body, permutes: bool):
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import Call, Op

    operator = Op.get(OPERATOR)
    definitions: dict[str, str] = {}

    def rewrite(call):
        if not isinstance(call.op, Op) or not call.op.same_as(operator):
            return call
        lanes = int(call.ty.dtype.lanes)
        words = [int(getattr(word, "value", word)) for word in call.args[1:]]
        name = f"graphopt_lookup_{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}_{lanes}"
        definitions[name] = _definition(name, words, lanes, permutes)
        return tirx.call_pure_extern("int32" if lanes == 1 else f"int32x{lanes}", name, call.args[0])

    body = tvm_ffi.structural_map(body, (Call, rewrite))
    if not definitions:
        return body
    text: Any = "\n".join(definitions[name] for name in sorted(definitions))
    if permutes:
        text += "\ndeclare <16 x i32> @llvm.x86.avx512.vpermi2var.d.512(<16 x i32>, <16 x i32>, <16 x i32>)"
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", text, body)


def _definition(name: str, words: Sequence[int], lanes: int, permutes: bool) -> str:
    """LLVM IR; TVM marks what it imports as always inlined."""
    if lanes == 1:
        return _load(name, words)
    if permutes and lanes == LANES:
        return _permutation(name, words)
    part = LANES if permutes and lanes % LANES == 0 else 1
    inner = f"{name}_part"
    kind = "i32" if part == 1 else f"<{part} x i32>"
    lines = [_definition(inner, words, part, permutes), f"define <{lanes} x i32> @{name}(<{lanes} x i32> %q) {{"]
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

    permute = "@llvm.x86.avx512.vpermi2var.d.512"
    return f"""define {kind} @{name}({kind} %q) {{
  %word = lshr {kind} %q, {splat(2)}
  %low = call {kind} {permute}({tables[0]}, {kind} %word, {tables[1]})
  %high = call {kind} {permute}({tables[2]}, {kind} %word, {tables[3]})
  %upper = icmp ugt {kind} %q, {splat(127)}
  %found = select <{LANES} x i1> %upper, {kind} %high, {kind} %low
  %place = and {kind} %q, {splat(3)}
  %shift = shl {kind} %place, {splat(3)}
  %byte = lshr {kind} %found, %shift
  ret {kind} %byte
}}"""
