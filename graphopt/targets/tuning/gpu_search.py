"""Choose GPU kernels by measuring them, on this machine's GPU; where there is none, by rule and from what was measured.

The candidates of a kernel are the few that the templates' rules put first. They are compiled together into one library
and timed with CUDA events, operands in the second-level cache. Records are kept in the schedule database under the
architecture and the number of multiprocessors, so that a machine without a GPU builds with what another one measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import TargetError
from graphopt.progress import Progress
from graphopt.runtime import gpu
from graphopt.runtime.tvm_engine import last_line
from graphopt.targets import nvcc
from graphopt.targets.base import TuningReport
from graphopt.targets.relax import cuda_executable, pipeline
from graphopt.targets.schedules import cuda
from graphopt.targets.schedules.cuda import GpuWorkload
from graphopt.targets.schedules.cuda.products import product_of
from graphopt.targets.tuning.database import Database, Key, Record, compiler_version
from graphopt.targets.tuning.signature import workload_digest

if TYPE_CHECKING:
    from graphopt.targets.cuda import Cuda
    from graphopt.targets.llvm import LoweredModel

CANDIDATES = 8
"""Of a kernel that are measured."""
REPEATS = 3
REPEAT_MS = 2


@dataclass
class Task:
    """Kernels that are the same computation."""

    key: Key
    workload: GpuWorkload
    choices: list[cuda.Choice]
    names: list[str] = field(default_factory=list)
    calls: int = 0
    record: Record | None = None
    from_database: bool = False
    trials: int = 0

    @property
    def choice(self) -> cuda.Choice:
        if self.record is None:
            return self.choices[0]
        return cuda.Choice(self.record.template, dict(self.record.decision))

    @property
    def macs(self) -> int:
        """Multiply-adds of all calls in a run, of products; others count nothing."""
        product = product_of(self.workload)
        return 0 if product is None else product.rows * product.columns * product.depth * self.calls


class GpuSearch:
    """Tasks of a lowered model, and the search over them."""

    def __init__(self, lowered: LoweredModel, target: Cuda, database: Path, progress: Progress, fresh: bool):
        self.lowered, self.target, self.progress = lowered, target, progress
        self.database = Database(database)
        self.tasks = self._tasks(fresh)

    def _tasks(self, fresh: bool) -> list[Task]:
        calls = pipeline.call_counts(self.lowered.module)
        found: dict[str, Task] = {}
        for name, workload in self.target.workloads(self.lowered).items():
            digest = workload_digest(workload, without=self.target.switched_off)
            if digest not in found:
                key = Key(digest, self.target.gpu_arch, workload.gpu.multiprocessors)
                task = Task(key, workload, cuda.choices(workload))
                known = None if fresh else self.database.find(key)
                if known is not None and known.version == cuda.version_of(known.template):
                    task.record, task.from_database = known, True
                found[digest] = task
            found[digest].names.append(name)
            found[digest].calls += calls.get(name, 0)
        return list(found.values())

    def run(self, seconds: float) -> TuningReport:
        """Measure for about `seconds`, the largest products first; 0: what rules and records say.

        Raises TargetError where something is to be measured and this machine's GPU is not of the architecture.
        KeyboardInterrupt keeps what was measured.
        """
        begun = time.perf_counter()
        waiting = [task for task in self.tasks if task.record is None and len(task.choices) > 1]
        waiting.sort(key=lambda task: -task.macs)
        stopped = False
        try:
            if seconds > 0 and waiting:
                self._require_gpu()
                with self.progress.task("tune", len(waiting)) as advance:
                    for task in waiting:
                        stopped = time.perf_counter() - begun > seconds
                        if stopped:
                            break
                        self._measure(task)
                        advance(1)
        finally:
            for task in self.tasks:
                for name in task.names:
                    self.lowered.decisions[name] = task.choice.template, dict(task.choice.decision)
        return self._report(time.perf_counter() - begun, stopped)

    def _require_gpu(self) -> None:
        lacking = gpu.missing()
        if lacking is None and gpu.architecture() != self.target.gpu_arch:
            lacking = f"this machine's GPU is {gpu.architecture()}"
        if lacking is not None:
            raise TargetError(f"{self.target} cannot be tuned here: {lacking}", hint="tune there, or for 0 seconds")

    def _measure(self, task: Task) -> None:
        times = time_choices(task.workload, task.choices[:CANDIDATES], self.target)
        task.trials = len(times)
        for choice, problem in ((c, t) for c, t in zip(task.choices, times, strict=False) if isinstance(t, str)):
            self.progress.note(f"{task.names[0]}: {choice} cannot run ({problem})")
        timed = [(t, i) for i, t in enumerate(times) if isinstance(t, float)]
        if not timed:
            return
        best_us, best = min(timed)
        choice = task.choices[best]
        task.record = Record(
            choice.template, cuda.version_of(choice.template) or 0, dict(choice.decision), best_us, len(timed), True,
            task.names[0], tvm=compiler_version(),
        )  # fmt: skip
        self.database.add(task.key, task.record)

    def _report(self, seconds: float, stopped: bool) -> TuningReport:
        rows, chosen = [], []
        for task in self.tasks:
            time_us = None if task.record is None else task.record.time_us
            rows.append(
                {"workload": task.names[0], "template": task.choice.template, "decision": dict(task.choice.decision),
                 "time_us": time_us, "gflops": None if not time_us else 2 * task.macs / task.calls / time_us / 1e3,
                 "calls": task.calls, "trials": task.trials, "from_database": task.from_database, "kind": "",
                 "share_of_peak": None}
            )  # fmt: skip
            chosen.append((task.key.workload, task.choice.template, json.dumps(task.choice.decision, sort_keys=True)))
        digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()
        known = sum(task.from_database for task in self.tasks)
        trials = sum(task.trials for task in self.tasks)
        return TuningReport(len(self.tasks), known, trials, seconds, digest, tuple(rows), stopped)


def time_choices(workload: GpuWorkload, choices: list[cuda.Choice], target: Cuda) -> list[float | str]:
    """Microseconds of each choice on this machine's GPU, or why it could not run."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    from graphopt.runtime.cuda_engine import load_runtime

    load_runtime()
    device: Any = tvm.cuda(0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="graphopt-tune-") as folder:
        library = Path(folder) / "candidates.so"
        module, parameters = _candidates(workload, choices)
        cuda_executable.export(
            module, target.tvm_target(), library, gpu_arch=target.gpu_arch, host_arch=target.host_arch, jobs=2,
            compiler=nvcc.compile_source, graphs=False,
        )  # fmt: skip
        loaded: Any = tvm.runtime.load_module(str(library))
        machine: Any = VirtualMachine(loaded, device)
    found: list[float | str] = []
    for index, shapes in enumerate(parameters):
        arguments = [tvm.runtime.tensor(_values(rng, shape, dtype), device) for shape, dtype in shapes]
        timer = machine.time_evaluator(f"run_{index}", device, number=1, repeat=REPEATS, min_repeat_ms=REPEAT_MS)
        try:
            found.append(float(np.median(timer(*arguments).results)) * 1e6)
        except RuntimeError as error:
            found.append(last_line(error))
    return found


def _candidates(workload: GpuWorkload, choices: list[cuda.Choice]) -> tuple[Any, list[list[tuple[tuple, str]]]]:
    """A Relax module with a function `run_i` for each choice; and shapes and types of each one's parameters."""
    from tvm import relax

    builder: Any = relax.BlockBuilder()
    tensor: Any = relax.TensorType
    call: Any = relax.call_tir
    parameters = []
    for index, choice in enumerate(choices):
        func = cuda.schedule(workload, choice).func
        *inputs, output = [(tuple(int(d) for d in p.ty.shape), str(p.ty.dtype)) for p in func.params]
        called = builder.add_func(func.without_attr("global_symbol"), f"candidate_{index}")
        taken: list[Any] = [relax.Var(f"x{i}", tensor(*each)) for i, each in enumerate(inputs)]
        with builder.function(f"run_{index}", taken):
            with builder.dataflow():
                made = builder.emit(call(called, taken, tensor(*output)))
                made = builder.emit_output(made)
            builder.emit_func_output(made)
        parameters.append(inputs)
    return builder.get(), parameters


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers of ordinary size: time may depend on them, by the power they draw."""
    if "int" in dtype:
        return rng.integers(-64 if not dtype.startswith("u") else 0, 64, shape).astype(dtype)
    values = rng.standard_normal(shape) / math.sqrt(max(shape[-1] if shape else 1, 1))
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)
