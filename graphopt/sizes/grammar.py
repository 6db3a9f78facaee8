"""What `--sizes` says: `sequence=4..256`, `batch=1,4 height=320 width=320`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from graphopt.errors import SpecError

Range = tuple[int, int]
"""The smallest and the largest size that one function is for."""
_HINT = "write sequence=64,128 or sequence=4..256, or 4..256/16 for every 16th; several dimensions with spaces between"
_ITEM = re.compile(r"(?P<low>\d+)(\.\.(?P<high>\d+)(/(?P<step>\d+))?)?$")
_MOST = 32
"""Functions in one library."""


def parse(texts: Sequence[str]) -> tuple[dict[str, Range], ...]:
    """The sizes of each function, by dimension; of a text with several dimensions, all combinations.

    Raises SpecError: unreadable, a size of 0, or too many.
    """
    found: list[dict[str, Range]] = []
    for text in texts:
        named: dict[str, list[Range]] = {}
        for part in text.split():
            name, equals, sizes = part.rpartition("=")
            if not equals or not name or name in named:
                raise SpecError(f"cannot read --sizes {text!r}", hint=_HINT)
            named[name] = [each for item in sizes.split(",") for each in _ranges(item, text)]
        if not named:
            raise SpecError("--sizes is empty", hint=_HINT)
        found += [dict(zip(named, each, strict=True)) for each in itertools.product(*named.values())]
    found = [each for i, each in enumerate(found) if each not in found[:i]]
    if len(found) > _MOST:
        raise SpecError(f"--sizes asks for {len(found)} functions", hint=f"{_MOST} at most; give a range a larger step")
    return tuple(found)


def _ranges(item: str, text: str) -> list[Range]:
    match = _ITEM.match(item)
    if match is None:
        raise SpecError(f"cannot read {item!r} in --sizes {text!r}", hint=_HINT)
    low, high, step = int(match["low"]), int(match["high"] or match["low"]), int(match["step"] or 0)
    if low < 1 or high < low or (match["step"] and step < 1):
        raise SpecError(f"{item!r} in --sizes {text!r} is no size", hint="sizes are positive, and a range goes up")
    ends = [size for size in (range(step, high, step) if step else _steps(high)) if low <= size < high] + [high]
    return [(start, end) for start, end in zip([low, *(end + 1 for end in ends)], ends, strict=False)]


def _steps(high: int) -> list[int]:
    """1, 2, 4, 6, 8, 12, 16, 24, ...: at most half of a padded size is padding, seldom over a quarter."""
    powers = [1 << bits for bits in range(high.bit_length())]
    return sorted({*powers, *(3 * power // 2 for power in powers if power > 2)})
