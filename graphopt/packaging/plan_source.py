"""The tables of `plan.h`, in C, for one model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphopt.targets.relax.ahead_of_time import Plan, dtype_code


def plan_source(plan: Plan, description: Mapping[str, Any]) -> str:
    """C source; `description` is the library's engine.json: names, types and shapes of inputs and outputs, features.

    Raises TargetError for an element type that a static executable does not know.
    """
    numbers = {tensor: number for number, tensor in enumerate(plan.tensors)}
    tensors = list(plan.tensors)
    for each in plan.inputs:  # no kernel need read an input
        if each not in numbers:
            numbers[each] = len(tensors)
            tensors.append(each)
    lengths, strides, rows = [], [], []
    for each in tensors:
        code, bits = dtype_code(each.dtype)
        offset = each.offset + (0 if each.storage is None else plan.places[each.storage])
        rows.append(f"{{{int(each.storage is None)}, {code}, {bits}, {len(each.shape)}, {len(lengths)}, {offset}u}}")
        lengths += each.shape
        strides += [math.prod(each.shape[axis + 1 :]) for axis in range(len(each.shape))]
    arguments, calls = [], []
    for kernel, operands in plan.calls:
        calls.append(f'{{__tvm_ffi_{kernel}, "{kernel}", {len(arguments)}, {len(operands)}}}')
        arguments += operands
    kernels = sorted({name for name, _ in plan.calls})
    lines = [
        '#include "plan.h"',
        "",
        *(f"int __tvm_ffi_{name}(void*, const plan_argument*, int32_t, plan_argument*);" for name in kernels),
        "",
        f"const char plan_arch[] = {_text(description['arch'])};",
        f"const char plan_mcpu[] = {_text(description['mcpu'])};",
        _table("const char* const plan_features", [*map(_text, description["features"]), "NULL"]),
        f"const int plan_tiles = {int(description.get('tiles', False))};",
        f"const uint64_t plan_arena_bytes = {plan.arena_bytes}u;",
        f"const int plan_tensor_count = {len(tensors)}, plan_call_count = {len(calls)};",
        f"const int plan_most_arguments = {max([len(operands) for _, operands in plan.calls], default=1)};",
        _table("const int64_t plan_lengths", lengths),
        _table("const int64_t plan_strides", strides),
        _table("const plan_tensor plan_tensors", rows, "{0, 0, 0, 0, 0, 0}"),
        _table("const int32_t plan_arguments", arguments),
        _table("const plan_call plan_calls", calls, "{0, 0, 0, 0}"),
        _table("const int32_t plan_inputs", [numbers[each] for each in plan.inputs]),
        _table("const int32_t plan_outputs", plan.outputs),
        *_signature("input", description["inputs"]),
        *_signature("output", description["outputs"]),
    ]
    return "\n".join(lines) + "\n"


def _signature(what: str, tensors: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    rows = []
    for number, each in enumerate(tensors):
        yield _table(f"static const int64_t {what}_shape_{number}", each["shape"])
        nbytes = math.prod(each["shape"]) * dtype_code(each["dtype"])[1] // 8
        rows.append(
            f"{{{_text(each['name'])}, {_text(each['dtype'])}, {len(each['shape'])}, {what}_shape_{number}, {nbytes}u}}"
        )
    yield f"const int graphopt_{what}_count = {len(rows)};"
    yield _table(f"const graphopt_tensor graphopt_{what}s", rows, "{0, 0, 0, 0, 0}")


def _table(name: str, items: Iterable[Any], nothing: str = "0") -> str:
    """An array; C has none without elements."""
    return f"{name}[] = {{{', '.join(map(str, items)) or nothing}}};"


def _text(text: str) -> str:
    """A string literal. JSON's is C's but for what is not ASCII, which goes in as bytes."""
    return "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode()).join('""')
