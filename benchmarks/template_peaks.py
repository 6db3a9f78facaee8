#!/usr/bin/env python3
"""Every template on layers of real networks: GFLOP/s, and the share of this core's measured peak.

    python benchmarks/template_peaks.py [--precision float32] [--tune-seconds 8] [--only NAME ...]

A row is a layer (bias and Relu fused) and a template that matches it; the others are switched off, and the tuner
chooses the template's best decision with constants that come from far memory, as in a run of a model. GFLOP/s count the
multiply-adds of the direct method, whatever a template does, so Winograd's share may exceed 1.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from peak import amx_gflops

from graphopt.targets import schedules
from graphopt.targets.cpu import Cpu
from graphopt.targets.tuning.peak import fma_gflops


@dataclass(frozen=True)
class Layer:
    """A convolution on a square picture, or (`size` 0) a matrix product of `rows` rows."""

    name: str
    channels: int
    outs: int
    size: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    rows: int = 1

    @property
    def pads(self) -> tuple[int, int, int, int]:
        high, wide = (self.dilation * (k - 1) // 2 for k in self.kernel)
        return high, wide, high, wide

    @property
    def macs(self) -> int:
        if not self.size:
            return self.rows * self.channels * self.outs
        out = [
            (self.size + 2 * pad - self.dilation * (k - 1) - 1) // self.stride + 1
            for pad, k in zip(self.pads, self.kernel, strict=False)
        ]
        return math.prod(out) * self.outs * self.channels // self.groups * math.prod(self.kernel)

    def model(self) -> ir.Model:
        """The layer alone, its input in the form another layer leaves it in."""
        rng = np.random.default_rng(0)
        constants = {"bias": rng.uniform(-1, 1, self.outs)}
        if self.size:
            shape, out = (1, self.channels, self.size, self.size), ("N", "C", "H", "W")
            constants["weight"] = rng.uniform(-1, 1, (self.outs, self.channels // self.groups, *self.kernel))
            nodes = [
                helper.make_node("Relu" if self.channels > 4 else "Identity", ["x"], ["before"]),
                helper.make_node(
                    "Conv", ["before", "weight", "bias"], ["product"], kernel_shape=self.kernel, pads=self.pads,
                    strides=(self.stride,) * 2, dilations=(self.dilation,) * 2, group=self.groups,
                ),
                helper.make_node("Relu", ["product"], ["y"]),
            ]  # fmt: skip
        else:
            shape, out = (self.rows, self.channels), ("N", "C")
            constants["weight"] = rng.uniform(-1, 1, (self.channels, self.outs))
            nodes = [
                helper.make_node("MatMul", ["x", "weight"], ["product"]),
                helper.make_node("Add", ["product", "bias"], ["sum"]),
                helper.make_node("Relu", ["sum"], ["y"]),
            ]
        for i, node in enumerate(nodes):
            node.name = f"n{i}"
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "layer",
            [value("x", TensorProto.FLOAT, shape)],
            [value("y", TensorProto.FLOAT, out)],
            [numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


LAYERS = (
    Layer("resnet stem", 3, 64, 224, (7, 7), 2),
    Layer("resnet 64, 56x56", 64, 64, 56, (3, 3)),
    Layer("resnet 128, 28x28", 128, 128, 28, (3, 3)),
    Layer("resnet 256, 14x14", 256, 256, 14, (3, 3)),
    Layer("resnet 512, 7x7", 512, 512, 7, (3, 3)),
    Layer("resnet 128, 56x56 by 2", 128, 128, 56, (3, 3), 2),
    Layer("resnet50 64 to 256, 56x56", 64, 256, 56),
    Layer("resnet50 1024 to 256, 14x14", 1024, 256, 14),
    Layer("resnet50 512 to 2048, 7x7", 512, 2048, 7),
    Layer("resnet50 256 to 512, 56x56 by 2", 256, 512, 56, (1, 1), 2),
    Layer("vgg 64, 224x224", 64, 64, 224, (3, 3)),
    Layer("vgg 512, 14x14", 512, 512, 14, (3, 3)),
    Layer("inception 192, 17x17, 1x7", 192, 192, 17, (1, 7)),
    Layer("inception 64 to 96, 35x35", 64, 96, 35, (3, 3)),
    Layer("resnext 128 in 32 groups, 56x56", 128, 128, 56, (3, 3), groups=32),
    Layer("deeplab 256, 33x33, dilated by 2", 256, 256, 33, (3, 3), dilation=2),
    Layer("mobilenet 32, 112x112, depthwise", 32, 32, 112, (3, 3), groups=32),
    Layer("mobilenet 144, 56x56 by 2, depthwise", 144, 144, 56, (3, 3), 2, 144),
    Layer("mobilenet 960, 7x7, depthwise 5x5", 960, 960, 7, (5, 5), groups=960),
    Layer("mobilenet 96 to 24, 56x56", 96, 24, 56),
    Layer("mobilenet 160 to 960, 7x7", 160, 960, 7),
    Layer("vit 768 to 3072, 197 rows", 768, 3072, rows=197),
    Layer("resnet50 classes, 1 row", 2048, 1000),
    Layer("vgg 25088 to 4096, 1 row", 25088, 4096),
)


def best(layer: Layer, target: Cpu, seconds: float) -> dict[str, tuple[float, dict]]:
    """By template that matches the layer's largest kernel: microseconds and decision."""
    from graphopt.targets.relax import pipeline
    from graphopt.targets.schedules.workload import Workload, work

    lowered = target.lower(layer.model())
    functions = pipeline.prim_funcs(lowered.module)
    found = {name: Workload(f.with_attr("global_symbol", "main"), target.machine()) for name, f in functions.items()}
    largest = max(found, key=lambda name: max(work(block) for block in found[name].blocks.values()))
    offered = {choice.template for choice in schedules.choices(found[largest])}
    times: dict[str, tuple[float, dict]] = {}
    for template in sorted(offered):
        others = {t.NAME for t in schedules.TEMPLATES} - {template}
        alone = replace(target, without="+".join(sorted(others | target.switched_off)))
        lowered = alone.lower(layer.model())
        with tempfile.TemporaryDirectory() as folder:
            report = alone.tune(lowered, seconds=seconds, database=Path(folder) / "schedules.jsonl")
        rows = [row for row in report.rows if row["template"] == template and row["time_us"]]
        if rows:
            row = max(rows, key=lambda row: row["time_us"])
            times[template] = row["time_us"], row["decision"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--tune-seconds", type=float, default=8)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    target = Cpu(threads=1, precision=args.precision)
    tiles = amx_gflops(target) if target.precision != "float32" else None
    peak = tiles or fma_gflops(target)
    print(f"Peak of one core: {peak:.0f} GFLOP/s ({target.llvm_cpu}, {target.precision}).\n")
    print("| layer | template | us | GFLOP/s | share of peak | decision |\n|---|---|---|---|---|---|")
    for layer in LAYERS:
        if args.only and not any(word in layer.name for word in args.only):
            continue
        for template, (us, decision) in sorted(best(layer, target, args.tune_seconds).items(), key=lambda kv: kv[1][0]):
            rate = 2 * layer.macs / us / 1e3
            said = ", ".join(f"{key} {value}" for key, value in decision.items())
            print(f"| {layer.name} | {template} | {us:.0f} | {rate:.0f} | {rate / peak:.2f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
