"""Sizes of packages, and whether what they hold computes what ONNX Runtime does: "Packages" of docs/results.md.

    python benchmarks/packages.py

Each model in fp32 and in INT8, compiled for x86-64 and for ARM without tuning (which moves sizes by little), is packed
in all three ways. The static executable then runs on one sample, here or emulated, beside ONNX Runtime.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from shared_data import CLASSIFIERS

from graphopt import calibration
from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.capabilities import host_arch
from graphopt.packaging import package
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.places import place_for
from graphopt.places.emulated import Emulated
from graphopt.plugins import parse_target
from graphopt.remote.emulator import find_emulator
from graphopt.runtime.artifact import COMPILED, MODEL, write_manifest
from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from graphopt.runtime.tvm_engine import DESCRIPTION, LIBRARY
from graphopt.targets.base import Target

TARGETS = {"x86-64": "cpu{mcpu=cascadelake}", "aarch64": "arm{mcpu=cortex-a76}"}
EXACT, INT8 = "simplify,fold-batch-norm", "simplify,fold-batch-norm,quantize-int8"
SAMPLES = 64
SHARED_MODELS = ("resnet20_cifar10", "mobilenetv2")
DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"


def sources(work: Path) -> dict[str, tuple[Path, str, str | None]]:
    """Model, data and preprocessing by name."""
    found: dict[str, tuple[Path, str, str | None]] = {
        "digits": (DIGITS / "digits.onnx", str(DIGITS / "calib.npz"), None)
    }
    for each in CLASSIFIERS:
        if each.name in SHARED_MODELS:
            found[each.name] = each.path, str(each.data_path(work)), each.preprocess
    return found


def rewritten(path: Path, data: Dataset, passes: str, target: Target) -> ir.Model:
    """The model after the passes, for batches of one."""
    model = models.load(path)
    drawn, _ = data.draw(min(SAMPLES, len(data)), 0)
    made, _ = Pipeline.parse(passes).run(model, Context(target.capabilities, data=drawn, seed=0))
    return made


def build(model: ir.Model, feeds: Mapping[str, np.ndarray], target: Target, folder: Path) -> Path:
    """An artifact whose library is not tuned."""
    (folder / COMPILED).mkdir(parents=True)
    models.save(model, folder / MODEL)
    fixed = models.fix_inputs(model, {name: array.shape for name, array in feeds.items()})
    target.build(target.lower(fixed), folder / COMPILED)
    manifest = {
        "engine": "tvm", "target": str(target), "compiled_shapes": {name: a.shape for name, a in feeds.items()},
        "signature": {"inputs": [], "outputs": []}, "libraries": [{"folder": COMPILED, "target": str(target)}],
    }  # fmt: skip
    write_manifest(folder, manifest, [MODEL, f"{COMPILED}/{LIBRARY}", f"{COMPILED}/{DESCRIPTION}"])
    return folder


def noise_db(program: Path, target: Target, model: Path, feeds: Mapping[str, np.ndarray], work: Path) -> float:
    """Signal-to-noise of the executable's outputs against ONNX Runtime's, the worst output."""
    before = []
    if target.capabilities.arch != host_arch():
        place = place_for(target)
        assert isinstance(place, Emulated)
        before = [str(find_emulator(target.capabilities.arch)), "-cpu", place.cpu]
    files = []
    for number, array in enumerate(feeds.values()):
        np.save(work / f"in-{number}.npy", array)
        files.append(str(work / f"in-{number}.npy"))
    subprocess.run([*before, str(program), "-o", str(work), *files], check=True)
    ratios = []
    for name, wanted in OnnxRuntimeEngine(model).run(feeds).items():
        found = np.load(work / f"{name.replace('/', '_')}.npy").astype(np.float64)
        error = np.sum((found - wanted) ** 2)
        ratios.append(10 * np.log10(np.sum(wanted.astype(np.float64) ** 2) / error) if error else np.inf)
    return float(min(ratios))


def row(name: str, kind: str, arch: str, sources_: tuple[Path, str, str | None]) -> str:
    path, source, preprocess = sources_
    target = parse_target(TARGETS[arch])
    data = calibration.load_dataset(source, models.signature(models.load(path)), preprocess)
    model = rewritten(path, data, INT8 if kind == "INT8" else EXACT, target)
    feeds = next(iter(data.batches(1)))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        artifact = build(model, feeds, target, work / "artifact")
        packed = {runtime: package(artifact, work / runtime, runtime) for runtime in ("cpp", "python", "c-static")}
        sizes = {runtime: each.description["files"] for runtime, each in packed.items()}
        library = sizes["cpp"]["model/model.so"]
        needed = sum(sizes["cpp"][each] for each in sizes["cpp"] if each.startswith(("model/", "lib/lib")))
        matched = noise_db(packed["c-static"].path / "run", target, artifact / MODEL, feeds, work)
        cells = [library, needed, sum(sizes["cpp"].values()), sum(sizes["python"].values()), sizes["c-static"]["run"]]
        mega = " | ".join(f"{each / 1e6:.2f}" for each in cells)
        return f"| {name} | {kind} | {arch} | {mega} | {matched:.1f} |"


def main() -> None:
    print("| model | kind | for | model.so | C++, to run | C++, all | Python | static executable | dB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for name, each in sources(Path(work)).items():
            for kind in ("fp32", "INT8"):
                for arch in TARGETS:
                    print(row(name, kind, arch, each), flush=True)


if __name__ == "__main__":
    main()
