"""The parts of `quantize-int4`: where blocks lie, their scales, how weights are rounded, how it is written."""
