"""`graphopt optimize --target cuda` from end to end, on the emulated driver: kernels are right, and are raced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import TargetError
from graphopt.precision import narrowed
from graphopt.targets.cpu import Cpu
from graphopt.targets.cuda import Cuda
from tests.targets import cuda_emulator
from tests.targets.test_cuda import DIGITS, needs_emulator

ROOT = Path(__file__).resolve().parent.parent


@needs_emulator
@pytest.mark.long
def test_every_candidate_is_right_and_raced(tmp_path):
    script = Path(cuda_emulator.__file__).parent / "optimize.py"
    out = tmp_path / "out"
    arguments = [
        "optimize", str(DIGITS), "-o", str(out), "--target", "cuda{arch=sm_80}", "--precision", "fp16",
        "--preset", "int8",
        "--calib", str(DIGITS.parent / "calib.npz"), "--eval", str(DIGITS.parent / "eval.npz"),
        "--tune-seconds", "1", "--measure-seconds", "1",
    ]  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cuda_emulator.driver_folder()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    status = {c["name"]: c["status"] for c in report["candidates"]}
    assert {"exact · tvm", "exact · tvm fp16", "final · tvm"} <= set(status)
    assert set(status.values()) == {"measured"}, status


def test_float16_is_for_gpus_and_arm_cores():
    assert isinstance(narrowed(Cuda(arch="sm_80"), "fp16"), Cuda)
    with pytest.raises(TargetError, match="has no float16 instructions"):
        narrowed(Cpu(), "fp16")
