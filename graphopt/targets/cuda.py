"""NVIDIA GPUs: ONNX -> Relax, channels last -> fused kernels, scheduled for threads -> machine code in a library.

`Cuda` reads as its stages: `lower`, `tune`, `build`. None of them needs a GPU; running does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import onnx_ir as ir

from graphopt import capabilities
from graphopt.capabilities import Capabilities
from graphopt.errors import TargetError
from graphopt.gpu_names import ARCHITECTURES, Architecture, find_architecture, find_gpu
from graphopt.progress import SILENT, Progress
from graphopt.runtime import gpu
from graphopt.targets import nvcc
from graphopt.targets.base import Devices, Diagnosis, Lowered, Target, TuningReport
from graphopt.targets.llvm import TVM_PIN, LoweredModel, compile_error, tensor_descriptions

if TYPE_CHECKING:
    from graphopt.remote.farm import RemoteDevices

PRECISIONS = {
    "float32": "float32", "float16": "float16", "bfloat16": "bfloat16",
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip
"""What `precision` may be, and what it then is."""
NEEDS = {"float16": "tensor_fp16", "bfloat16": "tensor_bf16"}
"""By precision: what an architecture must have."""
USUAL_ARCH = "sm_80"
"""Where neither an architecture nor a device is named and there is no GPU to ask."""


USUAL_MULTIPROCESSORS = 84
"""Where no device says how many."""
ATTEMPTS = 3
"""Compilations at most, where kernels spill and have other decisions."""


@dataclass(frozen=True)
class Cuda(Target):
    """`cuda{arch=sm_90}`, or `cuda{device=h100}`: the architecture code is made for; by default that of this machine's
    GPU.

    `host`: the processor beside it, `x86_64` or `aarch64`; by default that of the device, or this machine's.
    `precision` is `float32`, `float16` or `bfloat16`: what images and weights are stored as between kernels. `graphs`
    false: every kernel is launched by itself. `without` names templates to leave out, joined by `+`. `sms`: how many
    multiprocessors the GPU has; by default what is known of the device, or of this machine's GPU.
    """

    name: ClassVar[str] = "cuda"
    arch: str = ""
    device: str = ""
    host: str = ""
    precision: str = "float32"
    graphs: bool = True
    without: str = ""
    sms: int = 0

    def __post_init__(self):
        if self.arch and self.device:
            raise ValueError("arch and device both name an architecture: give one of them")
        if self.device:
            find_gpu(self.device)
        elif self.arch:
            object.__setattr__(self, "arch", find_architecture(self.arch))
        if self.sms < 0:
            raise ValueError(f"sms must be positive, not {self.sms}")
        if self.host not in ("", "x86_64", "aarch64"):
            raise ValueError(f"host must be x86_64 or aarch64, not {self.host!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, not {self.precision!r}")
        object.__setattr__(self, "precision", PRECISIONS[self.precision])

    @property
    def gpu_arch(self) -> str:
        """`sm_90`."""
        if self.device:
            return find_gpu(self.device).arch
        if self.arch:
            return self.arch
        found = gpu.architecture()
        return found if found is not None and found in ARCHITECTURES else USUAL_ARCH

    @property
    def host_arch(self) -> str:
        """`x86_64` or `aarch64`: what the code is for that launches kernels."""
        return self.host or (find_gpu(self.device).host if self.device else "") or capabilities.host_arch()

    @property
    def limits(self) -> Architecture:
        return ARCHITECTURES[self.gpu_arch]

    @property
    def capabilities(self) -> Capabilities:
        return capabilities.gpu_capabilities(self.host_arch, self.limits.features)

    @property
    def runs_here(self) -> bool:
        return self.host_arch == capabilities.host_arch() and gpu.missing() is None and gpu.runs(self.gpu_arch)

    @property
    def times_kernels(self) -> bool:
        return False  # a call of a kernel returns before it is done

    @property
    def runs_in_parts(self) -> bool:
        return False

    @property
    def multiprocessors(self) -> int:
        """As given; of the device; of this machine's GPU where it has the architecture; else a usual number."""
        if self.sms:
            return self.sms
        if self.device:
            return find_gpu(self.device).multiprocessors
        here = gpu.multiprocessors() if gpu.architecture() == self.gpu_arch else None
        return here or USUAL_MULTIPROCESSORS

    @property
    def switched_off(self) -> frozenset[str]:
        """Names in `without`."""
        return frozenset(self.without.split("+")) - {""}

    def tvm_target(self):
        """The `tvm.target.Target` code is generated for."""
        import tvm

        described = {
            "kind": "cuda",
            "arch": self.gpu_arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": self.limits.block_shared_bytes,
            "thread_warp_size": 32,
        }
        host = {"kind": "llvm", "mtriple": f"{self.host_arch}-linux-gnu"}
        return tvm.target.Target(described, host=host)

    def lower(self, model: ir.Model) -> LoweredModel:
        """Translate a model with static input shapes.

        Raises UnsupportedOperatorError naming every operator (and one node each) that cannot be translated, and
        TargetError where an input is dynamic, TVM refuses a node, or the architecture lacks the precision.
        """
        from graphopt.targets.relax import importer, layer_calls, pipeline
        from graphopt.targets.relax.form import Form

        self.check_precision()
        self._check_types(model)
        target = self.tvm_target()
        bytes_too = importer.multiplies_bytes(model)
        imported = importer.import_model(model, Form(0, self.precision, bytes_too, "int8"))
        with target:
            module = pipeline.fuse(imported.module, chains="fusion" not in self.switched_off)
        names = [str(v.name) for v in model.graph.inputs if not v.is_initializer()]
        outputs = [str(v.name) for v in model.graph.outputs]
        inputs, results = tensor_descriptions(imported.module, names, outputs)
        return LoweredModel(module, inputs, results, layers=layer_calls.layer_calls(module, imported.made_for))

    def check_precision(self) -> None:
        """Raises TargetError where the architecture has no matrix units for `precision`."""
        needed = NEEDS.get(self.precision)
        if needed is not None and needed not in self.limits.features:
            raise TargetError(f"{self.gpu_arch} has no {self.precision} matrix units", hint="use precision float32")

    def _check_types(self, model: ir.Model) -> None:
        halves = any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs)
        if halves and self.precision in NEEDS:
            raise TargetError(
                f"the model computes in float16 itself, so precision {self.precision} has nothing to convert",
                hint="give the float32 model, or use precision float32",
            )

    def tune(
        self,
        lowered: Lowered,
        *,
        seconds: float,
        database: Path,
        seed: int = 0,
        progress: Progress = SILENT,
        fresh: bool = False,
        everything: bool = False,
        devices: Devices | None = None,
    ) -> TuningReport:
        """Choose a template and a decision for each kernel: by measuring candidates for about `seconds` on this
        machine's GPU or on those of `devices`, or where `seconds` are 0 by what `database` knows and by rule.

        Raises TargetError where there is something to measure and no GPU of this architecture, DeviceError where no
        device is left. `seed` and `everything` change nothing: candidates are few, and the same each time.
        """
        from graphopt.targets.tuning.gpu_search import GpuSearch

        lowered, there = cast(LoweredModel, lowered), cast("RemoteDevices | None", devices)
        return GpuSearch(lowered, self, Path(database), progress, fresh, there).run(seconds)

    def build(self, lowered: Lowered, folder: Path) -> tuple[str, ...]:
        """Compile with the decisions that `tune` made; writes model.so and engine.json. Raises TargetError."""
        from tvm.error import InternalError

        from graphopt.runtime import cuda_engine, tvm_engine
        from graphopt.targets.relax import cuda_executable

        lowered = cast(LoweredModel, lowered)
        folder = Path(folder)
        try:
            library = folder / tvm_engine.LIBRARY
            fresh = folder / f".{tvm_engine.LIBRARY}.new"  # never write into a file that may be mapped
            for _ in range(ATTEMPTS):
                needs = cuda_executable.export(
                    self.scheduled(lowered),
                    self.tvm_target(),
                    fresh,
                    gpu_arch=self.gpu_arch,
                    host_arch=self.host_arch,
                    jobs=tvm_engine.available_processors(),
                    compiler=nvcc.compile_source,
                    graphs=self.graphs,
                )
                if not self._replace_spilling(lowered, needs):
                    break
            os.replace(fresh, library)
        except (InternalError, RuntimeError, ValueError) as error:
            raise compile_error(error) from error
        except OSError as error:
            raise TargetError(f"cannot write {folder}: {error.strerror or error}") from error
        described = {
            "format": tvm_engine.FORMAT,
            "device": cuda_engine.DEVICE,
            "arch": self.host_arch,
            "gpu": self.gpu_arch,
            "features": [],
            "tvm": TVM_PIN,
            "precision": self.precision,
            "kernels": {name: each.to_dict() for name, each in sorted(needs.items())},
            "layers": [list(call) for call in lowered.layers],
            "library_sha256": tvm_engine.library_digest(library),
            "inputs": list(lowered.inputs),
            "outputs": list(lowered.outputs),
        }
        (folder / tvm_engine.DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        return tvm_engine.LIBRARY, tvm_engine.DESCRIPTION

    def _replace_spilling(self, lowered: LoweredModel, needs: Mapping[str, nvcc.Resources]) -> bool:
        """Give kernels that spill registers their next decision; whether there are any."""
        from graphopt.targets.schedules import cuda

        changed = False
        for name, workload in self.workloads(lowered).items():
            needed = needs.get(f"{name}_kernel")
            if needed is None or not needed.spill_bytes:
                continue
            choices = [(c.template, dict(c.decision)) for c in cuda.choices(workload)]
            current = lowered.decisions.get(name, choices[0])
            current = current[0], dict(current[1])
            place = choices.index(current) + 1 if current in choices else len(choices)
            if place < len(choices):
                lowered.decisions[name] = choices[place]
                changed = True
        return changed

    def workloads(self, lowered: LoweredModel) -> Mapping[str, Any]:
        """What schedules are chosen for, by kernel."""
        from graphopt.targets.relax import pipeline
        from graphopt.targets.schedules.cuda import Gpu, GpuWorkload

        described = Gpu(self.gpu_arch, self.multiprocessors, self.switched_off)
        target = self.tvm_target()
        return {
            name: GpuWorkload(func.with_attr("global_symbol", "main"), gpu=described, target=target)
            for name, func in pipeline.prim_funcs(lowered.module).items()
        }

    def scheduled(self, lowered: LoweredModel):
        """The Relax module with a schedule applied to every kernel."""
        from graphopt.targets.relax import pipeline
        from graphopt.targets.schedules import cuda

        kernels = {}
        for name, workload in self.workloads(lowered).items():
            known = lowered.decisions.get(name)
            choice = cuda.choices(workload)[0] if known is None else cuda.Choice(known[0], dict(known[1]))
            kernels[name] = cuda.schedule(workload, choice)
        return pipeline.with_kernels(lowered.module, kernels)


def doctor() -> list[Diagnosis]:
    """What there is to compile for GPUs with, and to run on."""
    toolkit = nvcc.find_toolkit()
    lacking = nvcc.missing()
    detail = lacking or (f"nvcc {nvcc.version(toolkit)} ({toolkit.nvcc})" if toolkit else "none")
    rows = [Diagnosis("CUDA compiler", lacking is None, detail, nvcc.REMEDY)]
    lacking = gpu.missing()
    found = ", ".join(gpu.names()) if lacking is None else str(lacking)
    rows.append(Diagnosis("GPU", lacking is None, found, gpu.REMEDY))
    return rows
