"""Statements that templates put together when they write a loop nest themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.targets.schedules.register_tiles import Run


def sequence(statements) -> Any:
    from tvm import tirx

    found = list(statements)
    return found[0] if len(found) == 1 else tirx.SeqStmt(found)


def ramp(first: Any, count: Any) -> Any:
    """The indices of `count` neighbours."""
    from tvm import tirx

    start = tirx.const(first, "int32") if isinstance(first, int) else first
    return tirx.Ramp(start, tirx.const(1, "int32"), count)


def loop(name: str, extent: int, body: Callable[[Any], Any]) -> Any:
    """A loop; none for a single turn."""
    from tvm import tirx

    return body(0) if extent == 1 else loop_from(name, tirx.const(0, "int32"), tirx.const(extent, "int32"), body)


def loop_from(name: str, first: Any, extent: Any, body: Callable[[Any], Any]) -> Any:
    from tvm import tirx

    var: Any = tirx.Var(name, "int32")
    return tirx.For(var, first, extent, tirx.ForKind.SERIAL, body(var))


def nest(axes: dict[str, int], body: Callable[..., Any], parallel: bool) -> Any:
    """Loops over all axes, one in the other; or one parallel loop over all of them together."""
    from tvm import tirx

    if not parallel:
        names, sizes = list(axes), list(axes.values())

        def level(k, *variables):
            if k == len(names):
                return body(*variables)
            return loop(names[k], sizes[k], lambda i: level(k + 1, *variables, i))

        return level(0)
    total = 1
    for size in axes.values():
        total *= size
    turn: Any = tirx.Var("turn", "int32")
    variables, rest = [], turn
    for size in reversed(axes.values()):
        variables.insert(0, rest % size if size > 1 else 0)
        rest = rest // size
    zero, turns = tirx.const(0, "int32"), tirx.const(total, "int32")
    return tirx.For(turn, zero, turns, tirx.ForKind.PARALLEL, body(*variables))


def choose(number, runs: Sequence[Run], body: Callable[[Run, Any], Any]) -> Any:
    """The body of the run that tile `number` belongs to, given the tile's place in it."""
    from tvm import tirx

    def level(k: int, before: int) -> Any:
        run = runs[k]
        here = body(run, number - before)
        if k == len(runs) - 1:
            return here
        return tirx.IfThenElse(number < before + run.count, here, level(k + 1, before + run.count))

    return level(0, 0)


def rooted(body) -> Any:
    """A block around all: TVM looks for one in functions of a single operand, which might only reshape it."""
    from tvm import s_tir, tirx

    return s_tir.SBlockRealize([], tirx.const(True, "bool"), s_tir.SBlock([], [], [], "root", body))
