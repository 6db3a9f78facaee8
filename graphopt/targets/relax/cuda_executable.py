"""A library for a GPU: bytecode and constants, the host's code that launches kernels, and the kernels' machine code.

TVM writes CUDA source; without a driver it would put that source into the library, to be compiled when it is loaded.
Here `nvcc` compiles it now, and the machine code takes the source's place in the module that TVM serialises: nothing
is compiled where the library is loaded, and building needs no GPU.

Launch overhead: with `graphs`, TVM's `RewriteCUDAGraph` has kernels whose arguments have fixed addresses recorded once
in a CUDA graph, and launched with one call from then on.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphopt.errors import TargetError
from graphopt.targets import nvcc
from graphopt.targets.relax import blob_object, link

Compiler = Callable[[str, str, int], nvcc.Image]
"""From source, architecture and number of threads to machine code."""


def export(
    module, target, library: Path, *, gpu_arch: str, host_arch: str, jobs: int, compiler: Compiler, graphs: bool = True
) -> dict[str, nvcc.Resources]:
    """Compile a module whose kernels are scheduled for threads and write the shared library.

    Returns what each kernel needs. Raises what TVM raises where a kernel cannot be compiled, TargetError where nvcc or
    the linker fails, OSError where files cannot be written.
    """
    import tvm_ffi
    from tvm import relax
    from tvm.relax import vm_build

    linked: Any = vm_build._ffi_api
    with _compiling_for(target, graphs):
        builder = relax.ExecBuilder()
        rest = vm_build._vmcodegen(builder, _lowered(module, target))
        kernels = vm_build._filter_tir(rest)
        host = None if kernels is None else compile_kernels(kernels, target)
    with tempfile.TemporaryDirectory(prefix="graphopt-build-") as folder:
        objects, needs = [], {}
        if host is not None:
            objects.append(str(Path(folder) / "host.o"))
            host.write_to_file(objects[0], "o")
        program = linked.VMLink(builder, target, host, [], {})
        pack: Any = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
        packed = pack(program).numpy().tobytes()
        for device in [] if host is None else _device_modules(host):
            source = str(device.inspect_source())
            image = compiler(source, gpu_arch, jobs)
            packed = with_machine_code(packed, source, image)
            needs.update(image.kernels)
        constants = Path(folder) / "constants.o"
        blob_object.write(packed, host_arch, constants)
        link.link_shared(library, [*objects, str(constants)], host_arch)
    return needs


def compile_kernels(kernels, target) -> Any:
    """The host's code of scheduled PrimFuncs as a `tvm.runtime.Module` that imports one with their CUDA source."""
    import tvm

    _keep_source()
    return tvm.tirx.build(kernels, target=target)


@lru_cache(maxsize=1)
def _keep_source() -> None:
    """Have TVM leave CUDA source as it is, in this process. It does so by itself only where there is no driver; where
    its part for GPUs is loaded it would compile with NVRTC."""
    import tvm_ffi

    def unchanged(source: str, _target: Any = None) -> bytes:
        return source.encode()

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", unchanged, override=True)


def _device_modules(module) -> list[Any]:
    return [each for each in module.imports if each.kind == "cuda"]


def with_machine_code(packed: bytes, source: str, image: nvcc.Image) -> bytes:
    """Serialised modules with a CUDA module's source replaced by machine code.

    TVM writes such a module as its format, the kernels' signatures, and the code; strings are preceded by their length
    and the module by its own (8 bytes each); the whole starts with the length of the rest. Raises TargetError where it
    does not look like that.
    """
    text = source.encode()
    tail = struct.pack("<Q", len(text)) + text
    end = packed.find(tail) + len(tail)
    form, start = _start(packed, end, len(tail))
    size_at = start - 8
    signatures = packed[start + len(form) : end - len(tail)]
    fresh = _string(image.form) + signatures + struct.pack("<Q", len(image.data)) + image.data
    rest = packed[8:size_at] + struct.pack("<Q", len(fresh)) + fresh + packed[end:]
    return struct.pack("<Q", len(rest)) + rest


def _start(packed: bytes, end: int, tail: int) -> tuple[bytes, int]:
    """The format of the module that ends at `end`, and where it starts."""
    for form in map(_string, ("cuda", "cubin", "fatbin", "ptx")):
        start = packed.rfind(form, 0, max(end - tail, 0))
        if start >= 8 and struct.unpack_from("<Q", packed, start - 8)[0] == end - start:
            return form, start
    raise TargetError("TVM's serialised modules do not look as expected", hint="is this TVM 0.27?")


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _lowered(module, target):
    """Calls of kernels with memory planned: what becomes the virtual machine's bytecode."""
    import tvm
    from tvm.relax.backend.cuda import pipeline as stock

    passes = stock.library_dispatch_passes(target) + stock.dataflow_lower_passes(target)
    return tvm.transform.Sequential([*passes, *stock.finalize_passes(target)])(module)


@contextmanager
def _compiling_for(target, graphs: bool):
    import tvm

    with target, tvm.transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": graphs}):
        yield
