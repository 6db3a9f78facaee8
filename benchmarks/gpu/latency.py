#!/usr/bin/env python3
"""Latency and throughput on a GPU, beside torch (eager channels-last float16, torch.compile) and ONNX Runtime.

    python benchmarks/gpu/latency.py [MODEL.onnx ...] [--zoo resnet18,resnet50,mobilenet_v2] [--batches 1,8,64]
        [--precisions fp32,fp16,int8] [--target cuda{arch=sm_90}] [--rounds 7] [--out OUT] [--seconds 540]
        [--tune SECONDS] [--torch eager,compile] [--build-only]

`--zoo` takes torchvision's architectures with seeded random weights: they are exported to ONNX below OUT, and torch
runs them as they are. Other models have no torch beside them. Contenders take turns, round by round; a round is as many
runs as take 0.1 s. `latency` waits for each run, inputs on the GPU; `throughput` waits once a round. The figures are
medians over rounds. ONNX Runtime takes part where it has the CUDA provider (`pip install onnxruntime-gpu`), torch where
it is installed with CUDA.

Prints a table, and writes it to OUT/latency.md with every round's figures in OUT/latency.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from graphopt.errors import GraphoptError
from graphopt.plugins import parse_target
from graphopt.runtime.cuda_engine import CudaEngine
from graphopt.targets.cuda import Cuda

ROUND_S = 0.1


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[], Any]
    """One run, perhaps not yet done when it returns."""
    wait: Callable[[], None]


def graphopt_contender(built: common.Built, precision: str) -> Contender:
    engine = CudaEngine(built.folder)
    engine.upload(built.feeds)
    return Contender(f"graphopt {precision}", engine.compute, engine.wait)


def torch_contenders(name: str, batch: int, side: int, modes: list[str]) -> list[Contender]:
    """Empty where there is no torch with CUDA. `modes`: `eager`, `compile`, or both."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    model = zoo_model(name).half().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, dtype=torch.half, device="cuda").to(memory_format=torch.channels_last)

    def run(module):
        def start():
            with torch.inference_mode():
                return module(x)

        return start

    found = [Contender("torch eager fp16", run(model), torch.cuda.synchronize)] if "eager" in modes else []
    if "compile" in modes:
        compiled = torch.compile(model, mode="max-autotune")
        found.append(Contender("torch.compile fp16", run(compiled), torch.cuda.synchronize))
    return found


def zoo_model(name: str):
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def exported(name: str, side: int, out: Path) -> Path:
    """The architecture as ONNX with a dynamic batch, written once."""
    path = out / f"{name}.onnx"
    if not path.is_file():
        import torch  # pyright: ignore[reportMissingImports]

        out.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(
            zoo_model(name), (torch.randn(1, 3, side, side),), str(path), dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    return path


def onnxruntime_contender(path: Path, built: common.Built) -> list[Contender]:
    """Empty where ONNX Runtime has no CUDA provider."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return []
    session = onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    for name, array in built.feeds.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda")
    return [Contender("ONNX Runtime fp32", lambda: session.run_with_iobinding(binding), binding.synchronize_outputs)]


def race(contenders: list[Contender], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a run, round by round: `latency` (each waited for) and `throughput` (the last waited for)."""
    counts, found = {}, {c.name: {"latency": [], "throughput": []} for c in contenders}
    for each in contenders:
        for _ in range(5):  # the first runs record graphs and compile
            each.start()
        each.wait()
        begun = time.perf_counter()
        each.start()
        each.wait()
        counts[each.name] = max(int(ROUND_S / max(time.perf_counter() - begun, 1e-6)), 3)
    for number in range(rounds):
        for each in contenders if number % 2 == 0 else reversed(contenders):
            count = counts[each.name]
            begun = time.perf_counter()
            for _ in range(count):
                each.start()
                each.wait()
            found[each.name]["latency"].append((time.perf_counter() - begun) / count)
            begun = time.perf_counter()
            for _ in range(count):
                each.start()
            each.wait()
            found[each.name]["throughput"].append((time.perf_counter() - begun) / count)
    return found


def row(model: str, batch: int, name: str, times: dict[str, list[float]]) -> str:
    latency, each = (statistics.median(times[key]) for key in ("latency", "throughput"))
    return f"| {model} | {batch} | {name} | {latency * 1e3:.3f} | {batch / each:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--zoo", default="")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--precisions", default="fp16")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=224, help="of the pictures that --zoo models take")
    parser.add_argument("--out", type=Path, default=Path("gpu-checks"))
    parser.add_argument("--seconds", type=float, default=540.0, help="after these, what is left says 'not run'")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="measure kernels of each model")
    parser.add_argument("--torch", default="eager,compile", help="how torch runs --zoo models")
    parser.add_argument("--build-only", action="store_true")
    arguments = parser.parse_args()
    target = parse_target(arguments.target)
    assert isinstance(target, Cuda), arguments.target
    machine = "no GPU, built only" if arguments.build_only else common.require_gpu()
    zoo = common.parse_list(arguments.zoo)
    paths = [*arguments.models, *(exported(name, arguments.side, arguments.out) for name in zoo)]
    if not paths:
        parser.error("name ONNX files, or --zoo architectures")
    started, lines, raw = time.monotonic(), [], []
    for path in paths:
        for batch in map(int, common.parse_list(arguments.batches)):
            if time.monotonic() - started > arguments.seconds:
                lines.append(f"| {path.stem} | {batch} | not run | | |")
                continue
            try:
                made = {p: common.build(path, p, batch, target, arguments.out, seconds=arguments.tune) for p in
                        common.parse_list(arguments.precisions)}  # fmt: skip
                if arguments.build_only:
                    continue
                contenders = [graphopt_contender(built, precision) for precision, built in made.items()]
            except GraphoptError as error:
                lines.append(f"| {path.stem} | {batch} | refused: {error} | | |")
                print(lines[-1], flush=True)
                continue
            contenders += onnxruntime_contender(path, next(iter(made.values())))
            if path.stem in zoo:
                contenders += torch_contenders(path.stem, batch, arguments.side, common.parse_list(arguments.torch))
            for name, times in race(contenders, arguments.rounds).items():
                lines.append(row(path.stem, batch, name, times))
                raw.append({"model": path.stem, "batch": batch, "contender": name, "seconds": times})
                print(lines[-1], flush=True)
    table = [f"{machine}, {target.gpu_arch}, {time.strftime('%d %B %Y')}", "",
             "| model | batch | | latency, ms | pictures/s |", "|---|---|---|---|---|", *lines]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "latency.md").write_text("\n".join(table) + "\n")
    (arguments.out / "latency.json").write_text(json.dumps({"machine": machine, "rounds": raw}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
