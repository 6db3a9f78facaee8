"""Concatenation without a copy: its producers write straight into their part of the result.

Along the first axis that is longer than one, a concatenation puts its parts one behind the other in memory. So where
the parts are made by kernels, all of them and the result are given places in one storage, and the concatenating kernel
is dropped. Blocked images (N, C / block, H * W, block) of batch 1 are such a case: Inception, GoogLeNet, SqueezeNet.

This runs on the lowered function, where every tensor has an allocation of its own: after `CallTIRRewrite`, before
`StaticPlanBlockMemory`, which leaves what has a place alone. Concatenations are taken last first, so one whose result
is part of a later one finds its place there; one whose parts already lie side by side (a prefix of a growing feature
map) becomes a view of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes: kernels read and write whole cache lines from the start of a tensor."""
_CONCATENATION = re.compile(r"concatenate\d*$")
"""What TVM names a legalised `relax.op.concat` that was not fused with anything: it moves its operands and no more."""


@dataclass
class _Place:
    storage: int
    offset: int


@dataclass
class _Plan:
    sizes: list[int] = field(default_factory=list)
    """Bytes of each storage."""
    places: dict[Any, _Place] = field(default_factory=dict)
    """By variable."""
    dropped: set[int] = field(default_factory=set)
    """Positions of the concatenations that nobody needs any more."""


def place_parts(module):
    """The lowered module with the parts of each concatenation placed in its result, wherever that is possible."""
    import tvm

    main = module["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    plan = _plan(bindings, main.body.body)
    if not plan.dropped:
        return module
    functions = dict(module.functions_items())
    functions[module.get_global_var("main")] = _rewritten(main, bindings, plan)
    return tvm.IRModule(functions)


def _plan(bindings: list[Any], returned: Any) -> _Plan:
    tensors = {b.var: b.value for b in bindings if _called(b.value) == "relax.builtin.alloc_tensor"}
    roots = _roots(bindings)
    kept = {roots.get(v, v) for v in _returned(bindings, returned)}
    plan = _Plan()
    for position in range(len(bindings) - 1, -1, -1):
        call = bindings[position].value
        if not _CONCATENATION.match(_kernel(call)):
            continue
        *parts, whole = [roots.get(v, v) for v in call.args]
        if any(v not in tensors or v in kept for v in (*parts, whole)) or len(set(parts)) != len(parts):
            continue
        offsets = _offsets([_layout(tensors[v]) for v in parts], _layout(tensors[whole]))
        if offsets is not None and _settle(plan, parts, whole, offsets, _bytes(tensors[whole])):
            plan.dropped.add(position)
    return plan


def _roots(bindings: list[Any]) -> dict[Any, Any]:
    """By variable that is another name of one, that one."""
    from tvm import relax

    found: dict[Any, Any] = {}
    for binding in bindings:
        if isinstance(binding.value, relax.Var):
            found[binding.var] = found.get(binding.value, binding.value)
    return found


def _settle(plan: _Plan, parts: list[Any], whole: Any, offsets: list[int], size: int) -> bool:
    """Give the parts and the result their places; False where other concatenations stand in the way."""
    home = plan.places.get(whole)
    if any(part in plan.places for part in parts):
        first = plan.places.get(parts[0])
        lined_up = first is not None and all(
            plan.places.get(part) == _Place(first.storage, first.offset + offset)
            for part, offset in zip(parts, offsets, strict=True)
        )
        if not lined_up or home is not None or first is None:
            return False
        plan.places[whole] = first
        return True
    if home is None:
        home = plan.places[whole] = _Place(len(plan.sizes), 0)
        plan.sizes.append(size)
    for part, offset in zip(parts, offsets, strict=True):
        plan.places[part] = _Place(home.storage, home.offset + offset)
    return True


def _offsets(parts: list[tuple[tuple[int, ...], str]], whole: tuple[tuple[int, ...], str]) -> list[int] | None:
    """Where each part starts in the result, in bytes; None where a part is not one aligned piece of it."""
    shape, dtype = whole
    if any(kind != dtype or len(dims) != len(shape) for dims, kind in parts):
        return None
    axis = next((a for a in range(len(shape)) if any(dims[a] != shape[a] for dims, _ in parts)), 0)
    if math.prod(shape[:axis]) != 1 or any(dims[:axis] + dims[axis + 1 :] != shape[:axis] + shape[axis + 1 :]
                                           for dims, _ in parts):  # fmt: skip
        return None
    starts, end = [], 0
    for dims, _ in parts:
        starts.append(end)
        end += math.prod(dims) * _item_bytes(dtype)
    return starts if all(start % ALIGNMENT == 0 for start in starts) else None


def _rewritten(main: Any, bindings: list[Any], plan: _Plan) -> Any:
    from tvm import relax

    storages: dict[int, Any] = {}
    found: list[Any] = []
    for position, binding in enumerate(bindings):
        if position in plan.dropped:
            continue
        place = plan.places.get(binding.var)
        if place is None:
            found.append(binding)
            continue
        if place.storage not in storages:
            storage = relax.Var(f"concat_storage_{place.storage}", relax.ObjectType())
            extents: Any = [plan.sizes[place.storage]]
            size = relax.ShapeExpr(extents)
            call = relax.op.memory.alloc_storage(size, 0, "global", "uint8")
            storages[place.storage] = storage
            found.append(relax.VarBinding(storage, call))
        shape, dtype = binding.value.args[0], binding.value.args[1].value
        placed = relax.op.memory.alloc_tensor(storages[place.storage], place.offset, shape, dtype)
        if place.offset:  # kernels want the address of their tensor, not a base and an offset
            moved = relax.Var(f"concat_part_{len(found)}", binding.var.ty)
            found.append(relax.VarBinding(moved, placed))
            placed = relax.op.memory.ensure_zero_offset(moved)
        found.append(relax.VarBinding(binding.var, placed))
    body = relax.SeqExpr([relax.BindingBlock(found)], main.body.body)
    return relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)


def _returned(bindings: list[Any], returned: Any) -> set[Any]:
    """Variables whose memory the caller gets: results, and what they are reshapes or fields of."""
    from tvm import relax

    values = {b.var: b.value for b in bindings}
    found: set[Any] = set()
    waiting = [returned]
    while waiting:
        item = waiting.pop()
        if isinstance(item, relax.Tuple):
            waiting += list(item.fields)
        elif isinstance(item, relax.Var) and item not in found:
            found.add(item)
            value = values.get(item)
            if isinstance(value, (relax.Var, relax.Tuple)):
                waiting.append(value)
            elif isinstance(value, relax.Call) and not _kernel(value):
                waiting += [a for a in value.args if isinstance(a, (relax.Var, relax.Tuple))]
    return found


def _called(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


def _kernel(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name_hint", ""))


def _layout(allocation: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(d) for d in allocation.args[0].values), str(allocation.args[1].value)


def _bytes(allocation: Any) -> int:
    shape, dtype = _layout(allocation)
    return math.prod(shape) * _item_bytes(dtype)


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
