"""What machine a server runs on: its processor, its memory, its version of TVM."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import DeviceError, TargetError
from graphopt.runtime import gpu
from graphopt.runtime.tvm_engine import LIBRARY, read_description
from graphopt.targets.llvm import FFI_PIN, TVM_PIN

if TYPE_CHECKING:
    from graphopt.remote.session import Session

DESCRIBE = "graphopt.describe_device"
"""The function of a server of graphopt's that says what it runs on, as JSON."""

_PARTS = {
    "0x41:0xd03": "cortex-a53", "0x41:0xd04": "cortex-a35", "0x41:0xd05": "cortex-a55", "0x41:0xd07": "cortex-a57",
    "0x41:0xd08": "cortex-a72", "0x41:0xd09": "cortex-a73", "0x41:0xd0a": "cortex-a75", "0x41:0xd0b": "cortex-a76",
    "0x41:0xd0c": "neoverse-n1", "0x41:0xd0d": "cortex-a77", "0x41:0xd0e": "cortex-a76ae", "0x41:0xd40": "neoverse-v1",
    "0x41:0xd41": "cortex-a78", "0x41:0xd42": "cortex-a78ae", "0x41:0xd44": "cortex-x1", "0x41:0xd46": "cortex-a510",
    "0x41:0xd47": "cortex-a710", "0x41:0xd48": "cortex-x2", "0x41:0xd49": "neoverse-n2", "0x41:0xd4b": "cortex-a78c",
    "0x41:0xd4d": "cortex-a715", "0x41:0xd4e": "cortex-x3", "0x41:0xd4f": "neoverse-v2", "0x41:0xd80": "cortex-a520",
    "0x41:0xd81": "cortex-a720", "0x41:0xd82": "cortex-x4", "0x43:0x0af": "thunderx2t99", "0x46:0x001": "a64fx",
    "0x00:0x051": "qemu-max", "0x48:0xd01": "tsv110", "0x4e:0x004": "carmel", "0xc0:0xac3": "ampere1",
}  # fmt: skip
"""LLVM's names of ARM cores by implementer and part of the MIDR register (Arm's technical reference manuals; Linux's
arch/arm64/include/asm/cputype.h)."""


@dataclass(frozen=True)
class DeviceGpu:
    """`name`: its driver's. `arch`: `sm_90`. `memory_bytes`: all of it."""

    name: str
    arch: str
    memory_bytes: int
    multiprocessors: int


@dataclass(frozen=True)
class Device:
    """`cores`: a name for each. `emulated`: QEMU's name of the processor, or empty. Versions are empty where a server
    that is not graphopt's does not say. `gpus`: of which the first is used."""

    arch: str
    cores: tuple[str, ...]
    features: frozenset[str]
    board: str
    system: str
    memory_bytes: int
    available_bytes: int
    emulated: str
    tvm: str
    tvm_ffi: str
    gpus: tuple[DeviceGpu, ...] = ()

    @property
    def name(self) -> str:
        """`Raspberry Pi 4 Model B, 4 x cortex-a72`, for people and for the schedule database."""
        counted = " + ".join(f"{count} x {core}" for core, count in sorted(Counter(self.cores).items()))
        gpus = [f"{each.name} ({each.arch})" for each in self.gpus]
        what = ", ".join(filter(None, (self.board, counted, *gpus))) or self.arch or "unknown"
        return f"{what}, emulated" if self.emulated else what

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits of what decides which kernel is fastest: equal for two boards of one kind."""
        content = [self.arch, sorted(self.cores), sorted(self.features), self.board, self.emulated]
        content += [[each.name, each.arch, each.multiprocessors] for each in self.gpus]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return {
            "name": self.name, "fingerprint": self.fingerprint, "arch": self.arch, "cores": list(self.cores),
            "features": sorted(self.features), "board": self.board, "system": self.system,
            "memory_bytes": self.memory_bytes, "available_bytes": self.available_bytes, "emulated": self.emulated,
            "tvm": self.tvm, "tvm_ffi": self.tvm_ffi, "gpus": [asdict(each) for each in self.gpus],
        }  # fmt: skip


def read_device(session: Session) -> Device:
    """Ask the server. Raises DeviceError: it is no server of graphopt's, or runs another version of TVM."""
    try:
        said = json.loads(str(session.rpc.get_function(DESCRIBE)()))
    except (RuntimeError, AttributeError, ValueError) as error:
        raise DeviceError(
            f"{session.where} does not say what it is: it is no RPC server of graphopt's",
            hint="start it with `graphopt rpc-server`, or the program of docs/farm.md",
        ) from error
    device = device_of(said)
    if (device.tvm, device.tvm_ffi) != (TVM_PIN, FFI_PIN):
        raise DeviceError(
            f"{session.where} runs TVM {device.tvm} with tvm-ffi {device.tvm_ffi}, this machine compiles for {TVM_PIN} "
            f"with {FFI_PIN}",
            hint=f"install apache-tvm=={TVM_PIN} apache-tvm-ffi=={FFI_PIN} there",
        )
    return device


def device_of(said: Mapping[str, Any]) -> Device:
    """What a server's JSON means."""
    arch = str(said["arch"])
    return Device(
        arch={"arm64": "aarch64", "AMD64": "x86_64"}.get(arch, arch),
        cores=tuple(_PARTS.get(str(core), str(core)) for core in said["cores"]),
        features=frozenset(said["features"]),
        board=said["board"],
        system=said["system"],
        memory_bytes=int(said["memory_bytes"]),
        available_bytes=int(said["available_bytes"]),
        emulated=said["emulated"],
        tvm=said["tvm"],
        tvm_ffi=said["tvm_ffi"],
        gpus=tuple(DeviceGpu(**each) for each in said.get("gpus", ())),
    )


def check_instructions(arch: str, features: frozenset[str], device: Device, where: str, what: str) -> None:
    """Raises TargetError where code for `arch` with `features` would not run on the device."""
    if device.arch != arch:
        raise TargetError(f"{where} is {device.arch}, {what} is {arch}", hint="give the --target that it is")
    missing = sorted(features - device.features)
    if missing:
        raise TargetError(
            f"{where} ({device.name}) lacks {', '.join(missing)}, which {what} uses",
            hint="give the --target that it is",
        )


def check_gpu(arch: str, device: Device, where: str, what: str) -> None:
    """Raises TargetError where the device has no GPU, or machine code for `arch` does not run on it."""
    if not device.gpus:
        raise TargetError(
            f"{where} ({device.name}) has no GPU that its server can use, and {what} runs on one",
            hint="it needs NVIDIA's driver and CUDA's runtime library; the server finds them when it starts",
        )
    here = device.gpus[0]
    if not gpu.runs_on(arch, here.arch):
        raise TargetError(
            f"the GPU of {where} is {here.arch} ({here.name}), {what} is for {arch}",
            hint=f"give --target 'cuda{{arch={here.arch}}}'",
        )


def needed_bytes(folder: Path) -> int:
    """Memory that the compiled model in `folder` takes: its library with the weights, its planned memory, its inputs
    and outputs."""
    import numpy as np

    description = read_description(folder)
    ports = [*description["inputs"], *description["outputs"]]
    moved = sum(int(np.prod(p["shape"], dtype=np.int64)) * np.dtype(p["dtype"]).itemsize for p in ports)
    return (folder / LIBRARY).stat().st_size + int(description.get("planned_bytes", 0)) + moved


def check_memory(folder: Path, device: Device, where: str) -> None:
    """Raises TargetError where the model cannot fit into what memory the device, or its GPU, has."""
    needed = needed_bytes(folder)
    on_gpu = read_description(folder).get("device") == "cuda"
    there = device.gpus[0].memory_bytes if on_gpu else device.available_bytes
    if there and needed > there:
        raise TargetError(
            f"the model takes {needed / 1e6:.0f} MB with its weights, {where} ({device.name}) has "
            f"{there / 1e6:.0f} MB {'on its GPU' if on_gpu else 'free'}",
            hint="nothing was uploaded; quantized weights, a smaller batch or a smaller model fit better",
        )
