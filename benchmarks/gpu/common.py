"""What the GPU checks share: the machine, the models and their inputs, and libraries built once."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import calibration
from graphopt import model as models
from graphopt.errors import GraphoptError
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.runtime import gpu
from graphopt.targets.cuda import Cuda

PRECISIONS = ("fp32", "fp16", "int8")
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mnist_cnn": {},
    "resnet20_cifar10": {"input": (1, 3, 32, 32)},
    "resnet56_cifar10": {"input": (1, 3, 32, 32)},
    "squeezenet1_1": {"data": (1, 3, 224, 224)},
    "mobilenetv2": {"input": (1, 3, 224, 224)},
    "mobilenetv1_075": {"input_1": (1, 3, 224, 224)},
    "tiny_darknet": {"image": (1, 3, 224, 224)},
    "facenet": {"input": (1, 3, 160, 160)},
    "deeplabv3_mnv2": {},
    "ultraface_rfb320": {},
    "yolox_nano": {},
    "nanodet_m": {"data": (1, 3, 320, 320)},
    "super_resolution": {"input": (1, 1, 224, 224)},
    "style_transfer": {"input": (1, 3, 256, 256)},
}
"""Input shapes of the shared CNNs by name; other models have fixed ones, or get a batch of one."""
PIXELS = frozenset({"yolox_nano", "style_transfer"})
"""Models that take pixels from 0 to 255: to them, standard normal numbers are a black picture, and what they make of it
says little."""
CALIBRATION_SAMPLES = 8


@dataclass(frozen=True)
class Built:
    """A library of one model in one precision and batch, and the model it was made of."""

    folder: Path
    path: Path
    """Of the model as it came."""
    model: ir.Model
    """float32, or quantized."""
    feeds: dict[str, np.ndarray]


def require_gpu() -> str:
    """The GPU's name; ends the program with a sentence and exit code 1 where there is none."""
    lacking = gpu.missing()
    if lacking is not None:
        print(f"not run: {lacking}; {gpu.REMEDY} (--build-only builds without one)", file=sys.stderr)
        raise SystemExit(1)
    return gpu.names()[0]


def with_batch(path: Path, batch: int) -> ir.Model:
    """The model with static shapes and this batch. Raises GraphoptError where its batch is another one."""
    original = models.load(path)
    shapes = SHAPES.get(path.stem)
    if shapes is None:
        shapes = {
            spec.name: tuple(d if isinstance(d, int) else 1 for d in spec.shape)
            for spec in models.signature(original).inputs
            if not all(isinstance(d, int) for d in spec.shape)
        }
    return models.fix_inputs(original, {name: (batch, *shape[1:]) for name, shape in shapes.items()})


def noise(model: ir.Model, path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal inputs; whole numbers up to 200 for integer inputs and those of `PIXELS`."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in models.signature(model).inputs:
        shape, dtype = tuple(int(str(d)) for d in spec.shape), np.dtype(spec.dtype)
        normal = dtype.kind == "f" and path.stem not in PIXELS
        array = rng.standard_normal(shape) if normal else rng.integers(0, 200, shape)
        feeds[spec.name] = array.astype(dtype)
    return feeds


def build(
    path: Path, precision: str, batch: int, target: Cuda, out: Path, calib: str | None = None, seconds: float = 0
) -> Built:
    """Build below `out`, once; kernels measured for at most `seconds` on this machine's GPU. Raises GraphoptError."""
    model = with_batch(path, batch)
    feeds = noise(model, path)
    options: dict[str, Any] = {"arch": target.gpu_arch, "host": target.host_arch}
    if precision == "int8":
        model = quantized(model, path, Cuda(**options), calib)
    wanted = Cuda(**options, precision="float16" if precision == "fp16" else "float32")
    folder = out / f"{path.stem}-{precision}-{batch}-{wanted.gpu_arch}{'-tuned' if seconds else ''}"
    if not (folder / "engine.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lowered = wanted.lower(model)
        report = wanted.tune(lowered, seconds=seconds, database=out / "schedules.jsonl")
        wanted.build(lowered, folder)
        (folder / "choices.json").write_text(json.dumps([dict(row) for row in report.rows], indent=1))
    return Built(folder, path, model, feeds)


def quantized(model: ir.Model, path: Path, target: Cuda, calib: str | None = None) -> ir.Model:
    """By `quantize-int8`, calibrated on `calib` or, which is enough for comparing engines, on noise."""
    signature = models.signature(model)
    with tempfile.TemporaryDirectory() as folder:
        if calib is None:
            samples = [noise(model, path, seed) for seed in range(100, 100 + CALIBRATION_SAMPLES)]
            calib = f"{folder}/noise.npz"
            arrays = {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}
            np.savez(calib, **arrays)  # pyright: ignore[reportArgumentType]
        data = calibration.load_dataset(calib, signature, None)
        context = Context(target.capabilities, data=data)
        return Pipeline.parse("simplify,fold-batch-norm,quantize-int8").run(model, context)[0]


def parse_list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def shared_models(paths: list[Path], shared: Path) -> list[Path]:
    """The models named, or all shared CNNs that are there. Ends the program with a sentence where there is none."""
    found = paths or [shared / "models" / f"{name}.onnx" for name in SHAPES]
    there = [path for path in found if path.is_file()]
    if not there:
        print(f"no models: {found[0]} is not there; name ONNX files, or set GRAPHOPT_SHARED", file=sys.stderr)
        raise SystemExit(2)
    return there


__all__ = ["PRECISIONS", "SHAPES", "Built", "GraphoptError", "build", "noise", "parse_list", "require_gpu",
           "shared_models", "with_batch"]  # fmt: skip
