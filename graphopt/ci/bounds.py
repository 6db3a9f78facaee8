"""Bounds of figures that are not times, as people write them: `5%`, `+3`, `2MB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from graphopt.errors import SpecError

_TEXT = re.compile(r"^(?P<sign>\+?)(?P<number>\d+(\.\d+)?)\s*(?P<unit>%|[kMG]?B?)$")
_SCALE = {"": 1.0, "B": 1.0, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9}


@dataclass(frozen=True)
class Bound:
    """At most one of three: `growth` as a fraction of the base's figure, `more` than it, or `most` at all."""

    text: str
    growth: float | None = None
    more: float | None = None
    most: float | None = None

    @classmethod
    def parse(cls, text: str, what: str) -> Bound:
        """`5%` of growth, `+3` more, or `2MB` at most; k, M, G are decimal. Raises SpecError, naming `what`."""
        found = _TEXT.match(text.strip())
        if found is None or (found["sign"] and found["unit"] == "%"):
            raise SpecError(
                f"{what} {text!r} is no bound",
                hint="write 5% (growth over the base), +3 (more than it), or 2MB (at most)",
            )
        number = float(found["number"])
        if found["unit"] == "%":
            return cls(text.strip(), growth=number / 100)
        number *= _SCALE[found["unit"]]
        return cls(text.strip(), more=number) if found["sign"] else cls(text.strip(), most=number)

    def limit(self, base: float | None) -> float | None:
        """The largest figure allowed; None where that depends on a base that is not known."""
        if self.most is not None:
            return self.most
        if base is None:
            return None
        if self.more is not None:
            return base + self.more
        assert self.growth is not None
        # 100 * 1.15 is 114.99999999999999: a figure of 115 has grown by 15 %, not by more.
        return math.nextafter(base * (1 + self.growth), math.inf)
