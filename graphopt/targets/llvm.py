"""What all processors that LLVM generates code for have in common: ONNX -> Relax in blocked form -> fused, scheduled
kernels -> a shared library.

`LlvmTarget` reads as its stages: `lower`, `tune`, `build`. TVM is imported when a stage runs, not before.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from graphopt import capabilities, guard
from graphopt.errors import TargetError
from graphopt.progress import SILENT, Progress
from graphopt.runtime import amx_permission
from graphopt.targets.base import Devices, Lowered, Survey, Target, TensorType, TuningReport

if TYPE_CHECKING:
    from graphopt.targets.relax import ahead_of_time
    from graphopt.targets.tuning.build_pool import BuildPool

PRECISIONS = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16",
}  # fmt: skip
"""What `precision` may be, and what it then is."""
PRECISION_FEATURES = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16"}),
    "float16": frozenset({"asimdhp"}),
}
"""Of these a processor needs one to compute in the precision."""
TVM_PIN = "0.27.0.post1"
FFI_PIN = "0.1.14.post1"


@dataclass
class LoweredModel:
    """A model as Relax: fused but unscheduled kernels, and the decisions for them."""

    module: Any
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    decisions: dict[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By kernel: the template's name and its decision. Kernels that are absent get their template's first."""
    tiles: bool = False
    """Whether kernels may use AMX tile registers."""
    layers: tuple[tuple[str, str], ...] = ()
    """The calls of kernels in a run, in order: the kernel, and the label of the layer whose weights it reads, or ''."""


class LlvmTarget(Target):
    """Base of targets whose kernels LLVM compiles; those are dataclasses with these fields. `threads` 0 means all
    processors.

    `precision` is `float32`, `bfloat16` (or `bf16`) or `float16` (or `fp16`): what images and weights are stored as
    between kernels; float16 is computed with, too (see `half`).
    `without` names templates and ideas to leave out, joined by `+` (`without=winograd+prefetch`): for measuring what
    each brings.
    """

    threads: int
    precision: str
    without: str

    def __post_init__(self):
        if self.threads < 0:
            raise ValueError(f"threads must be 0 (all) or more, not {self.threads}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, not {self.precision!r}")
        object.__setattr__(self, "precision", PRECISIONS[self.precision])

    @property
    @abc.abstractmethod
    def llvm_cpu(self) -> str:
        """LLVM's name of the processor code is generated for."""

    @property
    @abc.abstractmethod
    def arch(self) -> str:
        """`x86_64` or `aarch64`."""

    @property
    def runs_here(self) -> bool:
        return self.arch == capabilities.host_arch()

    @property
    @abc.abstractmethod
    def features(self) -> frozenset[str]:
        """The extensions that generated code may use, in /proc/cpuinfo's spelling."""

    def computes_in(self, precision: str) -> bool:
        """Whether the processor has instructions for a precision."""
        needed = PRECISION_FEATURES.get(PRECISIONS[precision])
        return needed is None or bool(self.features & needed)

    def check_precision(self) -> None:
        """Raises TargetError where the processor has no instructions for `precision`."""
        if not self.computes_in(self.precision):
            needed = " or ".join(sorted(PRECISION_FEATURES[self.precision]))
            raise TargetError(
                f"{self.llvm_cpu} has no {self.precision} instructions ({needed})",
                hint="use precision float32",
            )

    def uses_tiles(self, integers: bool) -> bool:
        """Whether kernels may use AMX tile registers, for which a process must ask; `integers`: some multiply bytes."""
        in_bfloat16 = self.precision == "bfloat16" and "amx_bf16" in self.features
        return in_bfloat16 or (integers and "amx_int8" in self.features)

    def machine(self):
        """What schedules need to know."""
        from graphopt.targets.schedules.workload import Machine

        lanes = self.capabilities.float_lanes
        registers = 32 if lanes == 16 or self.arch == "aarch64" else 16
        return Machine(lanes, registers, self.thread_count, self.features, self.switched_off)

    @property
    def switched_off(self) -> frozenset[str]:
        """Names in `without`."""
        return frozenset(self.without.split("+")) - {""}

    @property
    def thread_count(self) -> int:
        from graphopt.runtime.tvm_engine import available_processors

        return self.threads or available_processors()

    def tvm_target(self):
        """The `tvm.target.Target` code is generated for."""
        import tvm

        described: dict[str, Any] = {"kind": "llvm", "mcpu": self.llvm_cpu, "mtriple": f"{self.arch}-linux-gnu"}
        if self.arch == "aarch64":
            described["mattr"] = ["+neon"]
        return tvm.target.Target({**described, "num-cores": self.thread_count})

    def form(self, integers: bool):
        """How values are stored; `integers`: the model multiplies bytes."""
        from graphopt.targets.relax import half
        from graphopt.targets.relax.form import Form

        known = self.capabilities
        # A block of bytes fills a register of 16 bytes, as a block of float32 fills one of 64.
        width = 16 if integers and known.float_lanes < 16 and self.arch == "aarch64" else 0
        if self.precision == "float16":
            width = max(width, half.LANES)
        tiles = integers and "amx_int8" in self.features
        tables = "avx512f" in self.features or self.arch == "aarch64"
        return Form(known.float_lanes, self.precision, tiles, known.activation_dtype, width, tables)

    def lower(self, model: ir.Model) -> LoweredModel:
        """Translate a model with static input shapes.

        Raises UnsupportedOperatorError naming every operator (and one node each) that cannot be translated, and
        TargetError where an input is dynamic or TVM refuses a node.
        """
        from tvm.error import InternalError

        from graphopt.targets.relax import half, importer, layer_calls, pipeline

        self.check_precision()
        try:
            integers = importer.multiplies_bytes(model)
            imported = importer.import_model(model, self.form(integers))
            guard.at("fusing kernels")
            module = pipeline.fuse(imported.module, chains="fusion" not in self.switched_off)
            if self.precision == "float16":
                module = half.computed(module, self.machine())
        except (InternalError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
                AssertionError) as error:  # fmt: skip
            raise compile_error(error) from error  # a model may be valid, and still be one that nobody thought of
        names = [str(v.name) for v in model.graph.inputs if not v.is_initializer()]
        outputs = [str(v.name) for v in model.graph.outputs]
        return LoweredModel(
            module,
            *tensor_descriptions(imported.module, names, outputs),
            tiles=self.uses_tiles(integers),
            layers=layer_calls.layer_calls(module, imported.made_for),
        )

    def survey(self, model: ir.Model, known: Mapping[str, TensorType]) -> Survey:
        """Which nodes `lower` would refuse."""
        from graphopt.targets.relax import importer, survey

        return survey.survey(model, self.form(importer.multiplies_bytes(model)), known)

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
        hints: Mapping[str, Mapping[str, Any]] | None = None,
        pool: BuildPool | None = None,
    ) -> TuningReport:
        """Search each kernel's space within `seconds`; kernels in `database` need no search.

        `hints`, by kernel: rows of the report on another model with the same kernels, such as this one at another size.
        `pool`: `build_pool()`, for several models one after another.

        For another kind of processor than this machine's, and without `devices`, candidates are counted in the emulator
        instead of timed (`counted_search`); where there is none, the templates' first decisions stand, as they do with
        `seconds` 0. Raises TargetError where this processor is of the target's kind, but lacks its instructions;
        DeviceError when all `devices` are lost.
        """
        from graphopt.remote.farm import RemoteDevices
        from graphopt.targets.tuning import peak
        from graphopt.targets.tuning.search import Search

        elsewhere = cast(RemoteDevices | None, devices)
        lowered = cast(LoweredModel, lowered)
        if seconds > 0 and elsewhere is None and not self.runs_here:
            return self._tune_by_counting(lowered, seconds, Path(database), seed, progress)
        if seconds > 0 and elsewhere is None and not self.features <= capabilities.host_features():
            raise TargetError(f"{self} cannot be tuned here: this processor lacks its instructions", hint="tune there")
        if seconds > 0 and lowered.tiles and elsewhere is None:
            amx_permission.require(f"a kernel for {self}")
        search = Search(
            lowered, self, Path(database), seed, progress, fresh=fresh, everything=everything, devices=elsewhere,
            hints=hints, pool=pool,
        )  # fmt: skip
        report = search.run(seconds)
        return peak.with_shares(report, self) if seconds > 0 and elsewhere is None else report

    @contextlib.contextmanager
    def build_pool(self) -> Iterator[BuildPool | None]:
        """Processes that build candidates, warm, for several calls of `tune`; None where that times none here."""
        from graphopt.targets.tuning.build_pool import BuildPool
        from graphopt.targets.tuning.search import usable_processors

        if not self.runs_here:
            yield None
            return
        with BuildPool(usable_processors()) as pool:
            yield pool

    def _tune_by_counting(
        self, lowered: LoweredModel, seconds: float, database: Path, seed: int, progress: Progress
    ) -> TuningReport:
        from graphopt.remote.instructions import find_counting_emulator
        from graphopt.targets.tuning.counted_search import CountedSearch
        from graphopt.targets.tuning.search import Search

        try:
            find_counting_emulator(self.arch)
        except TargetError as error:
            progress.note(f"not tuned: {error}")
            return Search(lowered, self, database, seed, progress).run(0)
        return CountedSearch(lowered, self, database, seed, progress).run(seconds)

    def build(self, lowered: Lowered, folder: Path) -> tuple[str, ...]:
        """Compile with the decisions that `tune` made; writes model.so and engine.json. Raises TargetError."""
        from graphopt.runtime import tvm_engine

        lowered = cast(LoweredModel, lowered)
        described = self._compiled({"main": lowered}, Path(folder))
        return self._written({"format": tvm_engine.FORMAT, **described, **_entry_description(lowered)}, Path(folder))

    def build_sized(self, lowered: Mapping[str, Lowered], folder: Path, sizes: Mapping[str, Any]) -> tuple[str, ...]:
        """`build` of one model for several sizes of its dimensions, as one library; `lowered` by the names of its
        functions, the same as in `sizes`, which is a `SizePlan` as JSON has it. Raises TargetError."""
        from graphopt.runtime import tvm_engine

        models = {name: cast(LoweredModel, each) for name, each in lowered.items()}
        described = self._compiled(models, Path(folder))
        entries = [
            {"function": name, "sizes": sizes["entries"][name], **_entry_description(each)}
            for name, each in models.items()
        ]
        shared = {key: value for key, value in sizes.items() if key != "entries"}
        return self._written({"format": tvm_engine.SIZED, **described, **shared, "entries": entries}, Path(folder))

    def _compiled(self, models: Mapping[str, LoweredModel], folder: Path) -> dict[str, Any]:
        """Write the library; returns what engine.json says of it, whatever functions it has."""
        from tvm.error import InternalError

        from graphopt.runtime import tvm_engine
        from graphopt.targets.relax import executable

        try:
            guard.at("generating machine code")
            library = folder / tvm_engine.LIBRARY
            fresh = folder / f".{tvm_engine.LIBRARY}.new"  # never write into a file that may be mapped
            planned = executable.export(
                {name: self.scheduled(each) for name, each in models.items()},
                self.tvm_target(),
                fresh,
                arch=self.arch,
                jobs=tvm_engine.available_processors(),
                in_place="concat" not in self.switched_off,
            )
            os.replace(fresh, library)
        except (InternalError, RuntimeError, ValueError) as error:
            raise compile_error(error) from error
        except OSError as error:
            raise TargetError(f"cannot write {folder}: {error.strerror or error}") from error
        return {
            "arch": self.arch,
            "mcpu": self.llvm_cpu,
            "features": sorted(self.features),
            "tvm": TVM_PIN,
            "threads": self.thread_count,
            "precision": self.precision,
            "tiles": any(each.tiles for each in models.values()),
            "planned_bytes": planned,
            "library_sha256": tvm_engine.library_digest(library),
        }

    def _written(self, described: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        from graphopt.runtime import tvm_engine

        (folder / tvm_engine.DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        return tvm_engine.LIBRARY, tvm_engine.DESCRIPTION

    def build_objects(self, lowered: Lowered, folder: Path) -> ahead_of_time.Plan:
        """Compile into object files that run without TVM's runtime, and the plan of their calls. Raises TargetError."""
        from tvm.error import InternalError

        from graphopt.runtime.tvm_engine import available_processors
        from graphopt.targets.relax import ahead_of_time

        try:
            return ahead_of_time.export(
                self.scheduled(cast(LoweredModel, lowered)),
                self.tvm_target(),
                folder,
                arch=self.arch,
                jobs=available_processors(),
                in_place="concat" not in self.switched_off,
            )
        except (InternalError, RuntimeError, ValueError) as error:
            raise compile_error(error) from error

    def scheduled(self, lowered: LoweredModel):
        """The Relax module with a schedule applied to every kernel."""
        from graphopt.targets import schedules
        from graphopt.targets.relax import pipeline
        from graphopt.targets.schedules.workload import Workload

        kernels = {}
        for name, func in pipeline.prim_funcs(lowered.module).items():
            workload = Workload(func.with_attr("global_symbol", "main"), self.machine())
            if name in lowered.decisions:
                choice = schedules.Choice(lowered.decisions[name][0], dict(lowered.decisions[name][1]))
            else:
                choice = schedules.choices(workload)[0]
            kernels[name] = schedules.schedule(workload, choice)
        return pipeline.with_kernels(lowered.module, kernels)


def _entry_description(lowered: LoweredModel) -> dict[str, Any]:
    """What engine.json says of one function of a library."""
    return {
        "layers": [list(call) for call in lowered.layers],
        "decisions": {name: list(chosen) for name, chosen in sorted(lowered.decisions.items())},
        "inputs": list(lowered.inputs),
        "outputs": list(lowered.outputs),
    }


def tensor_descriptions(module, names, outputs):
    """Name, element type and shape of the inputs and of the outputs of a Relax module's `main`, as engine.json has
    them."""
    main = module["main"]
    fields = list(main.ret_ty.fields) if hasattr(main.ret_ty, "fields") else [main.ret_ty]
    return (
        tuple(_description(n, p.ty) for n, p in zip(names, main.params, strict=True)),
        tuple(_description(n, f) for n, f in zip(outputs, fields, strict=True)),
    )


def _description(name: str, kind) -> dict[str, Any]:
    return {"name": name, "dtype": str(np.dtype(str(kind.dtype))), "shape": [int(d) for d in kind.shape.values]}


def load_compiler() -> None:
    """Import what compiles: a process that is forked afterwards has it."""
    import tvm  # noqa: F401

    from graphopt.targets.relax import importer  # noqa: F401


def compile_error(error: BaseException) -> TargetError:
    """What TVM's error comes down to."""
    if isinstance(error, TargetError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TargetError(
        f"TVM could not compile the model: {lines[-1][:200] if lines else type(error).__name__}",
        hint="the model can stay on ONNX Runtime",
    )
