"""A model without the virtual machine: which kernel runs on which memory, decided when it is built.

With static shapes a lowered `main` is a straight line: storages are allocated, tensors are put into them, kernels are
called. Here the storages get places in one arena, by first fit over their lives (largest first), and what is left is a
list of calls: object files of kernels, one of constants, and tables in C. `packaging/files/static_model.c` runs them.

Source of the placement: Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020, section 5
(greedy by size for offset calculation).
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import TargetError
from graphopt.targets.relax import blob_object, executable

CONSTANTS = "graphopt_constants"
"""The symbol of the constants' object file."""
ALIGNMENT = 64
_CHECKS = ("relax.null_value", "relax.vm.kill_object", "vm.builtin.check_tensor_info", "vm.builtin.match_shape")
"""What a virtual machine does for arguments of any shape, or to free memory: nothing to do here."""
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}
"""DLPack's numbers."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `storage` is None for a constant. `dtype` is TVM's, `float32`."""

    storage: int | None
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ((dtype_code(self.dtype)[1] + 7) // 8)


@dataclass
class Plan:
    """A run of the model: `calls` names a kernel and its tensors, outputs last; the first storages are the inputs'."""

    inputs: list[Tensor]
    tensors: list[Tensor] = field(default_factory=list)
    calls: list[tuple[str, list[int]]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes of each storage."""
    constants: bytearray = field(default_factory=bytearray)
    places: list[int] = field(default_factory=list)
    """Offset of each storage in the arena."""
    arena_bytes: int = 0


def export(module, target, folder: Path, *, arch: str, jobs: int, in_place: bool = True) -> Plan:
    """Compile a scheduled module into object files in `folder`; the plan says how they are called.

    Raises what TVM raises where a kernel cannot be compiled, TargetError where the model needs the virtual machine.
    """
    with executable.compiling_for(target):
        lowered = executable.lowered(module, target, in_place)
    plan = make_plan(lowered)
    executable.compile_kernels(_called(lowered, plan), target, folder, jobs)
    blob_object.write(bytes(plan.constants) or b"\0", arch, folder / "constants.o", CONSTANTS)
    return plan


def make_plan(lowered) -> Plan:
    """The plan of a lowered module. Raises TargetError where `main` is more than a straight line of kernels."""
    main = lowered["main"]
    reader = _Reader(main)
    for block in main.body.blocks:
        for binding in block.bindings:
            reader.read(binding.var, binding.value)
    plan = reader.plan
    returned = reader.values[main.body.body]
    plan.outputs = [reader.number(each) for each in (returned if isinstance(returned, tuple) else (returned,))]
    _place(plan)
    return plan


def _called(lowered, plan: Plan):
    """The module with the kernels that the plan calls, and nothing else."""
    import tvm

    names = {name for name, _ in plan.calls}
    return tvm.IRModule({g: func for g, func in lowered.functions_items() if g.name_hint in names})


class _Reader:
    """Reads bindings in order; `values` is what each variable stands for."""

    def __init__(self, main: Any):
        self.plan = Plan([])
        self.values: dict[Any, Any] = {}
        self._numbers: dict[Tensor, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}
        for parameter in main.params:
            shape = tuple(int(d) for d in parameter.ty.shape.values)
            tensor = Tensor(len(self.plan.sizes), 0, str(parameter.ty.dtype), shape)
            self.plan.sizes.append(tensor.nbytes)
            self.plan.inputs.append(tensor)
            self.values[parameter] = tensor

    def read(self, variable: Any, value: Any) -> None:
        import tvm
        from tvm import relax

        if not isinstance(value, relax.Call):
            self.values[variable] = self._operand(value)
        elif isinstance(value.op, tvm.ir.GlobalVar):
            numbers = [self.number(self._operand(each)) for each in value.args]
            self.plan.calls.append((str(value.op.name_hint), numbers))
        else:
            self._builtin(variable, str(getattr(value.op, "name", getattr(value.op, "global_symbol", "?"))), value.args)

    def _builtin(self, variable: Any, name: str, arguments: Any) -> None:
        if name in _CHECKS:
            return
        if name == "relax.vm.alloc_storage":
            self.values[variable] = len(self.plan.sizes)
            self.plan.sizes.append(math.prod(_shape(arguments[0])))
        elif name == "relax.vm.alloc_tensor":
            storage, offset, shape, dtype = self.values[arguments[0]], arguments[1], arguments[2], arguments[3]
            self.values[variable] = Tensor(storage, int(offset.value), str(dtype.value), _shape(shape))
        elif name == "vm.builtin.reshape":
            of = self._operand(arguments[0])
            self.values[variable] = Tensor(of.storage, of.offset, of.dtype, _shape(arguments[1]))
        else:
            raise TargetError(
                f"a static executable has no {name}, which this model calls", hint="give --runtime cpp or python"
            )

    def _operand(self, value: Any) -> Any:
        from tvm import relax

        if isinstance(value, relax.Tuple):
            return tuple(self._operand(each) for each in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._operand(value.tuple_value)[value.index]
        data = getattr(value, "value", getattr(value, "data", None))
        if hasattr(data, "numpy"):
            return self._constant(data)
        if value not in self.values:
            raise TargetError(
                f"a static executable takes tensors only, and this model passes a {type(value).__name__}",
                hint="give --runtime cpp or python",
            )
        return self.values[value]

    def _constant(self, data: Any) -> Tensor:
        import numpy as np

        dtype, shape = str(data.dtype), tuple(int(d) for d in data.shape)
        content = np.ascontiguousarray(data.numpy()).tobytes()
        key = dtype, shape, hashlib.sha256(content).digest()  # equal constants lie in one place
        if key not in self._constants:
            blob = self.plan.constants
            blob.extend(bytes(-len(blob) % ALIGNMENT))
            self._constants[key] = Tensor(None, len(blob), dtype, shape)
            blob.extend(content)
        return self._constants[key]

    def number(self, tensor: Tensor) -> int:
        """Its position among the plan's tensors."""
        if tensor not in self._numbers:
            self._numbers[tensor] = len(self.plan.tensors)
            self.plan.tensors.append(tensor)
        return self._numbers[tensor]


def _shape(shape: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in shape.values)


def _place(plan: Plan) -> None:
    """Give each storage an offset, so that those alive at once do not overlap. Inputs live always: a caller fills them
    once for many runs; so do outputs, until the next run."""
    last = len(plan.calls)
    lives: dict[int, tuple[int, int]] = dict.fromkeys(range(len(plan.inputs)), (0, last))
    for time, (_, numbers) in enumerate(plan.calls):
        for storage in (plan.tensors[number].storage for number in numbers):
            if storage is not None:
                begin, end = lives.get(storage, (time, time))
                lives[storage] = (begin, max(end, time))
    for number in plan.outputs:
        storage = plan.tensors[number].storage
        if storage is not None:
            lives[storage] = (lives.get(storage, (last, last))[0], last)
    plan.places = [0] * len(plan.sizes)
    placed: list[int] = []
    for storage in sorted(lives, key=lambda each: (-plan.sizes[each], each)):
        begin, end = lives[storage]
        near = sorted(
            (plan.places[other], plan.places[other] + _whole(plan.sizes[other]))
            for other in placed
            if lives[other][0] <= end and begin <= lives[other][1]
        )
        at = 0
        for low, high in near:
            if at + _whole(plan.sizes[storage]) <= low:
                break
            at = max(at, high)
        plan.places[storage] = at
        placed.append(storage)
        plan.arena_bytes = max(plan.arena_bytes, at + _whole(plan.sizes[storage]))


def _whole(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def dtype_code(dtype: str) -> tuple[int, int]:
    """DLPack's number and the bits of a type. Raises TargetError for a type that a static executable does not know."""
    if dtype == "bool":
        return _CODES["bool"], 8
    found = re.fullmatch(r"(int|uint|float|bfloat)(\d+)", dtype)
    if found is None:
        raise TargetError(f"a static executable has no tensors of {dtype}", hint="give --runtime cpp or python")
    return _CODES[found[1]], int(found[2])
