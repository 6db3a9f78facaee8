"""How a processor wants values stored: vectors, precision, and how many channels make a block."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.targets.relax import bfloat16, half

WHOLE, WHOLE_BYTES = 8, 16
"""Where all channels are one block, their number is a multiple of this: 16 bytes of float16, or of bytes."""


@dataclass(frozen=True)
class Form:
    """How a processor wants values stored."""

    lanes: int
    """float32 lanes of a vector; 0: all channels are one block, so that pictures are (N, 1, H * W, C), as graphics
    processors want them."""
    precision: str = "float32"
    """`float32`, `bfloat16` or `float16`: what float32 images are stored as."""
    tiles: bool = False
    """Bytes are multiplied in AMX tiles, whose rows are 64 of them; without lanes, on tensor cores."""
    byte_type: str = "uint8"
    """The type of activations that dot products multiply with int8 weights."""
    width: int = 0
    """Channels of a full block; 0: as many as lanes."""
    tables: bool = False
    """A table of 256 bytes fits a few vector registers and is read from there."""

    @property
    def narrows(self) -> bool:
        """True when images are stored in 16 bits."""
        return self.precision in bfloat16.NARROW

    @property
    def halves(self) -> bool:
        """True when kernels may compute in float16 vectors: what they read is better float16 too."""
        return self.precision == bfloat16.HALF and self.lanes > 0

    def block_for(self, channels: int) -> int:
        """The channel block of a value: a full one, or a narrower one for a few channels, or where it pads fewer."""
        if not self.lanes:
            step = WHOLE_BYTES if self.tiles else WHOLE
            return -(-channels // step) * step
        if self.tiles and channels > 4:
            return 64 if channels > 32 else 32 if channels > 16 else 16
        if self.halves:
            return half.LANES if channels <= half.LANES else self.width or self.lanes
        if self.narrows:
            return 32 if channels > 16 else 16  # a vector of bfloat16, which is also a row of an AMX tile
        block = self.width or self.lanes
        while block > 4 and (channels <= block // 2 or (block > 2 * self.lanes and 0 < channels % block <= block // 2)):
            block //= 2
        return block
