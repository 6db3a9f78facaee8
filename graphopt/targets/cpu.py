"""The processor of this machine, or another x86-64 one by name."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import ClassVar

from graphopt import capabilities
from graphopt.capabilities import X86_FEATURES, Capabilities
from graphopt.runtime import amx_permission
from graphopt.targets.base import Diagnosis
from graphopt.targets.llvm import FFI_PIN, TVM_PIN, LlvmTarget, LoweredModel

AMX_FEATURES = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16"})


@dataclass(frozen=True)
class Cpu(LlvmTarget):
    """`cpu{mcpu=cascadelake,threads=1}`: `mcpu` is LLVM's name or `native`; `threads` 0 means all processors.

    `precision` and `without`: see `LlvmTarget`.
    """

    name: ClassVar[str] = "cpu"
    mcpu: str = "native"
    threads: int = 0
    precision: str = "float32"
    without: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.mcpu != "native" and self.mcpu not in X86_FEATURES:
            capabilities.x86_for_mcpu(self.mcpu)  # raises, with the nearest name

    @property
    def is_native(self) -> bool:
        return self.mcpu == "native"

    @property
    def llvm_cpu(self) -> str:
        """LLVM's name of the processor code is generated for."""
        if not self.is_native:
            return self.mcpu
        return "generic" if self.arch == "aarch64" else capabilities.host_mcpu()

    @property
    def arch(self) -> str:
        return capabilities.host_arch() if self.is_native else "x86_64"

    @property
    def features(self) -> frozenset[str]:
        """The extensions that generated code may use, in /proc/cpuinfo's spelling."""
        if self.arch == "aarch64":
            return frozenset({"asimd"})
        known = X86_FEATURES.get(self.llvm_cpu, frozenset())
        if self.is_native and known & AMX_FEATURES and not amx_permission.granted():
            return known - AMX_FEATURES  # the system keeps the tile registers to itself: vectors then
        return known

    @property
    def capabilities(self) -> Capabilities:
        if self.arch == "aarch64":
            return capabilities.host_capabilities()
        return capabilities.x86_capabilities(self.features)


def doctor() -> list[Diagnosis]:
    """What this machine offers the CPU target."""
    from graphopt.runtime.tvm_engine import available_processors
    from graphopt.targets.relax import link

    here = capabilities.host_capabilities()
    linker = link.find_linker()
    rows = [
        Diagnosis("instruction set", True, f"{here.arch}, {here.float_lanes} float32 lanes, int8 by {here.dot_int8}"),
        Diagnosis("processor for LLVM", True, capabilities.host_mcpu() if here.arch == "x86_64" else "generic"),
        _pinned("apache-tvm", TVM_PIN),
        _pinned("apache-tvm-ffi", FFI_PIN),
        Diagnosis("linker", linker is not None, " ".join(linker) if linker else "none", "" if linker else link.REMEDY),
        Diagnosis("processors", True, f"{available_processors()} of {os.cpu_count()} usable by this process"),
    ]
    if "amx_tile" in here.features:
        granted = amx_permission.granted()
        rows.append(
            Diagnosis("AMX", granted, "the kernel lets this process use tile registers" if granted else "refused",
                      "" if granted else "needs Linux 5.16 or newer")
        )  # fmt: skip
    return rows


def _pinned(package: str, wanted: str) -> Diagnosis:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Diagnosis(package, False, "not installed", f"pip install {package}=={wanted}")
    remedy = "" if found == wanted else f"pip install {package}=={wanted}"
    return Diagnosis(package, found == wanted, found, remedy)


__all__ = ["Cpu", "LoweredModel", "doctor"]
