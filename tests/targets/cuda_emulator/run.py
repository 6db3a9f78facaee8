"""Run a built model on whatever driver the dynamic linker finds: run.py FOLDER FEEDS.npz OUTPUTS.npz TIMES."""

import sys

import numpy as np

from graphopt.runtime.cuda_engine import CudaEngine

if __name__ == "__main__":
    folder, fed, found, times = sys.argv[1:]
    engine = CudaEngine(folder)
    with np.load(fed) as feeds:
        arrays = dict(feeds)
    for _ in range(int(times)):
        outputs = engine.run(arrays)
    np.savez(found, **outputs)  # pyright: ignore[reportArgumentType]
