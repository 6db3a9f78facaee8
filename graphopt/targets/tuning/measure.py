"""Build one candidate in this process and time it."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.schedules.workload import Kernel

REPEAT = 12
MIN_REPEAT_MS = 1
"""Short windows and many: on a busy machine at least one of them runs undisturbed."""


class Candidate:
    """A compiled kernel. Raises what TVM raises where a schedule cannot be built."""

    def __init__(self, func, target):
        import tvm

        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        with target, tvm.transform.PassContext(opt_level=3):
            self._built: Any = tvm.compile(module, target=target)

    def time_us(self, arguments: list[Any]) -> float:
        """The least of a few repeats, in microseconds: interference only ever adds time."""
        import tvm

        loaded = self._built.jit()
        loaded["main"](*arguments)
        timer = loaded.time_evaluator("main", tvm.cpu(), number=1, repeat=REPEAT, min_repeat_ms=MIN_REPEAT_MS)
        return float(min(timer(*arguments).results)) * 1e6


def arguments_for(func, seed: int) -> list[Any]:
    """Random tensors of the function's parameters; small positive numbers, so that no path meets denormals or NaN."""
    import tvm

    rng = np.random.default_rng(seed)
    found = []
    for param in func.params:
        buffer = param.ty
        shape = tuple(int(d) for d in buffer.shape)
        dtype = np.dtype(str(buffer.dtype))
        if dtype.kind == "f":
            array = rng.uniform(0.1, 1.0, shape).astype(dtype)
        else:
            array = rng.integers(0, 2, shape).astype(dtype)
        found.append(tvm.runtime.tensor(array))
    return found


def repacked(arguments: list[Any], kernel: Kernel) -> list[Any]:
    """The arguments with those in another form that the kernel wants."""
    import tvm

    found = list(arguments)
    for index, repack in kernel.repack.items():
        found[index] = tvm.runtime.tensor(np.ascontiguousarray(repack(arguments[index].numpy())))
    return found
