"""float16 in registers, for processors that compute in it: eight numbers a vector where float32 has four.

The importer stores images and weights in float16 and computes in float32 (`values`). `computed` then rewrites those
kernels that gain by it, one function at a time:

- convolutions, matrix products with a constant, and largest elements of a window are summed (or compared) in float16.
  A sum has at most `TERMS` terms in one run, or its template adds it up in such runs first and then the runs;
- elementwise chains behind these, or by themselves, are computed in float16 as far as they are made of +, -, *, max,
  min and comparisons; their constants become float16. From the first operation on that is not (exp, a division), and
  behind it, the chain is float32;
- a function with any other reduction (softmax, normalization, a mean) stays as it is, and so does what writes float32.

Numerics: unit roundoff u = 2^-11, numbers up to 65504. Runs of n terms, N in all, make the error of a sum at most
(n + N / n + 1) u times the sum of its terms' magnitudes, and about u sqrt((n + N / n) / 6) of the result where the
terms' signs are random: with runs, float32 would be no more than a tenth more accurate for layers of 4608 terms, and
twice as dear to add. (A single run of so many terms: u sqrt(N / 6).)

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 4.2 (blocked summation); Arm
Architecture Reference Manual for A-profile, FEAT_FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LANES = 8
"""float16 elements of a NEON register."""
TERMS = 160
"""Most terms of a sum in float16 that are added in one run."""
COMPUTED = "graphopt.half"
"""Attribute of a function that computes in float16."""
_SMALLEST, _LARGEST = 2.0**-14, 65504.0


def computed(module, machine):
    """A fused Relax module whose float32 kernels on float16 memory compute in float16, where the rules above say so."""
    from graphopt.targets.relax import pipeline
    from graphopt.targets.schedules.workload import Workload

    constants = _constants(module)
    kernels = {}
    for name, func in pipeline.prim_funcs(module).items():
        made = _Rewriting(Workload(func, machine), constants.get(name, {})).kernel()
        if made is not None:
            kernels[name] = made
    return pipeline.with_kernels(module, kernels)


def narrowed(array: np.ndarray) -> np.ndarray:
    """float32 -> float16, nearest even."""
    return np.asarray(array, np.float32).astype(np.float16)


def _constants(module) -> dict[str, dict[int, list[np.ndarray]]]:
    """By kernel and argument: the constants of its calls, where it is one in all of them."""
    import tvm

    from graphopt.targets.relax import pipeline

    found: dict[str, dict[int, list[np.ndarray]]] = {}
    others: set[tuple[str, int]] = set()
    for name, arguments in pipeline.calls(module):
        for index, argument in enumerate(arguments):
            if isinstance(argument, tvm.ir.GenericConst):
                constant: Any = argument
                found.setdefault(name, {}).setdefault(index, []).append(constant.value.numpy())
            else:
                others.add((name, index))
    for name, index in others:
        found.get(name, {}).pop(index, None)
    return found


class _Rewriting:
    """Of one function: which buffers become float16, and its blocks with these."""

    def __init__(self, workload, constants: Mapping[int, list[np.ndarray]]):
        self.workload = workload
        self.func = workload.func
        self.constants = constants
        self.fresh: list[tuple[Any, Any]] = []
        """Buffers, and their float16 stand-ins."""
        self.changed = False

    def kernel(self):
        """The function in float16 and the constants it wants narrowed; None where it stays as it is."""
        import tvm_ffi
        from tvm import s_tir, tirx

        from graphopt.targets.schedules.workload import Kernel

        made: dict[str, Any] = {}
        for name, block in self.workload.blocks.items():
            if any(int(v.iter_type) != 0 for v in block.iter_vars) or block.init is not None:
                new = self._reduction(name, block)
                if new is None:
                    return None
            else:
                new = self._elementwise(block)
            made[name] = new
        if not self.changed:
            return None

        def block(found):
            if found.name_hint != "root":
                return made[str(found.name_hint)]
            kept = [self._now(x) for x in found.alloc_buffers]
            return s_tir.SBlock(
                found.iter_vars, found.reads, found.writes, found.name_hint, found.body, found.init, kept,
                found.match_buffers, found.annotations,
            )  # fmt: skip

        body = tvm_ffi.structural_map(self.func.body, (s_tir.SBlock, block))
        params = list(self.func.params)
        repack = {i: narrowed for i, p in enumerate(params) if self._stand_in(p) is not None}
        params = [self._now(p) for p in params]
        func = tirx.PrimFunc(params, body, self.func.ret_type, self.func.attrs).with_attr(COMPUTED, 1)
        return Kernel(func, repack) if _is_scheduled(func, self.workload.machine) else None

    def _reduction(self, name: str, block):
        """A sum or largest element in float16; None where it must not be."""
        from tvm import tirx

        store = block.body
        target = block.writes[0].source
        if str(target.dtype) != "float32" or self._is_parameter(target) or not isinstance(store, tirx.BufferStore):
            return None
        if name == "window_max" and isinstance(store.value, tirx.Max):
            term, start = self._half(store.value.b, {}), -_LARGEST
        elif name in ANCHORS and isinstance(store.value, tirx.Add) and ANCHORS[name](self.workload, block):
            term, start = self._half(store.value.b, {}), 0.0
        else:
            return None
        if term is None:
            return None
        fresh = self._replace(target)
        self.changed = True
        operation: Any = type(store.value)
        value = operation(tirx.BufferLoad(fresh, store.indices), term)
        init = tirx.BufferStore(fresh, tirx.const(start, "float16"), store.indices)
        return self._rebuilt(block, tirx.BufferStore(fresh, value, store.indices), init)

    def _elementwise(self, block):
        """A block in float16 where its value can be; else with float32 of what is float16 now."""
        from tvm import tirx

        store = block.body
        if not isinstance(store, tirx.BufferStore):
            return block
        target: Any = store.buffer
        value: Any = store.value
        if str(target.dtype) == "float32" and not self._is_parameter(target):
            half = self._tried(value)
            if half is not None:
                return self._rebuilt(block, tirx.BufferStore(self._replace(target), half, store.indices), None)
        if str(target.dtype) == "float16" and isinstance(value, tirx.Cast) and _kind(value.value) == "float32":
            half = self._tried(value.value)
            if half is not None:
                return self._rebuilt(block, tirx.BufferStore(target, half, store.indices), None)
        return self._rebuilt(block, tirx.BufferStore(target, self._widened(value), store.indices), None)

    def _tried(self, x):
        """`_half`; where that is None no constant is narrowed either."""
        before = len(self.fresh)
        half = self._half(x, {})
        if half is None:
            del self.fresh[before:]
        else:
            self.changed = True
        return half

    def _half(self, x, names: dict[Any, Any]):
        """A float32 expression in float16; None where it has an operation, or reads something, that stays float32."""
        from tvm import tirx
        from tvm.ir.expr import TensorLoad

        if isinstance(x, tirx.Cast):
            return x.value if _kind(x.value) == "float16" else None
        if isinstance(x, tirx.FloatImm):
            size = abs(float(x.value))
            return tirx.const(float(x.value), "float16") if size == 0 or _SMALLEST <= size <= _LARGEST else None
        if isinstance(x, TensorLoad):
            stand_in = self._stand_in(x.source)
            if stand_in is None:
                stand_in = self._narrowed_parameter(x.source)
            return None if stand_in is None else tirx.BufferLoad(stand_in, x.indices)
        if isinstance(x, tirx.Var):
            return next((new for old, new in names.items() if old.same_as(x)), None)
        if isinstance(x, (tirx.Add, tirx.Sub, tirx.Mul, tirx.Max, tirx.Min)):
            operation: Any = type(x)
            return self._joined(operation, (x.a, x.b), names)
        if isinstance(x, tirx.Let):
            value = self._half(x.value, names)
            if value is None:
                return None
            name = tirx.Var(str(x.var.name), "float16")
            body = self._half(x.body, {**names, x.var: name})
            return None if body is None else tirx.Let(name, value, body)
        if isinstance(x, tirx.Select):
            condition = self._condition(x.condition, names)
            if condition is None:
                return None
            return self._joined(lambda a, b: tirx.Select(condition, a, b), (x.true_value, x.false_value), names)
        return None

    def _condition(self, x, names: dict[Any, Any]):
        from tvm import tirx

        if isinstance(x, (tirx.LT, tirx.LE, tirx.GT, tirx.GE)) and _kind(x.a) == "float32":
            operation: Any = type(x)
            return self._joined(operation, (x.a, x.b), names)
        return None

    def _joined(self, operation: Callable, operands: tuple[Any, ...], names: dict[Any, Any]):
        halves = [self._half(each, names) for each in operands]
        return None if any(each is None for each in halves) else operation(*halves)

    def _widened(self, x):
        """An expression with float32 of what is float16 now."""
        import tvm_ffi
        from tvm import tirx
        from tvm.ir.expr import TensorLoad

        def load(found):
            stand_in = self._stand_in(found.source)
            return found if stand_in is None else tirx.BufferLoad(stand_in, found.indices).astype("float32")

        return tvm_ffi.structural_map(x, (TensorLoad, load))

    def _rebuilt(self, block, store, init):
        from tvm import s_tir, tirx

        def region(found):
            stand_in = self._stand_in(found.source)
            return found if stand_in is None else tirx.BufferRegion(stand_in, found.region)

        reads, writes = ([region(each) for each in regions] for regions in (block.reads, block.writes))
        return s_tir.SBlock(
            block.iter_vars, reads, writes, block.name_hint, store, init, block.alloc_buffers, block.match_buffers,
            block.annotations,
        )  # fmt: skip

    def _stand_in(self, buffer):
        return next((new for old, new in self.fresh if old.same_as(buffer)), None)

    def _now(self, buffer):
        stand_in = self._stand_in(buffer)
        return buffer if stand_in is None else stand_in

    def _replace(self, buffer):
        from tvm import tirx

        made = tirx.decl_buffer(list(buffer.ty.shape), "float16", str(buffer.name))
        self.fresh.append((buffer, made))
        return made

    def _is_parameter(self, buffer) -> bool:
        return any(p.same_as(buffer) for p in self.func.params)

    def _narrowed_parameter(self, buffer):
        """The stand-in of a float32 parameter that is a constant whose numbers float16 holds."""
        index = next((i for i, p in enumerate(self.func.params) if p.same_as(buffer)), -1)
        arrays = self.constants.get(index, [])
        if not arrays or str(buffer.dtype) != "float32" or not all(_fits(each) for each in arrays):
            return None
        return self._replace(buffer)


def _kind(x) -> str:
    return str(x.ty.dtype)


def _fits(array: np.ndarray) -> bool:
    return array.size == 0 or bool(np.abs(array).max() <= _LARGEST)


def _convolution(workload, block) -> bool:
    """A convolution whose template adds in runs, or that has few terms."""
    from graphopt.targets.schedules import conv2d_blocked
    from graphopt.targets.schedules.conv2d_loops import Window

    if not set(conv2d_blocked.before(workload, "conv2d")) <= {"pad"}:
        return False
    window = Window.of(block)
    if window.out_lanes % LANES or not _reads_half(block, 2):
        return False
    weight = next(r.source for r in block.reads if len(r.source.ty.shape) == 6)
    if not any(p.same_as(weight) for p in workload.func.params):
        return False
    return window.in_lanes % LANES == 0 or window.taps <= TERMS


def _product(workload, block) -> bool:
    return next(iter(workload.blocks)) == "packed_matmul" and _reads_half(block, 2)


def _is_scheduled(func, machine) -> bool:
    """Whether a template takes a matrix product that adds in runs."""
    from graphopt.targets.schedules import matmul_blocked, matmul_row
    from graphopt.targets.schedules.workload import Workload

    made = Workload(func, machine)
    if made.anchor("packed_matmul") is None:
        return True
    return any(template.match(made) for template in (matmul_row, matmul_blocked))


def _depthwise(workload, block) -> bool:
    from graphopt.targets.schedules.workload import extents

    *_, k_h, k_w = extents(block)
    return _reads_half(block, 1) and k_h * k_w <= TERMS


def _reads_half(block, least: int) -> bool:
    return sum(str(r.source.dtype) == "float16" for r in block.reads) >= least


ANCHORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "conv2d": _convolution, "depthwise": _depthwise, "packed_matmul": _product,
}  # fmt: skip
"""Blocks that sum in float16, each with the condition."""
