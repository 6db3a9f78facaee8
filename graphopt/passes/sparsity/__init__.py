"""The parts of `prune-weights`: which weights go, and what becomes of the others."""
