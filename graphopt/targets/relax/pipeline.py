"""From an imported Relax module to one whose every kernel is a scheduled PrimFunc."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from graphopt.errors import TargetError
from graphopt.targets.relax import long_expressions
from graphopt.targets.schedules.workload import Kernel


def fuse(module, chains: bool = True):
    """Legalise Relax operators to PrimFuncs; with `chains` fuse each chain of them with the kernel before it."""
    import tvm
    from tvm.relax import transform

    # What nobody reads goes first: a kernel with two readers, one of them dead, would be fused with neither.
    stages = [transform.DeadCodeElimination(), transform.LegalizeOps(), transform.AnnotateTIROpPattern()]
    module = tvm.transform.Sequential(stages)(module)
    fusion = [transform.FuseOps(), transform.FuseTIR()] if chains else []
    if chains:
        module = long_expressions.kept_apart(module)
    return tvm.transform.Sequential([*fusion, transform.DeadCodeElimination()])(module)


def prim_funcs(module) -> dict[str, Any]:
    """The module's PrimFuncs by name, in order of name."""
    from tvm import tirx

    found = {g.name_hint: f for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    return dict(sorted(found.items()))


def calls(module) -> list[tuple[str, list[Any]]]:
    """Name and arguments of each call of a kernel that `main` makes, in order."""
    import tvm
    from tvm import relax

    found = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and call.args and isinstance(call.args[0], tvm.ir.GlobalVar):
                packed: Any = call.args[1] if len(call.args) > 1 else ()
                found.append((call.args[0].name_hint, list(getattr(packed, "fields", ()))))
    return found


def call_counts(module) -> dict[str, int]:
    """How often `main` calls each PrimFunc."""
    return Counter(name for name, _ in calls(module))


def with_kernels(module, kernels: Mapping[str, Kernel]):
    """The module with these kernels in place of the PrimFuncs of the same name, and their constants repacked."""
    import tvm

    functions: dict[Any, Any] = {}
    for gvar, func in module.functions_items():
        kernel = kernels.get(gvar.name_hint)
        if kernel is None:
            functions[gvar] = func
        else:
            functions[_named(gvar, kernel)] = kernel.func.without_attr("global_symbol")
    return repack_constants(tvm.IRModule(functions), kernels)


def _named(gvar, kernel: Kernel):
    """The kernel's name; one of its own where repacking changes the types of its parameters."""
    import tvm
    from tvm.relax import expr

    if not kernel.repack:
        return gvar
    fresh = tvm.ir.GlobalVar(gvar.name_hint)
    expr._update_type(fresh, kernel.func.ty)
    return fresh


def repack_constants(module, kernels: Mapping[str, Kernel]):
    """Store the constants that kernels want in another form. Raises TargetError where one is no constant."""
    import tvm
    from tvm import relax

    wanted = {name: kernel.repack for name, kernel in kernels.items() if kernel.repack}
    if not wanted:
        return module
    done: dict[tuple[Any, str, int], Any] = {}

    def repacked(name: str, index: int, constant: Any) -> Any:
        if not isinstance(constant, tvm.ir.GenericConst):
            raise TargetError(f"kernel {name}: argument {index} must be a constant to be repacked")
        stored: Any = constant
        key = (constant, name, index)
        if key not in done:
            array = np.asarray(wanted[name][index](stored.value.numpy()), order="C")  # a scalar stays one
            done[key] = relax.const(array, str(array.dtype))
        return done[key]

    def rebound(binding: Any) -> Any:
        call: Any = binding.value
        name = getattr(call.args[0], "name_hint", "") if isinstance(call, relax.Call) and call.args else ""
        if name not in wanted:
            return binding
        packed: Any = call.args[1]
        arguments = list(packed.fields)
        for index in wanted[name]:
            arguments[index] = repacked(name, index, arguments[index])
        callee = module.get_global_var(name)
        changed = relax.Call(call.op, [callee, relax.Tuple(arguments), *call.args[2:]], call.attrs, call.ty_args)
        return relax.VarBinding(binding.var, changed)

    functions = dict(module.functions_items())
    functions[module.get_global_var("main")] = _rebound(module["main"], rebound)
    return tvm.IRModule(functions)


def kernels_renamed(module, suffix: str):
    """The module with `_suffix` behind the name of each kernel, so that it may share a library with others."""
    import tvm
    from tvm import relax, tirx
    from tvm.relax import expr

    fresh: dict[Any, Any] = {}
    for gvar, func in module.functions_items():
        if isinstance(func, tirx.PrimFunc):
            fresh[gvar] = tvm.ir.GlobalVar(f"{gvar.name_hint}_{suffix}")
            expr._update_type(fresh[gvar], gvar.ty)

    def rebound(binding: Any) -> Any:
        call: Any = binding.value
        if not isinstance(call, relax.Call) or not call.args or call.args[0] not in fresh:
            return binding
        changed = relax.Call(call.op, [fresh[call.args[0]], *call.args[1:]], call.attrs, call.ty_args)
        return relax.VarBinding(binding.var, changed)

    main = module.get_global_var("main")
    functions = {fresh.get(gvar, gvar): func for gvar, func in module.functions_items()}
    functions[main] = _rebound(module["main"], rebound)
    return tvm.IRModule(functions)


def _rebound(function, change):
    """A Relax function with each of its bindings as `change` makes it."""
    from tvm import relax

    blocks = [type(block)([change(binding) for binding in block.bindings]) for block in function.body.blocks]
    body = relax.SeqExpr(blocks, function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
