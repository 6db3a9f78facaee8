"""What a target can do. Passes and targets never import each other: they meet here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphopt.errors import SpecError, nearest

DotInt8 = Literal["amx", "avx512vnni", "avxvnni", "avx512bw", "avx2", "none", "sdot", "i8mm", "smlal", "mma"]


@dataclass(frozen=True)
class Capabilities:
    """What passes may know of a target: never its name, only its abilities."""

    arch: Literal["x86_64", "aarch64"]
    features: frozenset[str]
    """Instruction-set extensions in Linux's /proc/cpuinfo spelling, e.g. `avx512_vnni`, `asimddp`."""
    dot_int8: DotInt8
    """The best 8-bit dot-product instruction."""
    float_lanes: int
    """float32 lanes of one vector register; channel counts that are a multiple of it run best."""

    @property
    def activation_dtype(self) -> Literal["uint8", "int8"]:
        """The activation type its dot instruction multiplies: u8 x s8 on x86, s8 x s8 on ARM and GPUs."""
        return "uint8" if self.arch == "x86_64" and self.dot_int8 != "mma" else "int8"

    @property
    def reduce_range(self) -> bool:
        """True where u8 x s8 pairs are summed in saturating 16 bits (VPMADDUBSW): weights must keep to 7 bits."""
        return self.dot_int8 in ("avx2", "avx512bw", "none") and self.arch == "x86_64"

    @property
    def channel_block(self) -> int:
        """Channel counts worth rounding to."""
        return self.float_lanes

    def describe(self) -> dict[str, str]:
        """The rows that `graphopt doctor` and the report show."""
        recipe = "U8S8" if self.activation_dtype == "uint8" else "S8S8"
        return {
            "architecture": self.arch,
            "int8 dot product": self.dot_int8,
            "quantization recipe": recipe + (", reduced range (7-bit weights)" if self.reduce_range else ""),
            "float32 lanes": str(self.float_lanes),
        }


_AVX2 = {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
"""Those of x86-64-v3; LLVM shifts and loads with the last four as it pleases."""
_AVX512 = _AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_SAPPHIRE = _AVX512 | {"avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}

X86_FEATURES: Mapping[str, frozenset[str]] = {
    "x86-64-v2": frozenset({"sse4_2", "ssse3"}),
    "x86-64-v3": frozenset(_AVX2),
    "x86-64-v4": frozenset(_AVX512),
    "haswell": frozenset(_AVX2),
    "broadwell": frozenset(_AVX2),
    "skylake": frozenset(_AVX2),
    "alderlake": frozenset(_AVX2 | {"avx_vnni"}),
    "znver2": frozenset(_AVX2),
    "znver3": frozenset(_AVX2),
    "znver4": frozenset(_AVX512 | {"avx512_vnni", "avx512_bf16"}),
    "skylake-avx512": frozenset(_AVX512),
    "cascadelake": frozenset(_AVX512 | {"avx512_vnni"}),
    "icelake-server": frozenset(_AVX512 | {"avx512_vnni"}),
    "cooperlake": frozenset(_AVX512 | {"avx512_vnni", "avx512_bf16"}),
    "sapphirerapids": frozenset(_SAPPHIRE),
    "emeraldrapids": frozenset(_SAPPHIRE),
    "graniterapids": frozenset(_SAPPHIRE | {"amx_fp16"}),
}
"""LLVM's names (`-mcpu`) of x86 processors and the extensions that matter here."""


def x86_capabilities(features: frozenset[str]) -> Capabilities:
    """Capabilities of an x86-64 processor with these extensions."""
    dot: DotInt8 = "none"
    ladder: tuple[tuple[str, DotInt8], ...] = (
        ("amx_int8", "amx"),
        ("avx512_vnni", "avx512vnni"),
        ("avx_vnni", "avxvnni"),
        ("avx512bw", "avx512bw"),
        ("avx2", "avx2"),
    )
    for feature, name in ladder:
        if feature in features:
            dot = name
            break
    lanes = 16 if "avx512f" in features else 8 if "avx2" in features else 4
    return Capabilities("x86_64", features, dot, lanes)


def x86_for_mcpu(mcpu: str) -> Capabilities:
    """Capabilities of an x86-64 processor by its LLVM name. Raises SpecError for an unknown one."""
    if mcpu not in X86_FEATURES:
        near = nearest(mcpu, X86_FEATURES)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(X86_FEATURES))}"
        raise SpecError(f"unknown mcpu {mcpu!r}", hint=hint)
    return x86_capabilities(X86_FEATURES[mcpu])


def host_arch() -> str:
    """`x86_64` or `aarch64`, or whatever else the machine this runs on calls itself."""
    machine = platform.machine()
    return {"arm64": "aarch64", "AMD64": "x86_64"}.get(machine, machine)


def host_features() -> frozenset[str]:
    """Extensions of the machine this runs on, in /proc/cpuinfo's spelling; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def host_mcpu() -> str:
    """The LLVM name of the richest known processor whose extensions this machine all has."""
    features = host_features()
    fitting = [name for name, needs in X86_FEATURES.items() if needs <= features]
    preference = (
        "sapphirerapids", "cooperlake", "cascadelake", "skylake-avx512", "alderlake", "x86-64-v3", "x86-64-v2",
    )  # fmt: skip
    return next((name for name in preference if name in fitting), "x86-64")


def arm_capabilities(features: frozenset[str]) -> Capabilities:
    """Capabilities of a 64-bit ARM processor with these extensions."""
    dot: DotInt8 = "i8mm" if "i8mm" in features else "sdot" if "asimddp" in features else "smlal"
    return Capabilities("aarch64", features, dot, 4)


def gpu_capabilities(host: str, features: frozenset[str]) -> Capabilities:
    """Capabilities of an NVIDIA GPU with these features (see `gpu_names`) beside a `host` processor.

    Its threads have no vectors, but channels are read 16 bytes at a time: 8 of float16.
    """
    arch: Literal["x86_64", "aarch64"] = "aarch64" if host == "aarch64" else "x86_64"
    return Capabilities(arch, features, "mma", 8)


def host_capabilities() -> Capabilities:
    """Capabilities of the machine this runs on."""
    known = arm_capabilities if host_arch() == "aarch64" else x86_capabilities
    return known(host_features())
