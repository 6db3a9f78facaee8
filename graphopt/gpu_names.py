"""NVIDIA's GPU architectures, what each can do, and the cards and boards that have them.

Features: `tensor_fp16`, `tensor_int8`, `tensor_bf16`, `tensor_tf32`, `tensor_fp8` (matrix units for these types),
`cp_async` (copies from memory to shared memory past the registers), `wgmma` (products of whole warp groups), `clusters`
(blocks that read each other's shared memory).

Source: CUDA C++ Programming Guide, "Compute Capabilities" (table of technical specifications per compute capability);
NVIDIA's data sheets of the cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.errors import SpecError, nearest

_TURING = frozenset({"tensor_fp16", "tensor_int8"})
_AMPERE = _TURING | {"tensor_bf16", "tensor_tf32", "cp_async"}
_ADA = _AMPERE | {"tensor_fp8"}


@dataclass(frozen=True)
class Architecture:
    """A compute capability; sizes are those that bound how many blocks a multiprocessor holds."""

    family: str
    features: frozenset[str]
    threads: int
    """Resident threads of a multiprocessor."""
    blocks: int
    """Resident blocks of a multiprocessor."""
    shared_bytes: int
    """Shared memory of a multiprocessor that blocks share out."""
    registers: int = 65536
    """32-bit registers of a multiprocessor."""
    block_shared_bytes: int = 49152
    """Shared memory of one block without opting in to more."""
    block_registers: int = 65536
    thread_registers: int = 255


ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_75": Architecture("Turing", _TURING, 1024, 16, 64 << 10),
    "sm_80": Architecture("Ampere", _AMPERE, 2048, 32, 164 << 10),
    "sm_86": Architecture("Ampere", _AMPERE, 1536, 16, 100 << 10),
    "sm_87": Architecture("Ampere", _AMPERE, 1536, 16, 164 << 10),
    "sm_89": Architecture("Ada", _ADA, 1536, 24, 100 << 10),
    "sm_90": Architecture("Hopper", _ADA | {"wgmma", "clusters"}, 2048, 32, 228 << 10),
    "sm_100": Architecture("Blackwell", _ADA | {"clusters"}, 2048, 32, 228 << 10),
    "sm_120": Architecture("Blackwell", _ADA, 1536, 32, 100 << 10),
}
"""By the name that `nvcc -arch` takes."""


@dataclass(frozen=True)
class Gpu:
    """Something that is sold."""

    arch: str
    multiprocessors: int
    what: str
    host: str = ""
    """`aarch64` where the board brings its processor along; empty: whatever it is plugged into."""


GPUS: Mapping[str, Gpu] = {
    "t4": Gpu("sm_75", 40, "Tesla T4"),
    "rtx2080ti": Gpu("sm_75", 68, "GeForce RTX 2080 Ti"),
    "a100": Gpu("sm_80", 108, "A100"),
    "a30": Gpu("sm_80", 56, "A30"),
    "a10": Gpu("sm_86", 72, "A10, A10G"),
    "a40": Gpu("sm_86", 84, "A40"),
    "rtx3060": Gpu("sm_86", 28, "GeForce RTX 3060"),
    "rtx3080": Gpu("sm_86", 68, "GeForce RTX 3080"),
    "rtx3090": Gpu("sm_86", 82, "GeForce RTX 3090"),
    "rtx-a6000": Gpu("sm_86", 84, "RTX A6000"),
    "jetson-orin": Gpu("sm_87", 16, "Jetson AGX Orin", "aarch64"),
    "jetson-orin-nx": Gpu("sm_87", 8, "Jetson Orin NX", "aarch64"),
    "jetson-orin-nano": Gpu("sm_87", 8, "Jetson Orin Nano", "aarch64"),
    "l4": Gpu("sm_89", 58, "L4"),
    "l40s": Gpu("sm_89", 142, "L40, L40S"),
    "rtx4060": Gpu("sm_89", 24, "GeForce RTX 4060"),
    "rtx4070": Gpu("sm_89", 46, "GeForce RTX 4070"),
    "rtx4080": Gpu("sm_89", 76, "GeForce RTX 4080"),
    "rtx4090": Gpu("sm_89", 128, "GeForce RTX 4090"),
    "h100": Gpu("sm_90", 132, "H100"),
    "h200": Gpu("sm_90", 132, "H200"),
    "gh200": Gpu("sm_90", 132, "GH200 Grace Hopper", "aarch64"),
    "b200": Gpu("sm_100", 148, "B200"),
    "gb200": Gpu("sm_100", 148, "GB200 Grace Blackwell", "aarch64"),
    "rtx5080": Gpu("sm_120", 84, "GeForce RTX 5080"),
    "rtx5090": Gpu("sm_120", 170, "GeForce RTX 5090"),
}


def find_architecture(name: str) -> str:
    """`sm_90` of `sm_90` or `90`. Raises SpecError with the nearest name."""
    for spelled in (name, f"sm_{name}"):
        if spelled in ARCHITECTURES:
            return spelled
    raise SpecError(f"unknown GPU architecture {name!r}", hint=_near(name, ARCHITECTURES))


def find_gpu(name: str) -> Gpu:
    """Raises SpecError with the nearest name."""
    if name not in GPUS:
        raise SpecError(f"unknown GPU {name!r}", hint=_near(name, GPUS))
    return GPUS[name]


def _near(name: str, known: Mapping[str, object]) -> str:
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(known))}"
