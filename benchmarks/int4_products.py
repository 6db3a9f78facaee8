#!/usr/bin/env python3
"""One row times a constant matrix, its weights stored in 4, 8 and 32 bits: microseconds and weights a second.

    python benchmarks/int4_products.py [ROWS COLUMNS BLOCK] [--target 'cpu{mcpu=cascadelake}'] [--tune-seconds 10]

Layers with one row of data take as long as their weights take to arrive: INT4 moves half of INT8's bytes. Activations
are bytes (quantized on the way in) or float32; scales are for blocks of BLOCK weights in INT4, for a column in INT8.
Schedules are searched anew and kept nowhere. Nothing else may be running.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from graphopt.tuning import resolve_target


def product(depth: int, columns: int, block: int, bits: int, of_bytes: bool) -> ir.Model:
    """x (1, depth) -> MatMul -> y (1, columns)."""
    rng = np.random.default_rng(0)
    held: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, array: np.ndarray) -> str:
        held.append(numpy_helper.from_array(array, name))
        return name

    if bits == 4:
        held.append(helper.make_tensor("w", TensorProto.INT4, (depth, columns), rng.integers(-8, 8, depth * columns)))
        scales = constant("ws", rng.uniform(0.01, 0.1, (depth // block, columns)).astype(np.float32))
        nodes.append(helper.make_node("DequantizeLinear", ["w", scales], ["wd"], axis=0, block_size=block))
    elif bits == 8:
        constant("w", rng.integers(-127, 128, (depth, columns)).astype(np.int8))
        scales = constant("ws", rng.uniform(0.01, 0.1, columns).astype(np.float32))
        nodes.append(helper.make_node("DequantizeLinear", ["w", scales], ["wd"], axis=1))
    else:
        constant("wd", rng.standard_normal((depth, columns)).astype(np.float32))
    if of_bytes:
        scheme = [constant("s", np.array(0.01, np.float32)), constant("z", np.array(119, np.uint8))]
        nodes.append(helper.make_node("QuantizeLinear", ["x", *scheme], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", *scheme], ["d"]))
    nodes.append(helper.make_node("MatMul", ["d" if of_bytes else "x", "wd"], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, e)) for n, e in (("x", depth), ("y", columns))]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[9216, 4096, 32])
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--tune-seconds", type=float, default=10.0)
    given = parser.parse_args()
    depth, columns, block = given.sizes
    target = resolve_target(given.target, 1)
    print("| weights | activations | us | 10^9 weights a second |\n|---|---|---|---|")
    for bits, of_bytes in ((4, True), (8, True), (4, False), (32, False)):
        lowered = target.lower(product(depth, columns, block, bits, of_bytes))
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "schedules.jsonl"
            report = target.tune(lowered, seconds=given.tune_seconds, database=database, everything=True, fresh=True)
        time_us = max(row["time_us"] or 0.0 for row in report.rows)
        kind = "float32" if bits == 32 else f"INT{bits}"
        print(
            f"| {kind} | {'bytes' if of_bytes else 'float32'} | {time_us:.0f} | {depth * columns / time_us / 1e3:.0f} |"
        )


if __name__ == "__main__":
    main()
