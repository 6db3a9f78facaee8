#!/usr/bin/env python3
"""What a call costs beyond its kernels, in microseconds.

    python benchmarks/overhead.py [--threads 1]

A model of one Relu on one element measures the empty call, through `graphopt.load(...).run` (artifact), the engine
below it, TVM's virtual machine below that, and ONNX Runtime for comparison. A chain of kernels that do next to nothing
gives the cost of one kernel more; parallel loops of two tiny halves that of starting the second thread, right after
the last one and after the worker has gone to sleep; the last row is processor time spent in the half second after a
call. Figures are the least of 20 windows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

import graphopt
from graphopt.runtime import artifact
from graphopt.runtime.entry_point import aligned_empty
from graphopt.runtime.tvm_engine import TvmEngine, available_processors, set_threads
from graphopt.targets.cpu import Cpu

CHAIN = 33
WINDOWS = 20


def chain(length: int, shape: tuple[int, ...]) -> ir.Model:
    """A model of `length` Softmax nodes, which do not fuse, or of one Relu."""
    op = "Relu" if length == 1 else "Softmax"
    nodes = [helper.make_node(op, [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(length)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "chain", [value("v0", TensorProto.FLOAT, shape)], [value(f"v{length}", TensorProto.FLOAT, shape)]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def built(model: ir.Model, folder: Path, threads: int) -> TvmEngine:
    target = Cpu(threads=threads)
    target.build(target.lower(model), folder)
    return TvmEngine(folder, threads)


def wrapped(model: ir.Model, folder: Path, threads: int) -> artifact.Artifact:
    """The same library as an artifact, as `graphopt.load` opens it."""
    compiled = folder / artifact.COMPILED
    compiled.mkdir()
    engine = built(model, compiled, threads)
    (name,) = engine.output_names
    shapes = {n: list(s) for n, s in engine.input_shapes.items()}
    signature = {
        "inputs": [{"name": n, "dtype": "float32", "shape": s} for n, s in shapes.items()],
        "outputs": [{"name": name, "dtype": "float32", "shape": next(iter(shapes.values()))}],
    }
    content = {"engine": "tvm", "signature": signature, "compiled_shapes": shapes}
    artifact.write_manifest(folder, content, ["compiled/model.so", "compiled/engine.json"])
    return graphopt.load(folder, threads=threads)


def least_us(call: Callable[[], object], calls: int = 500) -> float:
    call()
    found = []
    for _ in range(WINDOWS):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - begin) / calls)
    return 1e6 * min(found)


def median_after_us(call: Callable[[], object], rest_s: float) -> float:
    """Median time of a call that comes `rest_s` after the one before."""
    found = []
    for _ in range(100):
        until = time.perf_counter() + rest_s
        while time.perf_counter() < until:
            pass
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(found))


def tiny_loops(parallel: bool) -> Any:
    """A function of two rows of 64 numbers, with one task a row or none."""
    import tvm
    from tvm import te

    from graphopt.targets.schedules.workload import new_schedule

    rows: Any = te.placeholder((2, 64), name="rows")
    more: Any = te.compute((2, 64), lambda i, j: rows[i, j] + np.float32(1), name="more")
    schedule = new_schedule(te.create_prim_func([rows, more]))
    row, column = schedule.get_loops(schedule.get_sblock("more"))
    schedule.vectorize(column)
    if parallel:
        schedule.parallel(row)
    built: Any = tvm.compile(schedule.mod, target=Cpu(threads=2).tvm_target())
    return built.jit()["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    rows: list[tuple[str, float]] = []
    single, feeds = chain(1, (1,)), {"v0": aligned_empty((1,), np.dtype(np.float32))}
    feeds["v0"][...] = 1
    with tempfile.TemporaryDirectory() as folder:
        opened = wrapped(single, Path(folder), threads)
        engine = TvmEngine(Path(folder) / artifact.COMPILED, threads)
        rows.append(("empty call, artifact", least_us(lambda: opened.run(feeds))))
        rows.append(("empty call, engine", least_us(lambda: engine.run(feeds))))
        machine, tensors = engine._machine["main"], [slot.tensor for slot in engine._entry.slots]
        rows.append(("empty call, virtual machine", least_us(lambda: machine(*tensors))))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(ir.to_proto(single).SerializeToString(), options)
    rows.append(("empty call, ONNX Runtime", least_us(lambda: session.run(None, feeds))))
    image = np.ones((1, 3, 224, 224), np.float32)
    place = aligned_empty(image.shape, image.dtype)
    rows.append(("copy of an unaligned 3x224x224 input", least_us(lambda: np.copyto(place, image), 50)))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as many:
        short, long = (built(chain(n, (1, 4)), Path(f), threads) for n, f in ((2, one), (CHAIN, many)))
        few = {"v0": np.ones((1, 4), np.float32)}
        extra = least_us(lambda: long.run(few), 100) - least_us(lambda: short.run(few), 100)
        rows.append(("one kernel more", extra / (CHAIN - 2)))
    serial, parallel = tiny_loops(False), tiny_loops(True)
    import tvm

    pair = [tvm.runtime.tensor(np.ones((2, 64), np.float32)) for _ in range(2)]
    set_threads(1)
    plain = least_us(lambda: serial(*pair))
    rows.append(("parallel loop, 1 thread", least_us(lambda: parallel(*pair)) - plain))
    if available_processors() > 1:
        set_threads(2)
        rows.append(("parallel loop, 2 threads", least_us(lambda: parallel(*pair)) - plain))
        rows.append(("parallel loop, 2 threads, worker asleep", median_after_us(lambda: parallel(*pair), 5e-3) - plain))
        before = time.process_time()
        time.sleep(0.5)
        rows.append(("processor time after a call", 1e6 * (time.process_time() - before)))
    print(f"| threads={threads} | us |\n|---|---|")
    for name, figure in rows:
        print(f"| {name} | {figure:.2f} |")


if __name__ == "__main__":
    main()
