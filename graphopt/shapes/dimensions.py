"""Arithmetic on dimensions that are not known: polynomials with integer coefficients in named sizes.

    H + 2 - 3 + 1 = H     (2*H*W) / 2 = H*W     H/2 = the atom "trunc((H)/(2))"     H, at most 64 = "min(64,H)"

Two dimensions are equal when their polynomials are: that is enough to see that a 3x3 convolution with padding 1
keeps its height, or that two Shape nodes hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union


class Dim:
    """A polynomial that is no plain integer. Immutable; equal polynomials hash alike."""

    __slots__ = ("_key", "terms")

    def __init__(self, terms: Mapping[tuple[str, ...], int]):
        self.terms = dict(terms)
        self._key = tuple(sorted(self.terms.items()))

    @staticmethod
    def named(name: str) -> Dim:
        return Dim({(name,): 1})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        parts = []
        for monomial, factor in self._key:
            name = "*".join(monomial)
            parts.append(str(factor) if not monomial else name if factor == 1 else f"{factor}*{name}")
        return "+".join(parts)

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for monomial, factor in _terms(other).items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return _normal(terms)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __rsub__(self, other: Size) -> Size:
        return self * -1 + other

    def __mul__(self, other: Size) -> Size:
        terms: dict[tuple[str, ...], int] = {}
        for left, a in self.terms.items():
            for right, b in _terms(other).items():
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return _normal(terms)

    __rmul__ = __mul__


Size = Union[int, Dim]  # noqa: UP007 - evaluated at import, where Python 3.10 refuses `int | "Dim"` in quotes


def floor_divide(size: Size, by: int) -> Size:
    """`size` divided by a positive integer, rounded down."""
    if isinstance(size, int):
        return size // by
    exact = _divide_exactly(size, by)
    return exact if exact is not None else Dim.named(f"floor(({size!r})/{by})")


def truncate_divide(size: Size, by: Size) -> Size | None:
    """ONNX's integer Div, which rounds towards zero; None for a division by zero."""
    if by == 0:
        return None
    if isinstance(size, int) and isinstance(by, int):
        quotient = abs(size) // abs(by)
        return quotient if (size >= 0) == (by >= 0) else -quotient
    if size == by:
        return None  # 1 unless both are zero
    if isinstance(by, int) and isinstance(size, Dim):
        exact = _divide_exactly(size, by)
        if exact is not None:
            return exact
    return Dim.named(f"trunc(({size!r})/({by!r}))")


def at_most(limit: int, size: Dim) -> Dim:
    """The smaller of a positive number and a size."""
    return Dim.named(f"min({limit},{size!r})")


def is_capped(size: Size, of: Size) -> bool:
    """Whether `size` is what `at_most` made of `of`, with whatever limit."""
    if not isinstance(size, Dim) or not isinstance(of, Dim) or list(size.terms.values()) != [1]:
        return False
    (monomial,) = size.terms
    return len(monomial) == 1 and monomial[0].startswith("min(") and monomial[0].partition(",")[2] == f"{of!r})"


def are_equal(left: Size, right: Size) -> bool | None:
    """Whether two sizes are the same number; None where it depends."""
    apart = left - right
    if isinstance(apart, int):
        return apart == 0
    either = (apart, -apart)
    return False if any(isinstance(s, Dim) and s.terms.get((), 0) > 0 and is_natural(s) for s in either) else None


def is_natural(size: Dim) -> bool:
    """Whether no term can be negative: sizes are not, and neither are quotients of sums without a minus."""
    atoms = {atom for monomial in size.terms for atom in monomial}
    return min(size.terms.values()) >= 0 and not any("(" in atom and "-" in atom for atom in atoms)


def _divide_exactly(size: Dim, by: int) -> Size | None:
    if any(factor % by for factor in size.terms.values()):
        return None
    return _normal({monomial: factor // by for monomial, factor in size.terms.items()})


def _terms(size: Size) -> Mapping[tuple[str, ...], int]:
    return {(): int(size)} if not isinstance(size, Dim) else size.terms


def _normal(terms: Mapping[tuple[str, ...], int]) -> Size:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    return Dim(kept)
