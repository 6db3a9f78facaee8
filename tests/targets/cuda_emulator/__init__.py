"""Run CUDA kernels without a GPU: their own source, compiled for this machine, on an emulated driver.

`compile_source` stands in for `graphopt.targets.nvcc.compile_source`: g++ compiles the source that TVM wrote, with
`device/` in place of CUDA's headers, into a shared library that the emulated driver (`driver.cc`, as `libcuda.so.1` and
`libcudart.so.13`) loads where a real one loads a cubin. A block's threads are coroutines that change at barriers, one
block runs after the other, tensor core instructions are loops, and CUDA graphs are recorded and replayed. So indices,
bounds, barriers and launch sizes are those a GPU would see; memory that nobody wrote holds NaN. Not seen: races
between threads that run in step, and anything about time.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from graphopt.targets.nvcc import Image, Resources
from graphopt.targets.schedules.cuda import intrinsics

HERE = Path(__file__).resolve().parent
MAGIC = b"GRAPHEMU"
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(([^)]*)\)\s*\{')
_WAITS = re.compile(r"__syncthreads|__shfl|__syncwarp|wmma|__emu_|__activemask|graphopt_")


def available() -> str | None:
    """Why kernels cannot be emulated here, in words; None where they can."""
    if os.uname().machine != "x86_64":
        return "the emulator switches coroutines in x86-64 assembly"
    return None if shutil.which("g++") else "no g++ on this machine"


def compile_source(source: str, arch: str, jobs: int = 1) -> Image:
    """The kernels as a shared library for this machine, in the form in which the emulated driver takes modules."""
    source = _without_assembly(source)
    kernels = [(m[1], m[2], m.start()) for m in _KERNEL.finditer(source)]
    ends = [start for _, _, start in kernels[1:]] + [len(source)]
    entries = [
        _entry(name, parameters, bool(_WAITS.search(source[start:end])))
        for (name, parameters, start), end in zip(kernels, ends, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder) / "kernels.cc", Path(folder) / "kernels.so"
        code.write_text('#include "emulated.h"\n' + source + "\n".join(entries))
        command = ["g++", "-O2", "-std=c++17", "-w", "-shared", "-fPIC", "-ffp-contract=fast", "-march=native",
                   f"-I{HERE / 'device'}", "-o", str(library), str(code)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"g++ refuses the kernels: {done.stderr[:3000]}")
        data = library.read_bytes()
    return Image("cubin", MAGIC + struct.pack("<Q", len(data)) + data, {k[0]: Resources(0, 0, 0, 0) for k in kernels})


def _entry(name: str, parameters: str, waits: bool) -> str:
    """What the driver calls with the addresses of arguments, how long these are, and whether threads meet."""
    types = [re.sub(r"\s*\w+$", "", each.strip()) for each in parameters.split(",") if each.strip()]
    arguments = ", ".join(f"*({kind}*)a[{i}]" for i, kind in enumerate(types))
    sizes = ", ".join([*(f"sizeof({kind})" for kind in types), "0"])
    return (
        f'extern "C" void __emu_call_{name}(void** a) {{ {name}({arguments}); }}\n'
        f'extern "C" const unsigned long __emu_sizes_{name}[] = {{{sizes}}};\n'
        f'extern "C" const int __emu_waits_{name} = {int(waits)};\n'
    )


def _without_assembly(source: str) -> str:
    """PTX of copies and barriers as calls of `device/emulated.h`; attributes where g++ wants them."""
    for text in intrinsics.SOURCES:
        source = source.replace(text, "")
    source = re.sub(
        r"__forceinline__ __device__ unsigned int tvm_builtin_cluster.*?\n\}\n", "", source, flags=re.DOTALL
    )
    dynamic = r"extern __shared__ (?:__align__\(\d+\)|alignas\(\d+\))?\s*([^;]*?)\s*(\w+)\[\];"
    source = re.sub(dynamic, r"auto* \2 = (\1*)__emu_dynamic_shared;", source)
    return re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", source)


@lru_cache(maxsize=1)
def driver_folder() -> Path:
    """A folder with the emulated driver and runtime library, compiled once a process."""
    folder = Path(tempfile.mkdtemp(prefix="graphopt-cuda-emulator-"))
    versions = folder / "cudart.map"
    versions.write_text("libcudart.so.13 { global: cuda*; };\n")
    common = ["g++", "-O2", "-std=c++17", "-w", "-shared", "-fPIC", str(HERE / "driver.cc")]
    for name, extra in (
        ("libcuda.so.1", ["-DDRIVER"]),
        ("libcudart.so.13", ["-DRUNTIME", f"-Wl,--version-script={versions}", f"-L{folder}", "-l:libcuda.so.1"]),
    ):
        command = [*common, *extra, f"-Wl,-soname,{name}", "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stderr[:3000])
    return folder


def run(folder: Path, feeds: Mapping[str, np.ndarray], times: int = 1) -> dict[str, np.ndarray]:
    """The outputs of a built model's last of `times` runs, in a process of its own with the emulated driver."""
    with tempfile.TemporaryDirectory() as work:
        fed, found = Path(work) / "feeds.npz", Path(work) / "outputs.npz"
        np.savez(fed, **feeds)  # pyright: ignore[reportArgumentType]
        paths = [str(driver_folder()), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
        command = [sys.executable, str(HERE / "run.py"), str(folder), str(fed), str(found), str(times)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise AssertionError(f"the emulated run failed ({done.returncode}): {done.stderr[-3000:]}")
        with np.load(found) as outputs:
            return dict(outputs)
