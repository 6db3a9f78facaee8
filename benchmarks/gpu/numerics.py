#!/usr/bin/env python3
"""Right or wrong on a GPU: every model in float32, float16 and INT8 against ONNX Runtime on the processor.

    python benchmarks/gpu/numerics.py [MODEL.onnx ...] [--precisions fp32,fp16,int8] [--target cuda{arch=sm_90}]
        [--out OUT] [--seconds 540] [--build-only]

Without models: the shared CNNs (GRAPHOPT_SHARED). `--build-only` builds on a machine without a GPU; copy OUT to one
that has one and call again. float32 is right within the tolerance that rounding explains (`graphopt.verify`); float16
with at least 40 dB of signal to noise; INT8 if its noise is at most twice what the quantized model has in ONNX Runtime.
A model is run on four inputs, and on the first twice more: from a recorded CUDA graph, and all three must be equal.

Prints a table, and writes it to OUT/numerics.md. Exit code 0: all right; 1: something wrong or no GPU; 2: no models.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from graphopt.errors import GraphoptError, VerificationError
from graphopt.passes.base import Fidelity
from graphopt.plugins import parse_target
from graphopt.runtime.cuda_engine import CudaEngine
from graphopt.targets.cuda import Cuda
from graphopt.verify import Reference

HALF_DB = 40.0
TWICE_DB = 3.02
SAMPLES = 4
"""Ten numbers of one classification are too few to tell noise from twice the noise."""


def check(built: common.Built, floating, precision: str) -> tuple[bool, str]:
    """Whether it is right, and the figure that says so."""
    engine = CudaEngine(built.folder)
    samples = [built.feeds, *(common.noise(built.model, built.path, seed) for seed in range(1, SAMPLES))]
    runs = [engine.run(feeds) for feeds in samples]
    for _ in range(2):
        later = engine.run(samples[0])
        if any(not np.array_equal(runs[0][name], later[name], equal_nan=True) for name in later):
            return False, "a later run differs from the first"
    with tempfile.TemporaryDirectory() as work:
        if precision == "fp32":
            errors = Reference(floating, samples, Path(work)).judge_outputs(runs, Fidelity.ROUNDING, "the GPU")
            worst = max(errors, key=lambda e: e.max_abs_error / max(e.tolerance, 1e-30))
            return all(e.within for e in errors), f"error {worst.max_abs_error:.2g} of {worst.tolerance:.2g} allowed"
        reference = Reference(floating, samples, Path(work))
        found = min(e.snr_db for e in reference.judge_outputs(runs, Fidelity.LOSSY, "the GPU"))
        if precision == "fp16":
            return found >= HALF_DB, f"{found:.1f} dB"
        own = min(e.snr_db for e in reference.judge_model(built.model, Fidelity.LOSSY, "quantization"))
        return found >= own - TWICE_DB, f"{found:.1f} dB, ONNX Runtime {own:.1f} dB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--precisions", default=",".join(common.PRECISIONS))
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-checks"))
    parser.add_argument("--seconds", type=float, default=540.0, help="after these, what is left says 'not run'")
    parser.add_argument("--build-only", action="store_true")
    arguments = parser.parse_args()
    target = parse_target(arguments.target)
    assert isinstance(target, Cuda), arguments.target
    shared = Path(os.environ.get("GRAPHOPT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    machine = "no GPU, built only" if arguments.build_only else common.require_gpu()
    paths = common.shared_models(arguments.models, shared)
    started, wrong, lines = time.monotonic(), 0, []
    for path in paths:
        for precision in common.parse_list(arguments.precisions):
            if time.monotonic() - started > arguments.seconds:
                lines.append(f"| {path.stem} | {precision} | not run | |")
                continue
            try:
                built = common.build(path, precision, 1, target, arguments.out)
                right, figure = (
                    (True, "built") if arguments.build_only else check(built, common.with_batch(path, 1), precision)
                )
            except VerificationError as error:
                right, figure = False, str(error)
            except GraphoptError as error:
                right, figure = False, f"refused: {error}"
            wrong += not right
            lines.append(f"| {path.stem} | {precision} | {'right' if right else 'WRONG'} | {figure} |")
            print(lines[-1], flush=True)
    table = [f"{machine}, {target.gpu_arch}, {time.strftime('%d %B %Y')}", "", "| model | precision | | |",
             "|---|---|---|---|", *lines]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "numerics.md").write_text("\n".join(table) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
