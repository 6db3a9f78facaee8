#!/usr/bin/env python3
"""Every kernel's candidates on a GPU: are they right, how fast are they, and how good is the rule that orders them?

    python benchmarks/gpu/tile_sweep.py MODEL.onnx ... [--batches 1,8] [--precision float16] [--first 16] [--others 8]
        [--jobs 14] [--seconds 400] [--seed 0] [--out OUT]

Of each matrix product of the models: the decisions that the rule (`schedules/cuda/tiles.py`) puts first, and others
drawn from the rest. Compiled in `--jobs` processes (what is not after `--seconds` is left away), then timed one after
the other, and the results compared with those of TVM's own rules (`floor`). Prints a product a row: what the rule's
first takes, the fastest, and which that is. Writes OUT/tiles.json, a line a candidate, to fit the rule's constants to,
and records the fastest in OUT/schedules.jsonl, a schedule database. Exit code 1: a candidate computes something else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from graphopt.errors import TargetError
from graphopt.targets.cuda import Cuda
from graphopt.targets.schedules import cuda
from graphopt.targets.schedules.cuda import floor, tensor_cores
from graphopt.targets.schedules.cuda.products import Product, product_of
from graphopt.targets.tuning.database import Database, Key, Record, compiler_version
from graphopt.targets.tuning.gpu_timing import Candidates, compile_candidates, values
from graphopt.targets.tuning.signature import workload_digest

TOLERANCE = 4 * 2.0**-10
"""Of the largest output: four roundings to float16; see tests/targets/test_cuda_tensor_cores.py."""


def products(path: Path, batch: int, target: Cuda):
    """(digest, workload, its name) of each product of a model. float32 is the precision of an INT8 model."""
    model = common.with_batch(path, batch)
    if target.precision == "float32":
        model = common.quantized(model, path, target)
    lowered = target.lower(model)
    for name, workload in target.workloads(lowered).items():
        if product_of(workload) is not None and tensor_cores.match(workload):
            yield workload_digest(workload), workload, name


def compile_job(number: int, path: Path, batch: int, target: Cuda, name: str, decisions, folder: Path):
    """In a process of its own, which has no GPU: a workload cannot be sent, so it is made anew."""
    for _, workload, found in products(path, batch, target):
        if found == name:
            choices = [cuda.Choice(floor.NAME, {}), *(cuda.Choice(tensor_cores.NAME, d) for d in decisions)]
            made = compile_candidates(workload, choices, target, folder)
            return number, made
    raise AssertionError(name)


def outputs(candidates: Candidates, product: Product) -> list[np.ndarray]:
    """What each candidate computes of the same inputs; the first is TVM's own, which takes the weight as it is."""
    import tvm
    from tvm import relax, runtime

    device: Any = tvm.cuda(0)
    library: Any = tvm.runtime.load_module(str(candidates.library))
    machine: Any = relax.VirtualMachine(library, device)
    rng = np.random.default_rng(0)
    feeds = [values(rng, shape, dtype) for shape, dtype in candidates.parameters[0]]
    found = []
    for index, parameters in enumerate(candidates.parameters):
        own = list(feeds)
        if index:
            own[product.weight_index] = product.transposed(
                feeds[product.weight_index], *parameters[product.weight_index][0]
            )
        made = machine[f"run_{index}"](*(runtime.tensor(each, device) for each in own))
        found.append(np.asarray(made.numpy(), np.float64))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--batches", default="1")
    parser.add_argument("--precision", default="float16", choices=["float16", "float32"], help="float32: INT8")
    parser.add_argument("--first", type=int, default=16)
    parser.add_argument("--others", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("gpu-checks"))
    arguments = parser.parse_args()
    common.require_gpu()
    begun, rng = time.monotonic(), random.Random(arguments.seed)
    here = Cuda()
    target = Cuda(arch=here.gpu_arch, precision=arguments.precision, sms=here.multiprocessors)
    arguments.out.mkdir(parents=True, exist_ok=True)
    database = Database(arguments.out / "schedules.jsonl")
    seen, jobs = set(), []
    for path in arguments.models:
        for batch in map(int, common.parse_list(arguments.batches)):
            for digest, workload, name in products(path, batch, target):
                space = tensor_cores.match(workload) or []
                if digest not in seen:
                    seen.add(digest)
                    rest = space[arguments.first :]
                    drawn = rng.sample(rest, min(arguments.others, len(rest)))
                    decisions = space[: arguments.first] + drawn
                    jobs.append((path, batch, name, product_of(workload), decisions, len(space), digest))
    print(f"{len(jobs)} products, {time.monotonic() - begun:.0f} s", flush=True)
    wrong = 0
    with (
        tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(arguments.jobs) as pool,
        (arguments.out / "tiles.json").open("a") as log,
    ):  # fmt: skip
        waiting = []
        for number, (path, batch, name, _, decisions, *_) in enumerate(jobs):
            folder = Path(work) / str(number)
            folder.mkdir()
            waiting.append(pool.submit(compile_job, number, path, batch, target, name, decisions, folder))
        compiled = []
        try:
            for done in as_completed(waiting, timeout=max(arguments.seconds - (time.monotonic() - begun), 1)):
                try:
                    compiled.append(done.result())
                except TargetError as error:
                    print(f"refused: {error}", flush=True)
                    wrong += 1
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
        print(f"{len(compiled)} of them compiled, {time.monotonic() - begun:.0f} s", flush=True)
        for number, made in compiled:  # now that nothing else runs
            path, batch, name, product, decisions, size, digest = jobs[number]
            times, found = made.time_here(), outputs(made, product)
            limit = TOLERANCE * float(np.abs(found[0]).max())
            errors = [float(np.abs(each - found[0]).max()) for each in found]
            bad = [d for d, e in zip(decisions, errors[1:], strict=True) if not e <= limit]
            wrong += len(bad)
            for decision, us, error in zip(decisions, times[1:], errors[1:], strict=True):
                fields = {k: v for k, v in vars(product).items() if not k.endswith("_index")}
                log.write(json.dumps({"model": path.stem, "batch": batch, "kernel": name, "product": fields,
                                      "decision": decision, "us": us, "error": error}) + "\n")  # fmt: skip
            timed = [(us, i) for i, us in enumerate(times[1:]) if isinstance(us, float)]
            if not timed:
                print(f"{path.stem} {batch} {name}: none ran: {times[1]}", flush=True)
                continue
            best, at = min(timed)
            database.add(
                Key(digest, target.gpu_arch, target.multiprocessors),
                Record(tensor_cores.NAME, tensor_cores.VERSION, dict(decisions[at]), best, len(timed), True, name,
                       tvm=compiler_version()),
            )  # fmt: skip
            print(f"{path.stem} {batch} {name}: {product.rows}x{product.columns}x{product.depth} first {times[1]:.1f} "
                  f"us, fastest {best:.1f} (number {at} of {size}: {' '.join(map(str, decisions[at].values()))})"
                  f"{f' WRONG: {bad[0]}' if bad else ''}", flush=True)  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
