"""What a measured decision is valid for: the computation by meaning, and the processor by what its code may use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.targets.schedules.workload import Workload

_CLASSES: tuple[tuple[str, frozenset[str]], ...] = (
    ("avx512-amx", frozenset({"avx512f", "amx_bf16"})),
    ("avx512-bf16", frozenset({"avx512f", "avx512_bf16"})),
    ("avx512-vnni", frozenset({"avx512f", "avx512_vnni"})),
    ("avx512", frozenset({"avx512f"})),
    ("avx2-vnni", frozenset({"avx2", "avx_vnni"})),
    ("avx2", frozenset({"avx2"})),
)
"""Richest first."""


def isa_class(arch: str, features: frozenset[str]) -> str:
    """The class of processors that share decisions: those whose code uses the same vectors and dot products."""
    if arch == "aarch64":
        return "neon-i8mm" if "i8mm" in features else "neon-dot" if "asimddp" in features else "neon"
    return next((name for name, needed in _CLASSES if needed <= features), "sse")


def workload_digest(workload: Workload, constants: Iterable[int] = (), without: Iterable[str] = ()) -> str:
    """Digest of a kernel, 24 hexadecimal digits: equal for equal computations, whatever their names, in every process.

    `constants` are the indices of parameters that hold constants (a template may have them repacked). `without` are
    ideas switched off: what they leave of the space is another search. Kernels of bytes are equal whatever the scales
    and zero points that their elementwise parts are made for: time does not depend on them, and they differ from
    layer to layer.
    """
    import tvm_ffi

    func = workload.func
    for attribute in ("global_symbol", "op_pattern"):
        if func.attrs is not None and attribute in func.attrs:
            func = func.without_attr(attribute)
    blocks = list(workload.blocks)  # templates know blocks by name
    parameters = [(str(p.ty.dtype), *map(str, p.ty.shape)) for p in func.params]
    if any(kind in _BYTES for kind, *_ in parameters):
        func = _without_numbers(func)
    structure = tvm_ffi.structural_hash(func) & (1 << 64) - 1  # names do not enter it
    content = (structure, blocks, parameters, sorted(set(constants)), sorted(without))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


_BYTES = ("uint8", "int8")


def _without_numbers(func):
    """The function with 0 for every number in what its elementwise blocks store, and no annotation of a block.

    Indices keep theirs: they are geometry.
    """
    import tvm_ffi
    from tvm import s_tir, tirx
    from tvm.ir.expr import TensorLoad

    def masked(store):
        loads: list[tuple[object, object]] = []

        def named(load):
            name = tirx.Var(f"load{len(loads)}", load.ty.dtype)
            loads.append((name, load))
            return name

        def zero(number):
            return type(number)(number.ty.dtype, 0)

        def restored(name):
            return next((load for known, load in loads if name.same_as(known)), name)

        value = tvm_ffi.structural_map(store.value, (TensorLoad, named))
        value = tvm_ffi.structural_map(value, [(tirx.FloatImm, zero), (tirx.IntImm, zero)])
        value = tvm_ffi.structural_map(value, (tirx.Var, restored))
        return tirx.BufferStore(store.buffer, value, store.indices)

    def block(found):
        if found.name_hint == "root" or found.init is not None or not isinstance(found.body, tirx.BufferStore):
            return found
        return s_tir.SBlock(found.iter_vars, found.reads, found.writes, found.name_hint, masked(found.body))

    return tvm_ffi.structural_map(func, (s_tir.SBlock, block))
