"""Artifact folders of small models, built for any target without measuring, and programs made of their packages."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import calibration
from graphopt import model as models
from graphopt.artifact_writer import _tensor
from graphopt.capabilities import host_arch
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.plugins import parse_target
from graphopt.remote.emulator import find_emulator, find_system, remedy
from graphopt.runtime.artifact import COMPILED, MODEL, write_manifest
from graphopt.runtime.tvm_engine import DESCRIPTION, LIBRARY

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits"


def quantized_digits(target: str) -> ir.Model:
    """The digits in 8 bits, by the recipe of the target."""
    model = models.load(DIGITS / "digits.onnx")
    data = calibration.load_dataset(str(DIGITS / "calib.npz"), models.signature(model))
    context = Context(parse_target(target).capabilities, data=data, seed=0)
    made, _ = Pipeline.parse("simplify,fold-batch-norm,quantize-int8").run(model, context)
    return made


def artifact(folder: Path, model: ir.Model, *targets: str, engine: str = "tvm") -> Path:
    """An artifact of `model` with a library for each target; inputs' open dimensions are 1."""
    folder.mkdir(parents=True)
    signature = models.signature(model)
    shapes = {s.name: tuple(d if isinstance(d, int) else 1 for d in s.shape) for s in signature.inputs}
    models.save(model, folder / MODEL)
    files, libraries = [MODEL], []
    for index, text in enumerate(targets):
        name = f"{COMPILED}-{index}" if index else COMPILED
        (folder / name).mkdir()
        target = parse_target(text)
        target.build(target.lower(models.fix_inputs(model, shapes)), folder / name)
        files += [f"{name}/{LIBRARY}", f"{name}/{DESCRIPTION}"]
        libraries.append({"folder": name, "target": str(target)})
    manifest = {
        "engine": engine, "variant": "exact", "precision": "float32", "target": targets[0] if targets else "cpu",
        "signature": {
            "inputs": [_tensor(s) for s in signature.inputs], "outputs": [_tensor(s) for s in signature.outputs],
        },
        "compiled_shapes": {name: list(shape) for name, shape in shapes.items()}, "libraries": libraries,
    }  # fmt: skip
    write_manifest(folder, manifest, files)
    return folder


def runner(arch: str, cpu: str | None = None) -> list[str]:
    """What to put before a program for `arch` to run it here, on `cpu` (QEMU's name) where it is given; skips where
    there is no emulator."""
    if arch == host_arch() and cpu is None:
        return []
    emulator, system = find_emulator(arch), find_system(arch)
    if emulator is None or (system is None and arch != host_arch()):
        pytest.skip(f"no emulator of {arch}: {remedy(arch)}")
    return [emulator, *(["-cpu", cpu] if cpu else []), *(["-L", str(system)] if system else [])]


def compiler(arch: str) -> str:
    """g++ for `arch`; skips where there is none."""
    found = shutil.which("g++" if arch == host_arch() else f"{arch}-linux-gnu-g++")
    if found is None:
        pytest.skip(f"no g++ for {arch}")
    return found


def build_example(package: Path, arch: str) -> Path:
    """Compile the example of a package for C++, as its CMakeLists.txt does."""
    program = package / "example.out"
    command = [
        compiler(arch), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror=format", "-Iinclude", "example/main.cc",
        "src/runner.cc", "-o", str(program), "-Llib", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi",
        "-Wl,-rpath,$ORIGIN/lib",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "warning" in line and "tvm/" not in line]
    assert not ours, ours
    return program


def run_program(command: list[str], feeds: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Outputs by name of a program that takes .npy files."""
    folder.mkdir(exist_ok=True)
    files = []
    for index, array in enumerate(feeds.values()):
        np.save(folder / f"in-{index}.npy", array)
        files.append(str(folder / f"in-{index}.npy"))
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {f.stem: np.load(f) for f in folder.glob("*.npy") if not f.stem.startswith("in-")}


def refusal(command: list[str]) -> str:
    """What a program says that refuses to run: it ends by itself, with code 1 and one line."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    return line
