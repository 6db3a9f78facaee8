"""`graphopt compare`: the gate, for one pair."""

from __future__ import annotations

import json

import click
from rich.table import Table
from rich.text import Text

from graphopt import errors
from graphopt.ci.figures import KINDS, Bounds, Row, parse_bounds
from graphopt.ci.judged import cell, change, judge
from graphopt.console import STDOUT, ConsoleProgress
from graphopt.measure import Leniency
from graphopt.settings import parse_input


def _bounds(command):
    for kind in reversed(KINDS):
        command = click.option(f"--{kind.option}", metavar="BOUND", help=f"Of NEW's {kind.title}.")(command)
    return command


@click.command()
@click.argument("base", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--max-regression", default="5%", show_default=True, help="How much slower NEW may be.")
@_bounds
@click.option("--data", type=click.Path(), help="Evaluation data: accuracy of both, through their engines.")
@click.option("--preprocess", help="For picture folders: a named preset (imagenet, ...) or a TOML file.")
@click.option("--max-drop", type=float, help="Points of top-1 (or agreement with BASE) that may be lost on --data.")
@click.option("--min-snr", type=float, default=20.0, show_default=True, help="dB; where outputs are not classes.")
@click.option("--figures", is_flag=True, help="Show figures without a bound too (all but instructions).")
@click.option("--no-time", is_flag=True, help="Only what needs no quiet machine.")
@click.option("--any-versions", is_flag=True, help="Saved figures: versions of packages may differ.")
@click.option("--normalise", is_flag=True, help="Saved figures of two machines: by reference kernels timed on both.")
@click.option("--fail-normalised", is_flag=True, help="Let normalised figures fail the gate.")
@click.option("--threads", type=int, help="Threads; default: all cores.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="At most this long; stops when clear.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME:D0,D1,...", help="Fix the dynamic dimensions of an input."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--trust", is_flag=True, help="Load compiled libraries that were not built here: docs/security.md.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def compare(base, new, max_regression, threads, seconds, inputs, seed, format_, quiet, verbose, **options) -> int:
    """The CI gate: is NEW slower than BASE, or beyond another bound? Exit 0 no, 4 yes, 5 cannot tell.

    BASE and NEW are ONNX files, artifacts, or (both) saved latency.json files. A BOUND is 5% (growth over BASE), +3
    (more than BASE) or 2MB (at most). See docs/ci.md.
    """
    bounds = read_bounds(max_regression, options)
    if bounds.max_drop is not None and options["data"] is None:
        raise errors.SpecError("--max-drop needs evaluation data", hint="give --data DATA")
    saved = base.endswith(".json") or new.endswith(".json")
    if saved and (bounds.figures or options["data"] or options["no_time"]):
        raise errors.SpecError("saved figures hold times only", hint="give the models themselves")
    judged = judge(
        base,
        new,
        bounds,
        timed=not options["no_time"],
        show=options["figures"] or options["no_time"],
        data=options["data"],
        preprocess=options["preprocess"],
        threads=threads,
        seconds=seconds,
        shapes=dict(parse_input(text) for text in inputs),
        seed=seed,
        progress=ConsoleProgress(quiet),
        trust=options["trust"],
        leniency=Leniency(options["any_versions"], options["normalise"], options["fail_normalised"]),
    )
    if format_ == "json":
        click.echo(json.dumps(judged.to_dict()))
        return judged.exit_code
    if judged.comparison is not None:
        STDOUT.print(judged.comparison.describe(), markup=False, soft_wrap=True)
    if judged.rows:
        STDOUT.print(figure_table(judged.rows))
    return judged.exit_code


def read_bounds(max_regression: str, options) -> Bounds:
    """From the options of a command. Raises SpecError."""
    keys = [*(kind.option for kind in KINDS), "max-drop", "min-snr"]
    given = {key: options.get(key.replace("-", "_")) for key in keys}
    return parse_bounds(
        {"max-regression": max_regression, **{k: v for k, v in given.items() if v is not None}}, "compare"
    )


def figure_table(rows: tuple[Row, ...]) -> Table:
    """A row a figure."""
    table = Table()
    for heading in ("", "base", "new", "change", "bound", "", "note"):
        table.add_column(heading, justify="right" if heading in ("base", "new", "change") else "left", overflow="fold")
    styles = {"over": "red", "unknown": "yellow", "within": "green"}
    for row in rows:
        state = Text({"shown": ""}.get(row.state, row.state), style=styles.get(row.state, ""))
        table.add_row(row.title, cell(row, row.base), cell(row, row.new), change(row), row.bound, state, Text(row.note))
    return table
