"""Which outputs of a window lie at the border of the picture, where some of its taps see nothing.

Zeros around a picture of bytes are bytes `zero_point`. A tile that skips the taps outside leaves out what these would
have added, which is the same for all outputs that see the same taps: outputs fall into classes, and the sums of each
class start from a number of their own. Along one axis, each output of the leading border is a class, those inside are
one together, and each of the trailing border is one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Border:
    """Along one axis: `extent` outputs read `length` inputs, with `pad` positions before the first."""

    extent: int
    length: int
    kernel: int
    stride: int
    dilation: int
    pad: int

    @property
    def leading(self) -> int:
        """Outputs whose first tap lies before the picture."""
        return min(-(-self.pad // self.stride), self.extent)

    @property
    def inside(self) -> int:
        """The first output whose last tap lies behind the picture."""
        reach = self.length - 1 + self.pad - (self.kernel - 1) * self.dilation
        return min(max(reach // self.stride + 1, 0), self.extent)

    @property
    def classes(self) -> int:
        if self.leading >= self.inside:  # no output sees the whole window
            return self.extent
        return self.leading + 1 + self.extent - self.inside

    def class_of(self, output: Any) -> Any:
        """Of an output, which is a number or an expression."""
        if self.classes == 1:
            return 0
        if self.leading >= self.inside:
            return output
        last = self.inside - 1
        if isinstance(output, int):
            return min(output, self.leading) + max(output - last, 0)
        from tvm import tirx

        low: Any = tirx.min(output, self.leading) if last > 0 else 0
        return low + tirx.max(output - last, 0) if last < self.extent - 1 else low

    def seen(self) -> np.ndarray:
        """bool (classes, kernel): the taps that an output of each class sees."""
        found = np.zeros((self.classes, self.kernel), bool)
        for output in range(self.extent):
            places = output * self.stride - self.pad + np.arange(self.kernel) * self.dilation
            found[self.class_of(output)] = (places >= 0) & (places < self.length)
        return found


def borders(
    size: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int],
    out_size: tuple[int, int],
) -> tuple[Border, Border]:
    """Of the rows and of the columns; `pads` (top, left)."""
    rows, columns = (Border(out_size[a], size[a], kernel[a], strides[a], dilations[a], pads[a]) for a in range(2))
    return rows, columns
