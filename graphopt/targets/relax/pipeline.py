"""From an imported Relax module to one whose every kernel is a scheduled PrimFunc, and on to machine code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fuse(module):
    """Legalise Relax operators to PrimFuncs and fuse each chain with the kernel before it."""
    import tvm
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.LegalizeOps(),
            transform.AnnotateTIROpPattern(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
        ]
    )(module)


def prim_funcs(module) -> dict[str, Any]:
    """The module's PrimFuncs by name, in order of name."""
    from tvm import tirx

    found = {g.name_hint: f for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    return dict(sorted(found.items()))


def call_counts(module) -> dict[str, int]:
    """How often `main` calls each PrimFunc."""
    import tvm
    from tvm import relax

    counts: dict[str, int] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.args and isinstance(value.args[0], tvm.ir.GlobalVar):
                name = value.args[0].name_hint
                counts[name] = counts.get(name, 0) + 1
    return counts


def with_kernels(module, kernels: Mapping[str, Any]):
    """The module with these PrimFuncs in place of those of the same name."""
    import tvm

    functions = {}
    for gvar, func in module.functions_items():
        kernel = kernels.get(gvar.name_hint)
        functions[gvar] = func if kernel is None else kernel.without_attr("global_symbol")
    return tvm.IRModule(functions)


def compile_module(module, target):
    """Machine code for a scheduled module: a `tvm.runtime.Executable`."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as stock

    passes = stock.library_dispatch_passes(target) + stock.dataflow_lower_passes(target) + stock.finalize_passes(target)
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.compile(module, target=target, relax_pipeline=tvm.transform.Sequential(passes))
