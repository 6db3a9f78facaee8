"""How often is the latency gate wrong on this machine? Real comparisons, with a competing load beside them.

    python benchmarks/false_verdicts.py [--repeats 3] [--seconds 20] [--bound 0.05] [--slowdown 0.2]

Three cases, each repeated: a model against itself, the same with a load that comes and goes on one core, and against
a model that does `slowdown` more of the same work, under the load. The model is a chain of equal matrix products, so
the slowdown injected is known: it is the number of products added. Prints a row per case: how many of each verdict,
how many of these are wrong, and the median ratio found.

Wrong is: `slower` or `faster` for a model against itself; `same` or `faster` for a slowdown beyond the bound.
`inconclusive` is not wrong, but it is not an answer either, so it is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.measure import Comparison, Contender, Verdict, compare, environment

PRODUCTS = 50
ROWS, WIDTH = 32, 128
LOAD = """
import random, sys, time
chance = random.Random(int(sys.argv[1]))
while True:
    end = time.perf_counter() + chance.expovariate(1 / 0.4)
    while time.perf_counter() < end:
        sum(i * i for i in range(1000))
    time.sleep(chance.expovariate(1 / 0.6))
"""
"""Busy for 0.4 s and idle for 0.6 s on average, each exponentially distributed."""


def chain(path: Path, products: int) -> Contender:
    """`products` dependent products of (32, 128) by (128, 128), all with weights of their own."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"v{i}" for i in range(1, products)), "y"]
    shape = [ROWS, WIDTH]
    weights = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32), f"w{i}")
        for i in range(products)
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(products)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return Contender.onnx(path)


@contextlib.contextmanager
def competing_load(seed: int) -> Iterator[None]:
    """Another process that wants a core now and then, for as long as the context lasts."""
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(seed)])
    try:
        yield
    finally:
        load.kill()
        load.wait()


def row(case: str, found: list[Comparison], wrong: set[Verdict]) -> dict[str, object]:
    counts = Counter(comparison.verdict for comparison in found)
    floors = [c.noise_floor for c in found if c.noise_floor is not None and np.isfinite(c.noise_floor)]
    return {
        "case": case,
        **{verdict.value: counts[verdict] for verdict in Verdict},
        "wrong": sum(counts[verdict] for verdict in wrong),
        "of": len(found),
        "median ratio": round(float(np.median([c.ratio.median for c in found])), 4),
        "median noise floor": round(float(np.median(floors)), 4) if floors else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="cap of one comparison")
    parser.add_argument("--bound", type=float, default=0.05)
    parser.add_argument("--slowdown", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    feeds = {"x": np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    difference = {Verdict.SLOWER, Verdict.FASTER}
    miss = {Verdict.SAME, Verdict.FASTER} if arguments.slowdown > arguments.bound else {Verdict.FASTER}
    with tempfile.TemporaryDirectory() as folder:
        base = chain(Path(folder) / "base.onnx", PRODUCTS)
        slow = chain(Path(folder) / "slow.onnx", round(PRODUCTS * (1 + arguments.slowdown)))
        cases = (
            ("A against A, quiet", base, False, difference),
            ("A against A, load", base, True, difference),
            (f"{100 * arguments.slowdown:g} % more work, load", slow, True, miss),
        )
        rows = []
        for case, new, loaded, wrong in cases:
            found = []
            for repeat in range(arguments.repeats):
                with competing_load(repeat) if loaded else contextlib.nullcontext():
                    found.append(
                        compare(
                            base,
                            new,
                            feeds,
                            max_regression=arguments.bound,
                            seconds=arguments.seconds,
                            seed=repeat,
                        )
                    )
                sys.stderr.write(f"{case}: {found[-1].describe().splitlines()[0]}\n")
            rows.append(row(case, found, wrong))
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for entry in rows:
        print("| " + " | ".join(str(entry[column]) for column in columns) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(1).to_dict(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
