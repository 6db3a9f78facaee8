"""Operators of graphopt's own in TIR: elementwise, pure, vectorisable, and lowered when code is generated.

`register` makes one known and adds a pass at the end of TVM's pipeline for schedulable functions, where calls have
their final vector width. There it becomes whatever the target has, often a call of a few lines of LLVM IR that the
function imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from graphopt.arm_cores import ARM_FEATURES
from graphopt.capabilities import X86_FEATURES

_registered: set[str] = set()


def register(name: str, description: str, printed: str, lower: Callable[[Any, frozenset[str]], Any]) -> None:
    """Make an operator known to TVM; call once a process, for each name. `printed` is its name in TVMScript.

    `lower(body, features)` returns a function's body without the operator, for a processor with these extensions.
    """
    assert name not in _registered, f"{name} is taken"
    _registered.add(name)
    import tvm
    from tvm.ir import _ffi_api, register_op_attr
    from tvm.tirx import compilation_pipeline

    _ffi_api.RegisterOp(name, description)  # pyright: ignore[reportAttributeAccessIssue]
    register_op_attr(name, "TVectorizable", True)
    register_op_attr(name, "TCallEffectKind", 1)  # pure
    register_op_attr(name, "TScriptPrinterName", printed)
    stock = compilation_pipeline.PIPELINE_MAP["s_tir"]
    lowering = tvm.transform.module_pass(lambda module, _: _lowered(module, lower), opt_level=0, name=f"Lower {name}")

    def with_lowering():
        passes, host, device = stock()
        return tvm.transform.Sequential([passes, lowering]), host, device

    compilation_pipeline.register_tir_pipeline("s_tir", with_lowering)


def replaced(body: Any, name: str, replacement: Callable[[Any, int], Any]) -> Any:
    """A body with `replacement(call, lanes)` for every call of an operator."""
    import tvm_ffi
    from tvm.ir import Call, Op

    operator = Op.get(name)

    def rewrite(call):
        if not isinstance(call.op, Op) or not call.op.same_as(operator):
            return call
        return replacement(call, int(call.ty.dtype.lanes))

    return tvm_ffi.structural_map(body, (Call, rewrite))


def importing(body: Any, definitions: list[str], declarations: Iterable[str] = ()) -> Any:
    """A body that calls functions defined in LLVM IR, which call those declared; TVM marks what it imports as always
    inlined."""
    from tvm import tirx

    text: Any = "\n".join([*definitions, *sorted(set(declarations))])
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", text, body) if definitions else body


def _lowered(module: Any, lower: Callable[[Any, frozenset[str]], Any]) -> Any:
    from tvm import tirx

    for name, func in module.functions_items():
        if isinstance(func, tirx.PrimFunc):
            function: Any = func
            body = lower(function.body, _features(func))
            if not body.same_as(function.body):
                module.update_func(name, func.with_body(body))
    return module


def _features(func: Any) -> frozenset[str]:
    """Extensions of the processor a function is compiled for."""
    target = func.attrs.get("target") if func.attrs is not None else None
    mcpu = str(target.attrs.get("mcpu", "")) if target is not None else ""
    return X86_FEATURES.get(mcpu) or ARM_FEATURES.get(mcpu, frozenset())
