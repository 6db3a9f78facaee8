"""Nodes left by simplification: onnxsim, and graphopt's simplify and fold-batch-norm, over a folder of models.

    python benchmarks/simplify_table.py FOLDER [--input NAME=x:1,3,224,224;h:1,1,400 ...]

Constant nodes are not counted. Seconds are of one run in process; onnxsim's include folding BatchNormalization, as its
default is. `same` compares graphopt's result with the original in ONNX Runtime without optimisations on one random
input, where dynamic dimensions are given with --input or run at 1: `bits`, or the largest difference relative to the
largest output.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt import model as models
from graphopt.errors import ModelError
from graphopt.passes.base import Context
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.simplify import Simplify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--input", action="append", default=[], metavar="MODEL=NAME:SHAPE[;NAME:SHAPE]")
    parser.add_argument("--fixed", action="store_true", help="fix the inputs given with --input before simplifying")
    arguments = parser.parse_args()
    shapes = dict(_shapes(text) for text in arguments.input)
    print("| model | in | onnxsim | seconds | simplify | seconds | + fold-batch-norm | KiB in | KiB out | same |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in sorted(arguments.folder.glob("*.onnx")):
        given = shapes.get(path.stem, {})
        original = models.load(path)
        start = models.fix_inputs(original, given) if arguments.fixed else original
        print(_row(path.stem, original, start, given), flush=True)


def _row(name: str, original: ir.Model, start: ir.Model, given: dict[str, tuple[int, ...]]) -> str:
    theirs, their_seconds = _onnxsim(start)
    begun = time.perf_counter()
    simplified = Simplify(use_onnxsim=False).run(start.clone(), Context()).model
    seconds = time.perf_counter() - begun
    nodes = g.count_nodes(simplified.graph)
    folded = FoldBatchNorm().run(simplified, Context()).model
    folded = Simplify(use_onnxsim=False).run(folded, Context()).model
    cells = [
        name,
        g.count_nodes(original.graph),
        theirs,
        their_seconds,
        nodes,
        f"{seconds:.2f}",
        g.count_nodes(folded.graph),
        models.parameter_bytes(original) // 1024,
        models.parameter_bytes(folded) // 1024,
        _agreement(original, folded, given),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _onnxsim(model: ir.Model) -> tuple[str, str]:
    import onnxsim

    proto = ir.to_proto(model)
    begun = time.perf_counter()
    simplified, _ = onnxsim.simplify(proto)
    seconds = time.perf_counter() - begun
    return str(sum(node.op_type != "Constant" for node in simplified.graph.node)), f"{seconds:.2f}"


def _agreement(original: ir.Model, result: ir.Model, given: dict[str, tuple[int, ...]]) -> str:
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in models.signature(original).inputs:
        shape = given.get(spec.name, tuple(d if isinstance(d, int) else 1 for d in spec.shape))
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    pairs = list(zip(_run(original, feeds), _run(result, feeds), strict=True))
    if all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
        return "bits"
    return f"{max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs):.1e}"


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(models.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feeds)]


def _shapes(text: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    name, _, specs = text.partition("=")
    found = {}
    for spec in specs.split(";"):
        value, separator, dims = spec.rpartition(":")
        if not separator:
            raise ModelError(f"cannot read --input {text!r}", hint="write MODEL=NAME:1,3,224,224")
        found[value] = tuple(int(d) for d in dims.split(","))
    return name, found


if __name__ == "__main__":
    main()
