"""Machine code for a scheduled module, made on all processors.

TVM compiles a module in one thread. Here every kernel is a module of its own: threads lower it, generate its code and
write its object file, and the linker joins them. TVM's passes and LLVM run outside Python's lock, so two threads take
half the time. Bytecode and constants go into the library as they are (`blob_object`), not through LLVM.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphopt.targets.relax import blob_object, concat_in_place, link
from graphopt.targets.relax.pipeline import kernels_renamed

MAIN = "main"
"""What a module's function is called that runs the model."""


def export(
    module: Any | Mapping[str, Any], target, library: Path, *, arch: str, jobs: int, in_place: bool = True
) -> int:
    """Compile a scheduled module on `jobs` threads and write the shared library. Returns the most bytes that a run
    takes for values between kernels.

    Several modules, given by the name that each one's `main` is to have, become one library; constants that they have
    in common are stored once. `in_place`: concatenations without a copy. Raises what TVM raises where a kernel cannot
    be compiled, TargetError where linking fails, OSError where files cannot be written.
    """
    import tvm
    import tvm_ffi
    from tvm import relax
    from tvm.relax import vm_build

    linked: Any = vm_build._ffi_api
    entries = dict(module) if isinstance(module, Mapping) else {MAIN: module}
    planned, rest = 0, tvm.IRModule()
    with compiling_for(target):
        builder = relax.ExecBuilder()
        for entry, each in entries.items():
            made = lowered(each if entry == MAIN else kernels_renamed(each, entry), target, in_place)
            planned = max(planned, planned_bytes(made))
            rest.update(vm_build._vmcodegen(builder, _entered_by(made, entry)))
    with tempfile.TemporaryDirectory(prefix="graphopt-build-") as folder:
        built = compile_kernels(rest, target, Path(folder), jobs)
        # The program must import one compiled module, or its loader does not look for kernels in its own library.
        program = linked.VMLink(builder, target, built[0][0] if built else None, [], {})
        packed: Any = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
        constants = Path(folder) / "constants.o"
        blob_object.write(packed(program).numpy(), arch, constants)
        link.link_shared(library, [*(path for _, path in built), str(constants)], arch)
    return planned


def _entered_by(module, entry: str):
    """The lowered module, its function `main` by another name."""
    import tvm

    if entry == MAIN:
        return module
    old = module.get_global_var(MAIN)
    functions = {
        (tvm.ir.GlobalVar(entry) if gvar == old else gvar): (
            func.with_attr("global_symbol", entry) if gvar == old else func
        )
        for gvar, func in module.functions_items()
    }
    return tvm.IRModule(functions)


def planned_bytes(module) -> int:
    """The memory that a lowered module's functions allocate, each part of it once; sizes known at run time only are
    left out."""
    import tvm
    from tvm import relax

    found: list[int] = []

    def visit(each) -> None:
        if isinstance(each, relax.Call) and getattr(each.op, "name", "") == "relax.vm.alloc_storage":
            shape: Any = each.args[0]
            sizes = shape.values[:1] if isinstance(shape, relax.ShapeExpr) else ()  # a variable: known at run time
            found.extend(int(size) for size in sizes if isinstance(size, tvm.tirx.IntImm))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return sum(found)


def compile_function(func, target) -> Any:
    """One scheduled PrimFunc as a `tvm.runtime.Module`; its name there is that of its attribute `global_symbol`."""
    import tvm

    name = str(func.attrs["global_symbol"])
    with compiling_for(target):
        return tvm.tirx.build(tvm.IRModule({name: func}), target=target)


def compile_kernels(module, target, folder: Path, jobs: int) -> list[tuple[Any, str]]:
    """Each kernel's module and object file, in the order of names: the same library however many threads made it."""
    from tvm.relax import vm_build

    kernels: Any = vm_build._filter_tir(module)
    if kernels is None:
        return []
    functions = sorted(((g.name_hint, func) for g, func in kernels.functions.items()), key=lambda pair: pair[0])

    def compile_one(index: int) -> tuple[Any, str]:
        name, func = functions[index]
        module = compile_function(func.with_attr("global_symbol", name), target)
        path = str(folder / f"{index}.o")
        module.write_to_file(path, "o")
        return module, path

    with ThreadPoolExecutor(max(jobs, 1), thread_name_prefix="compile") as pool:
        waiting = [pool.submit(compile_one, index) for index in range(len(functions))]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def lowered(module, target, in_place: bool):
    """Calls of kernels with memory planned: what becomes the virtual machine's bytecode."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as stock

    @tvm.transform.module_pass(opt_level=0, name="ConcatInPlace")
    def concatenate_in_place(module, _context):
        return concat_in_place.place_parts(module) if in_place else module

    passes = stock.library_dispatch_passes(target) + stock.dataflow_lower_passes(target)
    passes += [concatenate_in_place, *stock.finalize_passes(target)]
    return tvm.transform.Sequential(passes)(module)


@contextmanager
def compiling_for(target):
    """TVM's context of this thread."""
    import tvm

    with target, tvm.transform.PassContext(opt_level=3):
        yield
