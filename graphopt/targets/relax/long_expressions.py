"""At most one long elementwise expression in a kernel.

The expressions of `elementwise` name their intermediate values, and TVM's analyses visit the value of a name several
times: where fusion puts the names of one expression inside those of another, code generation takes a power of their
depth (two sigmoids in a chain after a convolution: nine seconds; three: minutes). So a long expression that would be
fused behind another becomes a kernel of its own, one pass over memory.
"""

from __future__ import annotations

from typing import Any

from graphopt.targets.relax.values import INJECTIVE, OPAQUE

LONG = 4
"""Names in an expression from which on it counts as long."""


def kept_apart(module):
    """The Relax module, before fusion, with the second of two long expressions of a chain marked as opaque."""
    import tvm
    from tvm import relax, tirx

    patterns = {g.name_hint: _pattern(f) for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    long = {g.name_hint for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc) and _is_long(f)}
    if len(long) == 0:
        return module
    builder = relax.BlockBuilder(module)
    apart: dict[str, Any] = {}
    contains: dict[str, bool] = {}

    def rebound(binding: Any) -> Any:
        call: Any = binding.value
        if not isinstance(call, relax.Call) or not call.args or not isinstance(call.args[0], tvm.ir.GlobalVar):
            return binding
        name = call.args[0].name_hint
        operands = list(getattr(call.args[1], "fields", [])) if len(call.args) > 1 else []
        behind = patterns.get(name, OPAQUE) <= INJECTIVE and any(
            contains.get(str(v.name), False) for v in operands if isinstance(v, relax.Var)
        )
        contains[str(binding.var.name)] = behind or name in long
        if not behind or name not in long:
            return binding
        contains[str(binding.var.name)] = False
        if name not in apart:
            function: Any = module[name]
            apart[name] = builder.add_func(function.with_attr("op_pattern", OPAQUE), f"{name}_apart")
        changed = relax.Call(call.op, [apart[name], *call.args[1:]], call.attrs, call.ty_args)
        return relax.VarBinding(binding.var, changed)

    main = module["main"]
    blocks = [type(block)([rebound(binding) for binding in block.bindings]) for block in main.body.blocks]
    if not apart:
        return module
    body = relax.SeqExpr(blocks, main.body.body)
    whole = builder.get()
    whole.update_func(
        whole.get_global_var("main"), relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    )
    return relax.transform.DeadCodeElimination()(whole)


def _pattern(func) -> int:
    return int(func.attrs["op_pattern"]) if func.attrs is not None and "op_pattern" in func.attrs else OPAQUE


def _is_long(func) -> bool:
    from tvm import tirx

    from graphopt.targets.schedules.workload import nodes

    return len(nodes(func.body, tirx.Let)) >= LONG
