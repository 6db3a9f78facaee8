"""The parts of `quantize-int8`: where, with which range, and how it is written."""
