"""Nodes that simplifiers leave: graphopt, onnxsim, OnnxSlim, onnxscript and ONNX Runtime, over a folder of models.

    python benchmarks/simplify_table.py FOLDER [--only NAME ...] [--memory] [--keep DIR]
    python benchmarks/simplify_table.py FOLDER --race [--threads 1] [--rounds 200]

The first prints a row a model: nodes in, nodes left by each tool and its processor seconds (each in a process of its
own: simplifiers.py; with --memory its MiB instead), and, for `exact`, the largest difference of outputs from the
original's, relative to the largest output, in ONNX Runtime without optimisations on one random input. `simplify` is
that pass alone, without onnx-simplifier; `exact` the preset: simplify, fold-batch-norm, fuse-operators. ONNX Runtime
extended fuses into operators of its own (com.microsoft) and is there for information.

The second times the original beside what `exact` made of it in ONNX Runtime, all its optimisations on, turn by turn in
one process; the ratio is the median over rounds, above 1 where the result is slower. It wants a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from simplifiers import count_nodes, measured

from graphopt import model as models

COLUMNS = ("simplify", "exact", "onnxsim", "onnxslim", "onnxscript", "ort-basic", "ort-extended")
SIZES = {
    "style_transfer": {"input": (1, 3, 256, 256)},
    "nanodet_m": {"data": (1, 3, 320, 320)},
    "nsnet2": {"features": (1, 100, 161), "h0_1": (1, 1, 400), "h0_2": (1, 1, 400)},
    "stories260k": {"input_ids": (1, 64)},
}
"""Of dynamic inputs, where 1 would not do; the table itself is made with dimensions left dynamic."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--keep", type=Path, help="write the results here")
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    files = [f for f in sorted(arguments.folder.glob("*.onnx")) if not arguments.only or f.stem in arguments.only]
    with tempfile.TemporaryDirectory() as name:
        out = arguments.keep or Path(name)
        out.mkdir(parents=True, exist_ok=True)
        if arguments.race:
            print("| model | original ms | exact ms | ratio |\n|---|---|---|---|")
            for file in files:
                print(_race(file, out / f"{file.stem}.exact.onnx", arguments.threads, arguments.rounds), flush=True)
            return
        print("| model | in | " + " | ".join(COLUMNS) + " | exact differs by |")
        print("|---|---|" + "---|" * len(COLUMNS) + "---|")
        for file in files:
            print(_row(file, out, arguments.memory), flush=True)


def _row(file: Path, out: Path, memory: bool) -> str:
    cells = [file.stem, str(count_nodes(onnx.load(file).graph))]
    for tool in COLUMNS:
        found = measured(tool, file, out / f"{file.stem}.{tool}.onnx")
        if found is None:
            cells.append("fails")
        else:
            cells.append(f"{found['nodes']}, " + (f"{found['mib']:.0f}" if memory else f"{found['cpu_s']:.2f}"))
    feeds = _feeds(file)
    pairs = zip(_run(file, feeds), _run(out / f"{file.stem}.exact.onnx", feeds), strict=True)
    error = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)
    return f"| {' | '.join(cells)} | {error:.1e} |"


def _race(file: Path, exact: Path, threads: int, rounds: int) -> str:
    measured("exact", file, exact)
    sessions = [_session(path, threads, optimized=True) for path in (file, exact)]
    feeds = _feeds(file)
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 5):
        for session, times in zip(sessions, seconds, strict=True):
            begun = time.perf_counter()
            session.run(None, feeds)
            if turn >= 5:
                times.append(time.perf_counter() - begun)
    before, after = np.array(seconds) * 1e3
    return f"| {file.stem} | {np.median(before):.3f} | {np.median(after):.3f} | {np.median(after / before):.3f} |"


def _feeds(file: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in models.signature(ir.load(file.absolute())).inputs:
        given = SIZES.get(file.stem, {})
        shape = given.get(spec.name, tuple(d if isinstance(d, int) else 1 for d in spec.shape))
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def _session(file: Path, threads: int, optimized: bool):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _run(file: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(y) for y in _session(file, 1, optimized=False).run(None, feeds)]


if __name__ == "__main__":
    main()
