"""`graphopt ARGUMENTS` on the emulated driver, kernels compiled for the emulator: optimize.py ARGUMENTS."""

import sys

from graphopt.cli import main
from graphopt.targets import nvcc
from tests.targets import cuda_emulator

if __name__ == "__main__":
    nvcc.compile_source = cuda_emulator.compile_source
    sys.exit(main())
