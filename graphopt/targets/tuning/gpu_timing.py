"""Time candidates for one GPU kernel: compiled together into a library, on this machine's GPU or on one over RPC.

Times are of CUDA events, operands in the second-level cache where they fit. A launch takes longer than a small kernel
does, so each function calls its kernel many times from a CUDA graph, as a model would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.runtime.tvm_engine import last_line
from graphopt.targets import nvcc
from graphopt.targets.relax import cuda_executable
from graphopt.targets.schedules import cuda
from graphopt.targets.schedules.cuda import GpuWorkload

if TYPE_CHECKING:
    from graphopt.remote.session import Session
    from graphopt.targets.cuda import Cuda

REPEATS = 3
REPEAT_MS = 2
CALLS = 32
"""Of the kernel in a function."""
LIMIT_S = 60.0
"""Of all candidates of a kernel on a device: connecting, sending, running."""


@dataclass(frozen=True)
class Candidates:
    """A library with a function `run_i` for each candidate, which calls it `CALLS` times; shapes and element types of
    the arguments of each."""

    library: Path
    parameters: Sequence[Sequence[tuple[tuple[int, ...], str]]]

    def time_here(self) -> list[float | str]:
        """Microseconds of each on this machine's GPU, or why it could not run. Raises TargetError without a GPU."""
        import tvm

        from graphopt.runtime.cuda_engine import load_runtime

        load_runtime()
        return self._times(tvm.runtime.load_module(str(self.library)), tvm.cuda(0))

    def time_there(self, session: Session) -> list[float | str]:
        """The same on a device's GPU. Raises TargetError where it cannot load them, DeviceError where it is lost."""
        module = session.load(self.library, "candidates.so")
        with session.told("time a kernel's candidates"):
            return self._times(module, session.gpu)

    def _times(self, module: Any, device: Any) -> list[float | str]:
        from tvm import relax, runtime

        from graphopt.remote.session import is_lost

        machine: Any = relax.VirtualMachine(module, device)
        rng = np.random.default_rng(0)
        found: list[float | str] = []
        for index, shapes in enumerate(self.parameters):
            arguments = [runtime.tensor(values(rng, shape, dtype), device) for shape, dtype in shapes]
            timer = machine.time_evaluator(f"run_{index}", device, number=1, repeat=REPEATS, min_repeat_ms=REPEAT_MS)
            try:
                found.append(float(np.median(timer(*arguments).results)) * 1e6 / CALLS)
            except RuntimeError as error:
                if is_lost(error):
                    raise
                found.append(last_line(error))
        return found


def compile_candidates(workload: GpuWorkload, choices: Sequence[cuda.Choice], target: Cuda, folder: Path) -> Candidates:
    """Compile `choices` into one library in `folder`. Raises TargetError where nvcc refuses."""
    library = folder / "candidates.so"
    module, parameters = _module(workload, choices)
    cuda_executable.export(
        module, target.tvm_target(), library, gpu_arch=target.gpu_arch, host_arch=target.host_arch, jobs=2,
        compiler=nvcc.compile_source,
    )  # fmt: skip
    return Candidates(library, parameters)


def _module(workload: GpuWorkload, choices: Sequence[cuda.Choice]) -> tuple[Any, list[list[tuple[tuple, str]]]]:
    """A Relax module with a function `run_i` for each choice; and shapes and types of each one's parameters.

    Kernels are recorded in a graph only if the addresses of their operands never change: so inputs are copied first,
    and the result last.
    """
    from tvm import relax

    builder: Any = relax.BlockBuilder()
    tensor: Any = relax.TensorType
    call: Any = relax.call_tir
    copies: dict[tuple, Any] = {}
    parameters = []
    for index, choice in enumerate(choices):
        func = cuda.schedule(workload, choice).func
        *inputs, output = [(tuple(int(d) for d in p.ty.shape), str(p.ty.dtype)) for p in func.params]
        called = builder.add_func(func.without_attr("global_symbol"), f"candidate_{index}")
        for each in (*inputs, output):
            if each not in copies:
                copies[each] = builder.add_func(_copy(workload, *each), f"copy_{len(copies)}")
        taken: list[Any] = [relax.Var(f"x{i}", tensor(*each)) for i, each in enumerate(inputs)]
        with builder.function(f"run_{index}", taken):
            fixed = [builder.emit(call(copies[x], [v], tensor(*x))) for x, v in zip(inputs, taken, strict=True)]
            made = [builder.emit(call(called, fixed, tensor(*output))) for _ in range(CALLS)]
            builder.emit_func_output(builder.emit(call(copies[output], [made[-1]], tensor(*output))))
        parameters.append(inputs)
    return builder.get(), parameters


def _copy(workload: GpuWorkload, shape: tuple[int, ...], dtype: str) -> Any:
    """A kernel that copies a tensor."""
    from tvm import te

    source = te.placeholder(shape, dtype, name="x")
    operands: Any = [source, te.compute(shape, lambda *at: source(*at), name="copy")]
    made = te.create_prim_func(operands)
    alike = GpuWorkload(made, gpu=workload.gpu, target=workload.target)
    return cuda.schedule(alike, cuda.choices(alike)[0]).func.without_attr("global_symbol")


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers of ordinary size: time may depend on them, by the power they draw."""
    if "int" in dtype:
        return rng.integers(-64 if not dtype.startswith("u") else 0, 64, shape).astype(dtype)
    values = rng.standard_normal(shape) / math.sqrt(max(shape[-1] if shape else 1, 1))
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)
