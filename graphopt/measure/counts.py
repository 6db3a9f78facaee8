"""Instructions instead of seconds: what an emulator can say of candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import MeasurementError
from graphopt.measure.stats import Ratio

KIND = "graphopt.instructions"
SCHEMA = 1


@dataclass(frozen=True)
class Counts:
    """Instructions of one inference by contender. One number each: counting is exact, there is no noise.

    Has what the gate asks of a `PairedResult`, so that candidates are ranked alike.
    """

    totals: Mapping[str, int]
    by_kernel: Mapping[str, Mapping[str, int]]
    """By contender and kernel; what runs outside of kernels is missing here."""
    cpu: str
    """The emulator's name of the processor."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Contenders that are not among `totals`, and why."""

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Instructions of one over those of the other. Raises MeasurementError where one was not counted."""
        for name in (numerator, denominator):
            if name not in self.totals:
                raise MeasurementError(f"no figures for {name!r}: {self.failed.get(name, 'it was not counted')}")
        exact = self.totals[numerator] / self.totals[denominator]
        return Ratio(exact, exact, exact, 1)

    def session_ratios(self, numerator: str, denominator: str) -> tuple[Ratio, ...]:
        return (self.ratio(numerator, denominator),)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "unit": "instructions, emulated",
            "cpu": self.cpu,
            "contenders": {
                name: {"instructions": total, "by_kernel": dict(self.by_kernel.get(name, {}))}
                for name, total in self.totals.items()
            },
            "failed": dict(self.failed),
        }
