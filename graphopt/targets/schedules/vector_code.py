"""Loop nests of vector instructions, written statement by statement.

For kernels whose loops the schedule language cannot reach: `Code` collects TIR statements, `Vector` stands for a value
in a register and writes down what is done to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Code:
    """TIR statements in the order of execution; loops and branches are context managers. `number`: the type of
    vectors' elements."""

    def __init__(self, number: str = "float32") -> None:
        self.number = number
        self._open: list[list[Any]] = [[]]

    def add(self, statement: Any) -> None:
        self._open[-1].append(statement)

    def body(self) -> Any:
        """What was written, as one statement."""
        from tvm import tirx

        assert len(self._open) == 1
        return tirx.stmt_seq(*self._open[0])

    @contextmanager
    def loop(self, name: str, extent: Any, *, kind: str = "SERIAL") -> Iterator[Any]:
        """A loop from zero over what is written inside; `kind` names a TIR ForKind. Gives the variable."""
        from tvm import tirx

        variable = tirx.Var(name, "int64")
        self._open.append([])
        yield variable
        inside = tirx.stmt_seq(*self._open.pop())
        self.add(tirx.For(variable, whole(0), whole(extent), tirx.ForKind[kind], inside))

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """What is written inside happens where the condition holds."""
        from tvm import tirx

        self._open.append([])
        yield
        inside = tirx.stmt_seq(*self._open.pop())
        self.add(inside if condition is True else tirx.IfThenElse(condition, inside, None))

    def allocate(self, name: str, elements: int, *, registers: bool = False) -> Any:
        """A flat buffer of numbers for what follows: memory, or a few vectors that the compiler keeps in registers."""
        from tvm import tirx

        buffer = tirx.decl_buffer((elements,), self.number, name, scope="local" if registers else "global")
        self.add(tirx.AllocBuffer(buffer))
        return buffer

    def index(self, name: str, value: Any) -> Any:
        """An integer computed once."""
        from tvm import tirx

        variable = tirx.Var(name, "int64")
        self.add(tirx.Bind(variable, whole(value)))
        return variable

    def vector(self, expression: Any, lanes: int) -> Vector:
        """A register that holds the value of an expression."""
        from tvm import tirx

        variable = tirx.Var("v", f"{self.number}x{lanes}")
        self.add(tirx.Bind(variable, expression))
        return Vector(self, variable, lanes)

    def load(self, buffer: Any, indices: list[Any], lanes: int) -> Vector:
        """Neighbouring elements along the last axis."""
        return self.vector(read(buffer, indices, lanes), lanes)

    def spread(self, buffer: Any, indices: list[Any], lanes: int) -> Vector:
        """One element in all lanes."""
        from tvm import tirx

        return self.vector(_broadcast(tirx.BufferLoad(buffer, _wholes(indices)), lanes), lanes)

    def zero(self, lanes: int) -> Vector:
        return Vector(self, self.constant(0.0, lanes), lanes)

    def constant(self, value: float, lanes: int) -> Any:
        """An expression: a number in all lanes."""
        from tvm import tirx

        return _broadcast(tirx.const(value, self.number), lanes)

    def store(self, buffer: Any, indices: list[Any], value: Vector) -> None:
        """Write a vector to neighbouring elements along the last axis."""
        from tvm import tirx

        self.add(tirx.BufferStore(buffer, value.expression, _run(indices, value.lanes)))

    def prefetch(self, buffer: Any, index: Any) -> None:
        """Ask for the line of an element to come to the second-level cache; beyond the buffer's end it does nothing."""
        from tvm import tirx
        from tvm.ir import Op

        address = tirx.address_of(tirx.BufferLoad(buffer, _wholes([index])))
        read_only, second_level, data = (tirx.IntImm("int32", n) for n in (0, 2, 1))
        call = tirx.call_intrin("void", Op.get("tirx.prefetch"), address, read_only, second_level, data)
        self.add(tirx.Evaluate(call))


class Vector:
    """A vector register. Sums with a product by a number become one fused multiply-add."""

    def __init__(self, code: Code, expression: Any, lanes: int):
        self.code = code
        self.expression = expression
        self.lanes = lanes

    def __add__(self, other: Vector | Scaled) -> Vector:
        if isinstance(other, Scaled):
            return self._plus(other.vector, other.factor)
        return self.code.vector(self.expression + other.expression, self.lanes)

    def __sub__(self, other: Vector | Scaled) -> Vector:
        if isinstance(other, Scaled):
            return self._plus(other.vector, -other.factor)
        return self.code.vector(self.expression - other.expression, self.lanes)

    def __mul__(self, factor: float) -> Scaled:
        return Scaled(self, factor)

    def _plus(self, vector: Vector, factor: float) -> Vector:
        from tvm import tirx

        code = self.code
        operands = vector.expression, code.constant(factor, self.lanes), self.expression
        kind = f"{code.number}x{self.lanes}"
        return code.vector(tirx.call_llvm_pure_intrin(kind, "llvm.fma", *operands), self.lanes)


class Scaled:
    """A vector times a number, until it is known whether a sum takes it up."""

    def __init__(self, vector: Vector, factor: float):
        self.vector = vector
        self.factor = factor

    def __add__(self, other: Vector | Scaled) -> Vector:
        return self.value() + other

    def __sub__(self, other: Vector | Scaled) -> Vector:
        return self.value() - other

    def __mul__(self, factor: float) -> Scaled:
        return Scaled(self.value(), factor)

    def value(self) -> Vector:
        code, lanes = self.vector.code, self.vector.lanes
        return code.vector(self.vector.expression * code.constant(self.factor, lanes), lanes)


def read(buffer: Any, indices: list[Any], lanes: int) -> Any:
    """The expression of neighbouring elements along the last axis."""
    from tvm import tirx

    return tirx.BufferLoad(buffer, _run(indices, lanes))


def conjunction(conditions: list[Any]) -> Any:
    """All of the conditions; True where there is none."""
    from tvm import tirx

    if not conditions:
        return True
    return conditions[0] if len(conditions) == 1 else tirx.all(*conditions)


def negation(conditions: list[Any]) -> Any:
    """Not all of the conditions."""
    from tvm import tirx

    return tirx.Not(conjunction(conditions))


def whole(value: Any) -> Any:
    """An int64 expression of a number or expression."""
    from tvm import tirx

    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _wholes(values: list[Any]) -> list[Any]:
    return [whole(v) for v in values]


def _run(indices: list[Any], lanes: Any) -> list[Any]:
    """Indices of `lanes` neighbours along the last axis."""
    from tvm import tirx

    *front, last = _wholes(indices)
    return [*front, tirx.Ramp(last, whole(1), lanes)]


def _broadcast(scalar: Any, lanes: Any) -> Any:
    from tvm import tirx

    return tirx.Broadcast(scalar, lanes)
