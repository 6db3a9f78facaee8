"""From a lowered model to its tuning tasks: one for each distinct kernel, with what the database knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.targets import schedules
from graphopt.targets.schedules import generic
from graphopt.targets.schedules.workload import Workload, work
from graphopt.targets.tuning.cost_model import Cost
from graphopt.targets.tuning.database import Database, Key, Record
from graphopt.targets.tuning.measure import parameters
from graphopt.targets.tuning.signature import isa_class, workload_digest
from graphopt.targets.tuning.task import Task

if TYPE_CHECKING:
    from graphopt.targets.llvm import LlvmTarget, LoweredModel


def find_tasks(
    lowered: LoweredModel,
    target: LlvmTarget,
    database: Database | None,
    everything: bool = False,
    device: str = "",
) -> list[Task]:
    """The distinct kernels of a model that have a choice, those that do most arithmetic first.

    With `everything`, kernels without a choice too. `device`: fingerprint of a remote one.
    Two kernels are one task when they compute the same.
    """
    from graphopt.targets.relax import pipeline

    counts = pipeline.call_counts(lowered.module)
    constants = constant_arguments(lowered.module)
    isa = isa_class(target.capabilities.arch, target.features)
    found: dict[Key, Task] = {}
    for name, func in pipeline.prim_funcs(lowered.module).items():
        workload = Workload(func.with_attr("global_symbol", "main"), target.machine())
        held = constants.get(name, ())
        key = Key(workload_digest(workload, held, target.switched_off), isa, target.thread_count, device)
        if key in found:
            found[key].names.append(name)
            found[key].calls += counts.get(name, 1)
            continue
        choices = schedules.choices(workload)
        if len(choices) == 1 and choices[0].template == generic.NAME and not (everything and _is_static(func)):
            continue
        task = Task([name], workload, held, choices, key, counts.get(name, 1), _cost(workload, held))
        if database is not None:
            _consult(task, database)
        found[key] = task
    return sorted(found.values(), key=lambda t: -t.cost.macs * t.calls)


def _consult(task: Task, database: Database) -> None:
    record = database.find(task.key)
    if record is not None and _is_current(record):
        if record.complete and (position := task.position(record)) is not None:
            task.known, task.best = record, position
            return
        task.resume(record)
    if not task.hints:
        for neighbour in database.neighbours(task.key):
            if _is_current(neighbour):
                task.borrow(neighbour)


def _is_current(record: Record) -> bool:
    """False where the template is gone or has changed since."""
    return any((record.template, record.version) == (t.NAME, t.VERSION) for t in (*schedules.TEMPLATES, generic))


def constant_arguments(module: Any) -> dict[str, tuple[int, ...]]:
    """By kernel, the indices of the arguments that are constants in every call `main` makes."""
    import tvm

    from graphopt.targets.relax import pipeline

    found: dict[str, set[int]] = {}
    for name, arguments in pipeline.calls(module):
        held = {i for i, argument in enumerate(arguments) if isinstance(argument, tvm.ir.GenericConst)}
        found[name] = found[name] & held if name in found else held
    return {name: tuple(sorted(held)) for name, held in found.items()}


def constant_bytes(module: Any) -> int:
    """Bytes of the constants that kernels read in one run of the model."""
    import tvm

    from graphopt.targets.relax import pipeline

    seen: dict[Any, int] = {}
    for _, arguments in pipeline.calls(module):
        for argument in arguments:
            if isinstance(argument, tvm.ir.GenericConst) and argument not in seen:
                stored: Any = argument
                seen[argument] = int(stored.value.numpy().nbytes)
    return sum(seen.values())


def _cost(workload: Workload, constants: tuple[int, ...]) -> Cost:
    macs = max((work(block) for block in workload.blocks.values()), default=0)
    if not _is_static(workload.func):
        return Cost(macs, 0, 0, "dynamic")
    held = parameters(workload.func, constants)
    kind = next((p.dtype for p in held if p.constant and len(p.shape) > 2), "none")
    return Cost(
        macs, sum(p.nbytes for p in held if p.constant), sum(p.nbytes for p in held if not p.constant), kind
    )  # fmt: skip


def _is_static(func: Any) -> bool:
    from tvm import tirx

    return all(isinstance(d, tirx.IntImm) for p in func.params for d in getattr(p.ty, "shape", (None,)))
