"""`graphopt tune` and `graphopt db`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from graphopt import errors
from graphopt.console import STDOUT, ConsoleProgress
from graphopt.settings import parse_input

if TYPE_CHECKING:
    pass

FORMAT = click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
TARGET = click.option("--target", default="cpu", show_default=True, help="E.g. cpu, cpu{mcpu=cascadelake}.")
THREADS = click.option("--threads", type=int, help="Threads; default: all cores.")
PRECISION = click.option(
    "--precision", type=click.Choice(["float32", "bf16", "fp16"]), help="What images and weights are stored as."
)
INPUT = click.option(
    "--input", "inputs", multiple=True, metavar="NAME:D0,D1,...", help="Fix the dynamic dimensions of an input."
)
DATABASE = click.option(
    "--database", type=click.Path(path_type=Path), help="A schedule database; default: the user's own."
)
ISA = click.option("--isa", multiple=True, help="Only this instruction-set class, e.g. avx512-amx; may be repeated.")
MODEL = click.option("--model", "models", multiple=True, type=click.Path(), help="Only kernels of this model.")


@click.command()
@click.argument("model", type=click.Path())
@TARGET
@THREADS
@PRECISION
@INPUT
@click.option("--tune-seconds", type=float, default=60.0, show_default=True, help="Budget of the search.")
@click.option("--fresh", is_flag=True, help="Search again what the database knows.")
@DATABASE
@click.option("--remote", help="Time on a device: HOST:PORT/KEY, or all of a tracker's key: tracker:HOST:PORT/KEY.")
@click.option("--seed", type=int, default=0, show_default=True)
@FORMAT
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def tune(
    model: str,
    target: str,
    threads: int | None,
    precision: str | None,
    inputs: tuple[str, ...],
    tune_seconds: float,
    fresh: bool,
    database: Path | None,
    remote: str | None,
    seed: int,
    format_: str,
    quiet: bool,
    verbose: bool,
) -> int:
    """Search schedules for the kernels of MODEL and keep them for later runs of `optimize`.

    Ctrl-C keeps the best so far, and the next run goes on from there.
    """
    from graphopt.tuning import resolve_target, tune_model

    found = tune_model(
        model,
        resolve_target(target, threads, precision),
        tune_seconds,
        shapes=dict(parse_input(text) for text in inputs),
        database=database,
        seed=seed,
        fresh=fresh,
        remote=remote,
        progress=ConsoleProgress(quiet),
    )
    if format_ == "json":
        click.echo(json.dumps(found.to_dict()))
        return errors.EXIT_DONE
    report = found.report
    STDOUT.print(counted_table(found.to_dict()) if report.unit == "instructions" else kernel_table(found.to_dict()))
    early = "; time ran out before all searches had ended: run again to go on" if report.stopped_early else ""
    if report.unit == "instructions":
        total = sum(row["instructions"] * row["calls"] for row in report.rows)
        STDOUT.print(
            f"{total / 1e6:.2f} million instructions in kernels for a run of the model; {report.trials} rounds of "
            f"candidates in {report.seconds:.1f} s"
            + ("; time ran out before all had been tried" if report.stopped_early else ""),
            soft_wrap=True,
        )
        return errors.EXIT_DONE
    STDOUT.print(
        f"{report.kernels_us / 1e3:.3f} ms in kernels for a run of the model; {report.from_database} of {report.tasks} "
        f"kernels were known, {report.trials} trials in {report.seconds:.1f} s{early}",
        soft_wrap=True,
    )
    for line in device_lines(found.to_dict()):
        STDOUT.print(line, markup=False, soft_wrap=True)
    return errors.EXIT_DONE


def device_lines(report: Mapping[str, Any]) -> list[str]:
    """What remote devices did in a search (its JSON), and which were lost; none where this machine timed."""
    trials = report.get("devices") or {}
    done = ", ".join(f"{where} {count}" for where, count in sorted(trials.items()))
    lost = [f"lost {loss}; its trial was repeated" for loss in report.get("losses") or ()]
    return [*([f"trials by device: {done}"] if done else []), *lost]


def kernel_table(report: Mapping[str, Any]) -> Table:
    """The kernels of a tuning report (its JSON), those that take most of a run first."""
    table = Table()
    for heading in ("kernel", "template", "decision"):
        table.add_column(heading, overflow="fold")
    for heading in ("calls", "time µs", "share", "GFLOP/s", "of peak", "trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = sum((row["time_us"] or 0.0) * row["calls"] for row in report["rows"])
    for row in sorted(report["rows"], key=lambda r: -(r["time_us"] or 0.0) * r["calls"]):
        time, share = row["time_us"], row.get("share_of_peak")
        table.add_row(
            Text(row["workload"]),
            row["template"],
            Text(_decision(row["decision"])),
            str(row["calls"]),
            "-" if time is None else f"{time:.1f}",
            "-" if time is None or not total else f"{100 * time * row['calls'] / total:.1f} %",
            "-" if row["gflops"] is None else f"{row['gflops']:.1f}",
            "-" if share is None else f"{100 * share:.0f} %",
            "known" if row["from_database"] else str(row["trials"]),
        )
    return table


def counted_table(report: Mapping[str, Any]) -> Table:
    """The same where instructions were counted in the emulator instead of times; "of peak" is in llvm-mca's model."""
    table = Table()
    for heading in ("kernel", "template", "decision"):
        table.add_column(heading, overflow="fold")
    for heading in ("calls", "instructions", "share", "llvm-mca cycles", "of peak by llvm-mca", "trials"):
        table.add_column(heading, justify="right", overflow="fold")
    total = sum(row["instructions"] * row["calls"] for row in report["rows"])
    for row in sorted(report["rows"], key=lambda r: -r["instructions"] * r["calls"]):
        cycles, share = row["model_cycles"], row["share_of_peak"]
        table.add_row(
            Text(row["workload"]),
            row["template"],
            Text(_decision(row["decision"])),
            str(row["calls"]),
            str(row["instructions"]),
            f"{100 * row['instructions'] * row['calls'] / max(total, 1):.1f} %",
            "-" if cycles is None else str(cycles),
            "-" if share is None else f"{100 * share:.0f} %",
            "known" if row["from_database"] else str(row["trials"]),
        )
    return table


def _decision(decision: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in decision.items()) or "-"


@click.group()
def db() -> None:
    """The schedule database: what it holds, merging, and taking parts of it elsewhere."""


@db.command()
@click.argument("databases", nargs=-1, type=click.Path(path_type=Path))
@ISA
@MODEL
@TARGET
@THREADS
@PRECISION
@INPUT
@FORMAT
@click.option("-v", "--verbose", is_flag=True)
def show(databases, isa, models, target, threads, precision, inputs, format_, verbose) -> int:
    """The records of DATABASES; default: those that a run here would use, the user's own and the shipped ones."""
    records = _selected(databases, isa, models, target, threads, precision, inputs)
    ordered = sorted(records.items(), key=lambda pair: (pair[0].isa, pair[0].threads, -pair[1].time_us))
    if format_ == "json":
        click.echo(json.dumps([{**dataclasses.asdict(k), **dataclasses.asdict(r)} for k, r in ordered]))
        return errors.EXIT_DONE
    table = Table()
    for heading in (
        "workload", "kernel", "instruction set", "device", "threads", "template", "decision", "time µs", "trials",
    ):  # fmt: skip
        right = heading in ("threads", "time µs", "trials")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for key, record in ordered:
        trials = str(record.trials) if record.complete else f"{record.trials}, unfinished"
        table.add_row(
            key.workload[:12],
            Text(record.kernel),
            key.isa,
            Text(record.measured_on or key.device or "-"),
            str(key.threads),
            f"{record.template} {record.version}",
            Text(_decision(record.decision)),
            f"{record.time_us:.1f}",
            trials,
        )
    STDOUT.print(table)
    STDOUT.print(f"{len(ordered)} records")
    return errors.EXIT_DONE


@db.command()
@click.argument("databases", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The database to write.")
@click.option("-v", "--verbose", is_flag=True)
def merge(databases, output, verbose) -> int:
    """Merge DATABASES into one: for each kernel a finished search before an unfinished one, then the faster one."""
    from graphopt.targets.tuning import database

    found = database.merged(_read(path) for path in databases)
    database.write(output, found)
    STDOUT.print(f"{len(found)} records in {output}", markup=False, soft_wrap=True)
    return errors.EXIT_DONE


@db.command()
@click.argument("databases", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The database to write.")
@ISA
@MODEL
@TARGET
@THREADS
@PRECISION
@INPUT
@click.option("-v", "--verbose", is_flag=True)
def export(databases, output, isa, models, target, threads, precision, inputs, verbose) -> int:
    """Write a compact database of finished searches, of some instruction sets or models, to take elsewhere."""
    from graphopt.targets.tuning import database

    records = _selected(databases, isa, models, target, threads, precision, inputs)
    complete = {key: dataclasses.replace(record, tried=()) for key, record in records.items() if record.complete}
    database.write(output, complete)
    left = len(records) - len(complete)
    note = f"; {left} unfinished left out" if left else ""
    STDOUT.print(f"{len(complete)} records in {output}{note}", markup=False, soft_wrap=True)
    return errors.EXIT_DONE


def _selected(databases, isa, models, target, threads, precision, inputs) -> dict[Any, Any]:
    from graphopt.schedule_database import database_path
    from graphopt.targets.tuning import database
    from graphopt.tuning import model_keys, resolve_target, select

    if databases:
        records = database.merged(_read(path) for path in databases)
    else:
        records = database.Database(database_path()).everything()
    keys = None
    if models:
        resolved = resolve_target(target, threads, precision)
        shapes = dict(parse_input(text) for text in inputs)
        keys = {key for path in models for key in model_keys(path, resolved, shapes)}
    return select(records, isa, keys)


def _read(path: Path) -> dict[Any, Any]:
    from graphopt.targets.tuning import database

    if not path.exists():
        raise errors.DataError(f"no such file: {path}")
    found, skipped = database.read(path)
    if skipped and not found:
        raise errors.DataError(f"{path} is no schedule database: none of its {skipped} lines is a record")
    return found
