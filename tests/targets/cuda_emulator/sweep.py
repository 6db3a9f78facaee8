"""`benchmarks/gpu/tile_sweep.py ARGUMENTS` on the emulated driver, kernels compiled for the emulator."""

import sys
from pathlib import Path

from graphopt.targets import nvcc
from tests.targets import cuda_emulator

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))

if __name__ == "__main__":
    import tile_sweep  # pyright: ignore[reportMissingImports]

    nvcc.compile_source = cuda_emulator.compile_source
    sys.exit(tile_sweep.main())
