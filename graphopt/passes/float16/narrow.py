"""Numbers in 16 bits, and what they lose."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
FEW = 64
"""Smaller constants gain nothing in 16 bits (a Cast takes more room), and hold epsilons, bounds and masks."""


@dataclass(frozen=True)
class Narrowed:
    """`array`: float16. Of its values `saturated` were larger than it can hold, `vanished` became zero, and `blurred`
    are subnormal and lost some of the 11 bits that others have."""

    array: np.ndarray
    saturated: int
    vanished: int
    blurred: int

    @property
    def keeps_its_range(self) -> bool:
        return not self.saturated and not self.vanished


def narrow(array: np.ndarray) -> Narrowed:
    """Round to nearest even, as numpy does, but finite values stay finite: beyond 65504 they saturate.

    `array`: float32 or float64. Subnormal results are kept, not flushed to zero; infinities and NaN stay what they are.
    """
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    beyond = np.isinf(half) & np.isfinite(array)
    half = np.where(beyond, np.copysign(np.float16(LARGEST), half), half).astype(np.float16)
    magnitude = np.abs(half)
    vanished = int(((half == 0) & (array != 0)).sum())
    blurred = int(((magnitude > 0) & (magnitude < SMALLEST_NORMAL) & (half.astype(array.dtype) != array)).sum())
    return Narrowed(half, int(beyond.sum()), vanished, blurred)


@dataclass
class Losses:
    """What a whole model's constants lost, in words."""

    values: int = 0
    vanished: int = 0
    blurred: int = 0
    saturated: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, narrowed: Narrowed) -> None:
        self.values += narrowed.array.size
        self.vanished += narrowed.vanished
        self.blurred += narrowed.blurred
        if narrowed.saturated:
            self.saturated[name] = narrowed.saturated

    def notes(self) -> tuple[str, ...]:
        """One sentence a loss."""
        found = [f"{count} values of {name!r} are beyond 65504 and saturate" for name, count in self.saturated.items()]
        if self.vanished or self.blurred:
            found.append(
                f"of {self.values} constant values {self.vanished} are too small and become 0, "
                f"{self.blurred} are below 6.1e-5 and keep less than 11 bits"
            )
        return tuple(found)
