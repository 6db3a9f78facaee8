#!/usr/bin/env python3
"""Tune a list of models and write the schedules that the package ships.

    python benchmarks/ship_schedules.py MODEL.onnx... [--threads 1,2] [--precision float32,bf16] [--tune-seconds 120]
        [--work schedules.work.jsonl] [--output graphopt/targets/tuning/data]

Each model is tuned for every thread count and precision, `--tune-seconds` at most each, into the work database; what it
or the shipped records already know costs nothing, so an interrupted run goes on where it was. Then the finished
searches are merged with those already shipped and written, one file for each instruction-set class. Records of
templates that have changed since are dropped. `--export-only` skips the tuning; `--fresh` searches again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from graphopt.errors import GraphoptError
from graphopt.settings import parse_input
from graphopt.targets import schedules
from graphopt.targets.schedules import generic
from graphopt.targets.tuning import database
from graphopt.targets.tuning.database import Key, Record
from graphopt.tuning import resolve_target, tune_model


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--input", action="append", default=[], help="NAME:D0,D1,...; for every model that has it")
    parser.add_argument("--tune-seconds", type=float, default=120.0)
    parser.add_argument("--work", type=Path, default=Path("schedules.work.jsonl"))
    parser.add_argument("--output", type=Path, default=database.SHIPPED)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()
    failures = 0
    for model in [] if arguments.export_only else arguments.models:
        for precision in arguments.precision.split(","):
            for threads in arguments.threads.split(","):
                failures += not tuned(model, int(threads), precision, arguments)
    written = ship(arguments.work, arguments.output)
    for path, count, size in written:
        print(f"{path}: {count} records, {size / 1024:.0f} KB")
    return 1 if failures else 0


def tuned(model: str, threads: int, precision: str, arguments: argparse.Namespace) -> bool:
    """Tune one model; False, and a line that says why, where that failed."""
    begin = time.perf_counter()
    name = f"{Path(model).stem:24s} {precision:8s} {threads} thread(s)"
    try:
        target = resolve_target("cpu", threads, None if precision == "float32" else precision)
        shapes = dict(parse_input(text) for text in arguments.input)
        found = tune_model(
            model, target, arguments.tune_seconds, shapes=shapes, database=arguments.work, fresh=arguments.fresh
        ).report
    except GraphoptError as error:
        print(f"{name} {type(error).__name__}: {error}", flush=True)
        return False
    early = ", not finished" if found.stopped_early else ""
    print(
        f"{name} {found.kernels_us / 1e3:9.3f} ms in kernels; {found.from_database} of {found.tasks} known, "
        f"{found.trials} trials, {time.perf_counter() - begin:.0f} s{early}",
        flush=True,
    )
    return True


def ship(work: Path, folder: Path) -> list[tuple[Path, int, int]]:
    """Write the finished, current records of the work database over those in `folder`; what was written."""
    shipped = [database.read(path)[0] for path in sorted(folder.glob("*.jsonl"))]
    fresh = database.read(work)[0] if work.exists() else {}
    known = {key: record for records in shipped for key, record in records.items()}
    found = {key: compact(record) for key, record in {**known, **finished(fresh, known)}.items() if current(record)}
    written = []
    for isa in sorted({key.isa for key in found}):
        path = folder / f"{isa}.jsonl"
        records = {key: record for key, record in found.items() if key.isa == isa}
        database.write(path, records)
        written.append((path, len(records), path.stat().st_size))
    return written


def finished(fresh: dict[Key, Record], known: dict[Key, Record]) -> dict[Key, Record]:
    """Records worth shipping: finished ones, and unfinished ones where there is no better."""
    return {
        key: record
        for key, record in fresh.items()
        if has_choice(record)
        and (record.complete or key not in known or not current(known[key]) or not known[key].complete)
    }


def has_choice(record: Record) -> bool:
    """False for kernels that have one schedule only: nobody looks those up."""
    return record.template != generic.NAME or bool(record.decision)


def current(record: Record) -> bool:
    versions = {t.NAME: t.VERSION for t in (*schedules.TEMPLATES, generic)}
    return versions.get(record.template) == record.version and record.tvm == database.compiler_version()


def compact(record: Record) -> Record:
    """Without what only this machine's next search would use; the time to three digits that mean something."""
    return dataclasses.replace(record, time_us=float(f"{record.time_us:.4g}"))


if __name__ == "__main__":
    sys.exit(main())
