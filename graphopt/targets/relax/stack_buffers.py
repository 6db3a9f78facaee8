"""Small local buffers stay on the stack, where LLVM turns them into registers.

TVM puts a buffer of 1 KB or more (16 vectors of AVX-512: the accumulators of most tiles) into memory from its workspace
pool. LLVM keeps such memory in registers only where it can prove that no other pointer reaches it, which it cannot in
the body of a parallel loop: there every multiply-add is stored, and speed falls to a third. `register` adds a pass at
the end of TVM's pipeline for schedulable functions that marks these buffers as not to be lowered.

Applies to buffers of scope `local`, of a constant size of at most 16 KB.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

MOST_BYTES = 16 << 10
"""Far below a thread's stack of 8 MB (512 KB on some systems), above any register tile and its copy."""
KEPT = "disable_lower_builtin"
"""TVM's own annotation of an allocation that the code generator, not its runtime, makes."""


@lru_cache(maxsize=1)
def register() -> None:
    """Let TVM's pipeline keep small local buffers on the stack; once a process."""
    import tvm
    from tvm.tirx import compilation_pipeline

    stock = compilation_pipeline.PIPELINE_MAP["s_tir"]
    marking = tvm.transform.module_pass(lambda module, _: _mark(module), opt_level=0, name="KeepLocalBuffersOnStack")

    def with_marking():
        passes, host, device = stock()
        return tvm.transform.Sequential([passes, marking]), host, device

    compilation_pipeline.register_tir_pipeline("s_tir", with_marking)


def _mark(module):
    import tvm_ffi
    from tvm import tirx

    for name, func in module.functions_items():
        if isinstance(func, tirx.PrimFunc):
            function: Any = func
            body = tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, _kept))
            if not body.same_as(function.body):
                module.update_func(name, function.with_body(body))
    return module


def _kept(allocation):
    from tvm import tirx

    nbytes = _bytes(allocation.buffer)
    if allocation.buffer.scope() != "local" or nbytes is None or not 0 < nbytes <= MOST_BYTES:
        return allocation
    return tirx.AllocBuffer(allocation.buffer, {**dict(allocation.annotations), KEPT: tirx.const(True, "bool")})


def _bytes(buffer) -> int | None:
    """Size of a buffer; None where it is not constant."""
    import tvm
    from tvm import tirx

    if not all(isinstance(d, tirx.IntImm) for d in buffer.shape):
        return None
    element = tvm.DataType(str(buffer.dtype))
    return math.prod(int(d) for d in buffer.shape) * element.bits * element.lanes // 8
