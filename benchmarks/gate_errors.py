"""How often is the latency gate wrong on this machine? Real comparisons, with a competing load beside them.

    python benchmarks/gate_errors.py -o gate.jsonl [--count 200] [--seconds 60] [--quiet-machine] [--cases same,5,20]

Three cases: a model against itself (`count` times), against one that does 5 % more of the same work, and against one
that does 20 % more (half as often each). The model is a chain of equal matrix products, so what is injected is known:
it is the number of products added. A comparison's seed chooses the load and the order of turns.

Each comparison is appended to the output as it ends; the same command goes on where it was interrupted. Then a row a
case: how many of each verdict, how many of these are wrong, and how long they took, opening and warming up included.

Wrong is: `slower` or `faster` for a model against itself; anything but `slower` for a slowdown, which is beyond the
bound: 5 %, and 2 % where the slowdown is 5 %, as no gate can tell a slowdown from a bound that equals it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.measure import Contender, Verdict, compare, environment

PRODUCTS = 100
ROWS, WIDTH = 32, 128
LOAD = """
import os, random, sys, time
chance, parent = random.Random(int(sys.argv[1])), os.getppid()
while os.getppid() == parent:
    end = time.perf_counter() + chance.expovariate(1 / 0.4)
    while time.perf_counter() < end:
        sum(i * i for i in range(1000))
    time.sleep(chance.expovariate(1 / 0.6))
"""
"""Busy for 0.4 s and idle for 0.6 s on average, each exponentially distributed; it ends when the harness has."""


@dataclass(frozen=True)
class Case:
    """`slowdown`: the share of work added. `often`: of the count. `within_s`: a slowdown is to be found in less."""

    name: str
    slowdown: float
    bound: float
    often: float
    within_s: float | None = None

    def wrong(self, verdict: str) -> bool:
        if self.slowdown == 0:
            return verdict in (Verdict.SLOWER.value, Verdict.FASTER.value)
        return verdict != Verdict.SLOWER.value


CASES = {
    "same": Case("A against A", 0.0, 0.05, 1.0),
    "5": Case("5 % more work", 0.05, 0.02, 0.5),
    "20": Case("20 % more work", 0.2, 0.05, 0.5, within_s=10.0),
}


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


def done_before(path: Path) -> list[dict[str, Any]]:
    """What earlier runs appended; a line that an interruption tore is not there."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def append(path: Path, entry: dict[str, Any]) -> None:
    torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(entry) + "\n")


def row(case: Case, found: list[dict[str, Any]]) -> dict[str, object]:
    counts = Counter(entry["verdict"] for entry in found)
    seconds = [entry["seconds"] for entry in found]
    late = sum(not case.wrong(e["verdict"]) and e["seconds"] >= case.within_s for e in found) if case.within_s else None
    return {
        "case": case.name,
        "bound": f"{100 * case.bound:g} %",
        **{verdict.value: counts[verdict.value] for verdict in Verdict},
        "wrong": sum(case.wrong(entry["verdict"]) for entry in found),
        "of": len(found),
        "found late": "-" if late is None else late,
        "median ratio": round(float(np.median([entry["ratio"] for entry in found])), 4),
        "median s": round(float(np.median(seconds)), 1),
        "95 % within s": round(float(np.quantile(seconds, 0.95)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON lines; what is there is not done again")
    parser.add_argument("--count", type=int, default=200, help="comparisons with itself; half as many of the others")
    parser.add_argument(
        "--seeds", default="0:", help="FIRST:BEYOND, to share the work out; the outputs are joined with cat"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="cap of one comparison")
    parser.add_argument("--cases", default=",".join(CASES), help="which of them")
    parser.add_argument("--quiet-machine", action="store_true", help="without the competing load")
    arguments = parser.parse_args()
    feeds = {"x": np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    settings = {
        "cap": arguments.seconds,
        "load": not arguments.quiet_machine,
        "machine": environment(1).fingerprint,
    }
    known = [entry for entry in done_before(arguments.output) if entry["settings"] == settings]
    with tempfile.TemporaryDirectory() as folder:
        base = chain(Path(folder) / "base.onnx", PRODUCTS)
        rows = []
        for case in (CASES[name] for name in arguments.cases.split(",")):
            new = base if case.slowdown == 0 else chain(
                Path(folder) / f"{case.slowdown}.onnx", round(PRODUCTS * (1 + case.slowdown))
            )  # fmt: skip
            found = [entry for entry in known if entry["case"] == case.name]
            first, _, beyond = arguments.seeds.partition(":")
            seeds = range(max(1, round(arguments.count * case.often)))[int(first) : int(beyond) if beyond else None]
            missing = sorted(set(seeds) - {e["seed"] for e in found})
            for seed in missing:
                with contextlib.nullcontext() if arguments.quiet_machine else competing_load(seed):
                    begin = time.monotonic()
                    comparison = compare(
                        base, new, feeds, max_regression=case.bound, seconds=arguments.seconds, seed=seed
                    )
                    took = time.monotonic() - begin
                found.append(
                    {
                        "case": case.name,
                        "seed": seed,
                        "settings": settings,
                        "verdict": comparison.verdict.value,
                        "ratio": comparison.ratio.median,
                        "seconds": took,
                    }
                )
                append(arguments.output, found[-1])
                sys.stderr.write(f"{case.name} {seed}: {comparison.describe().splitlines()[0]}, {took:.1f} s\n")
            rows.append(row(case, found))
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for entry in rows:
        print("| " + " | ".join(str(entry[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()
