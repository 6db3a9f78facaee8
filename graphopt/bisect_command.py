"""`graphopt bisect`: which pass, and which layer's setting, broke a recipe."""

from __future__ import annotations

import json

import click
from rich.table import Table
from rich.text import Text

from graphopt import errors
from graphopt.ci.figures import fraction
from graphopt.console import STDERR, STDOUT, ConsoleProgress
from graphopt.settings import Settings, parse_input, read_recipe


@click.command()
@click.argument("model", required=False, type=click.Path())
@click.option("--config", type=click.Path(), help="A recipe.toml; the command line overrides it.")
@click.option("--passes", help="Pipeline; default: the recipe's, or that of --preset.")
@click.option("--preset", help="Named pipeline.")
@click.option("--calib", help="Calibration data.")
@click.option("--calib-samples", type=int, help="Draw this many from --calib; the others are held out.")
@click.option("--eval", "eval_", help="Evaluation data.")
@click.option("--preprocess", help="For picture folders: a named preset or a TOML file.")
@click.option("--max-drop", type=float, help="Points that may be lost. [default: 1.0]")
@click.option("--min-snr", type=float, help="dB; where outputs are not classes. [default: 20]")
@click.option("--speed", is_flag=True, help="Look for what made it slower than MODEL in ONNX Runtime.")
@click.option("--max-regression", default="5%", show_default=True, help="With --speed: how much slower is bad.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="With --speed: at most, a trial.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--no-layers", is_flag=True, help="Find the pass only.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME:D0,D1,...", help="Fix the dynamic dimensions of an input."
)
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def bisect(
    model, config, eval_, speed, max_regression, seconds, threads, no_layers, inputs, format_, quiet, verbose, **given
) -> int:
    """Find by halves which pass of a recipe broke accuracy (or, with --speed, speed), and which layer's setting in it.

    Exit 0: nothing is broken. 4: found. 1: MODEL is outside the bound by itself.
    """
    from graphopt.ci import bisect as halves
    from graphopt.driver import prepare
    from graphopt.pipeline import Pipeline

    options = dict(read_recipe(config)) if config else {}
    if given.get("passes") or given.get("preset"):
        options.pop("passes", None)
        options.pop("preset", None)
    options.update({k: v for k, v in {**given, "model": model, "eval": eval_}.items() if v is not None})
    if inputs:
        options["inputs"] = dict(parse_input(text) for text in inputs)
    if "model" not in options:
        raise errors.SpecError("no MODEL given", hint="graphopt bisect MODEL.onnx --config recipe.toml")
    settings = Settings(**{**options, "output": None, "objective": None}).resolved()
    progress = ConsoleProgress(quiet)
    source, data, context, judge = prepare(settings, progress)
    if speed:
        test = halves.speed_test(
            source.path, data.samples[0], fraction(max_regression, "--max-regression"), threads, seconds, settings.seed
        )
    else:
        test = halves.accuracy_test(judge)

    def told(trial: halves.Trial) -> None:
        progress.note(f"{trial.what}: {'bad' if trial.finding.bad else 'good'}, {trial.finding.told}")

    found = halves.bisect(
        source.model,
        Pipeline.parse(settings.pipeline_text()),
        context,
        test,
        layers=not no_layers,
        on_trial=told,
    )
    if format_ == "json":
        click.echo(json.dumps(found.to_dict()))
    else:
        table = Table()
        for heading in ("", "trial", "found"):
            table.add_column(heading, overflow="fold")
        for trial in found.trials:
            mark = Text("bad", style="red") if trial.finding.bad else Text("good", style="green")
            table.add_row(mark, Text(trial.what), Text(trial.finding.told))
        STDOUT.print(table)
        if found.guilty is not None:
            STDOUT.print(f"Broken by pass {found.position}: {found.guilty}", markup=False, soft_wrap=True)
        if found.setting is not None:
            STDOUT.print(f"There, by {found.setting}", markup=False, soft_wrap=True)
    for note in found.notes:
        STDERR.print(note, markup=False)
    if found.guilty is not None:
        return errors.EXIT_REGRESSION
    return errors.EXIT_FAILURE if found.trials[-1].what == "no pass" else errors.EXIT_DONE
