"""What a kernel costs at least: arithmetic against memory. It says where another trial may pay.

The roofline of Williams, Waterman, Patterson (CACM 52(4), 2009): a kernel takes at least its arithmetic at the peak,
and at least its traffic at the bandwidth of where its operands are. The peak is what the best kernel seen so far
reached, so that the bound needs no calibration and holds for every processor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FAR_GBYTES_PER_S = 30.0
"""What a core streams from the third-level cache; constants come from there or from further away."""
NEAR_GBYTES_PER_S = 100.0
"""What it reads and writes of activations that the kernel before left in the second-level cache."""


@dataclass(frozen=True)
class Cost:
    """One call of a kernel."""

    macs: int
    """Multiply-accumulates, or iterations of its largest block."""
    constant_bytes: int
    variable_bytes: int
    kind: str
    """Element type of its constants: kernels of one kind have one peak."""

    def traffic_us(self) -> float:
        return self.constant_bytes / FAR_GBYTES_PER_S / 1e3 + self.variable_bytes / NEAR_GBYTES_PER_S / 1e3


@dataclass
class Roofline:
    """The best rate seen of each kind of kernel, in multiply-accumulates a microsecond."""

    rates: dict[str, float] = field(default_factory=dict)

    def observe(self, cost: Cost, time_us: float, share: float = 1.0) -> None:
        """Take in a measured kernel that does `share` of its multiply-accumulates (Winograd does fewer)."""
        self.rates[cost.kind] = max(self.rates.get(cost.kind, 0.0), share * cost.macs / max(time_us, 1e-3))

    def bound_us(self, cost: Cost, share: float = 1.0) -> float:
        """A time this kernel will hardly beat with `share` of its arithmetic; 0 before anything of its kind was
        seen."""
        rate = self.rates.get(cost.kind)
        return max(share * cost.macs / rate, cost.traffic_us()) if rate else 0.0
