"""The command line. Results go to stdout, progress and notes to stderr; exit codes are those of graphopt.errors."""

from __future__ import annotations

import inspect as introspect
import json
import logging
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table
from rich.text import Text

from graphopt import __version__, errors, plugins, spec
from graphopt.bisect_command import bisect
from graphopt.ci_commands import ci, history
from graphopt.compare_command import compare
from graphopt.console import STDERR, STDOUT, ConsoleProgress, complain
from graphopt.farm_commands import farm, rpc_server
from graphopt.package_command import package
from graphopt.pipeline import PRESETS
from graphopt.report_command import report
from graphopt.settings import Settings, parse_input, read_pick, read_recipe
from graphopt.targets_command import targets
from graphopt.tuning_commands import db, tune
from graphopt.whole_files import write_whole

FORMAT = click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
THREADS = click.option("--threads", type=int, help="Threads; default: all cores.")
SEED = click.option("--seed", type=int, default=0, show_default=True)
TRUST = click.option(
    "--trust", is_flag=True, help="Load compiled libraries you did not build here: code that runs with your rights."
)
INPUT = click.option(
    "--input", "inputs", multiple=True, metavar="NAME:D0,D1,...", help="Fix the dynamic dimensions of an input."
)


def main() -> None:
    """Entry point of the `graphopt` command."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    if not verbose:  # libraries log what becomes our one line of error anyway
        logging.getLogger().addHandler(logging.NullHandler())
    interrupts = _count_interrupts()
    try:
        code = group.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = _interrupted()
    except KeyboardInterrupt:
        code = _interrupted()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - the last resort: a bug must be one line too, -v has the rest
        if verbose:
            traceback.print_exc()
        code = _interrupted() if interrupts else _failed(error)
    sys.exit(code or 0)


def _count_interrupts() -> list[int]:
    """Grows with every Ctrl-C: a KeyboardInterrupt raised within a library's callback may come out as another error."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    return received


def _failed(error: Exception) -> int:
    if isinstance(error, errors.GraphoptError):
        complain(f"error: {error}")
        return error.exit_code
    if isinstance(error, MemoryError):
        complain("error: out of memory; use fewer --calib-samples, or a machine with more memory")
    elif isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        complain(f"error: {error.strerror or error}: {error.filename or 'temporary files'}; see TMPDIR")
    elif not isinstance(error, BrokenPipeError):
        complain(f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}; -v shows where")
    return errors.EXIT_FAILURE


def _interrupted() -> int:
    complain("interrupted: no artifact was written; schedules tuned so far are kept for the next run")
    return errors.EXIT_INTERRUPTED


@click.group(name="graphopt", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="graphopt")
def group() -> None:
    """Find the fastest version of an ONNX model that is still right, and prove it.

    Exit codes: 0 done, 1 failure, 2 usage or input, 3 accuracy bound missed, 4 regression,
    5 inconclusive, 6 remote device or tracker not reached, lost, or of another version of TVM, 130 interrupted.
    """


@group.command()
@click.argument("model", required=False, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Artifact folder to write.")
@click.option("--config", type=click.Path(), help="Options from a recipe.toml; the command line overrides it.")
@click.option(
    "--target",
    help="cpu{mcpu=cascadelake}, arm{device=rpi4}, ...; several, rich to plain: a library for each. [default: cpu]",
)
@click.option("--remote", help="Run and time on a device: HOST:PORT/KEY, or tracker:HOST:PORT/KEY. See docs/farm.md.")
@click.option("--preset", help=f"Named pipeline: {', '.join(PRESETS)}. [default: exact]")
@click.option("--passes", help="Pipeline, e.g. 'simplify,quantize-int8{calibration=percentile}'.")
@click.option("--objective", type=click.Choice(["latency", "size"]), help="What the preset auto searches for.")
@click.option("--search-seconds", type=float, help="Budget of that search. [default: 900]")
@click.option("--pick", type=int, help="Make this point of the pareto.json that --config names.")
@click.option("--calib", help="Calibration data: .npz, picture folder, or `random`.")
@click.option("--calib-samples", type=int, help="Draw this many from --calib (seeded); the others are held out.")
@click.option("--eval", "eval_", help="Evaluation data; default: what --calib-samples held out.")
@click.option("--preprocess", help="For picture folders: a named preset (imagenet, ...) or a TOML file.")
@click.option("--max-drop", type=float, help="Points of top-1 (or agreement) that may be lost. [default: 1.0]")
@click.option("--min-snr", type=float, help="dB; the bound where outputs are not classes. [default: 20]")
@click.option("--metric", type=click.Choice(["auto", "snr"]), help="snr: outputs are no classes. [default: auto]")
@INPUT
@click.option(
    "--sizes",
    multiple=True,
    metavar="DIM=SIZES",
    help="Dynamic dimensions that stay dynamic: sequence=4..256, 'batch=1,8 sequence=64,128'. See docs/sizes.md.",
)
@THREADS
@click.option("--engine", type=click.Choice(["auto", "tvm", "onnxruntime"]), help="[default: auto, the fastest]")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bf16", "fp16"]),
    help="bf16, fp16: compile in 16 bits too; lossy, see `graphopt explain fp16`. [default: float32]",
)
@click.option("--tune-seconds", type=float, help="Budget of the schedule search. [default: 60]")
@click.option("--measure-seconds", type=float, help="Budget of the final paired run. [default: 15]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--overwrite", is_flag=True, default=None, help="Replace an existing artifact.")
@FORMAT
@click.option("-q", "--quiet", is_flag=True, help="No settings, progress or notes.")
@click.option("-v", "--verbose", is_flag=True, help="Every skipped node; tracebacks.")
def optimize(
    model: str | None,
    config: str | None,
    pick: int | None,
    inputs: tuple[str, ...],
    sizes: tuple[str, ...],
    format_: str,
    quiet: bool,
    verbose: bool,
    eval_: str | None,
    **options: Any,
) -> int:
    """Optimize MODEL and write the fastest version that is still right to -o OUT."""
    from graphopt import driver
    from graphopt.report.record import plain
    from graphopt.report.text import pass_line, to_text

    given = {k: v for k, v in {**options, "model": model, "eval": eval_}.items() if v is not None}
    if inputs:
        given["inputs"] = dict(parse_input(text) for text in inputs)
    if sizes:
        given["sizes"] = sizes
    settings = _settings(given, _recipe(config, pick))
    progress = ConsoleProgress(quiet)

    def echo(resolved: Settings, target: Any) -> None:
        if not quiet:
            STDERR.print(_settings_table(resolved, target))

    def told(record: Any) -> None:
        progress.note(pass_line(plain(record)))

    result = driver.run(settings, progress=progress, on_settings=echo, on_pass=told)
    report = result.report.to_dict()
    if format_ == "json":
        click.echo(json.dumps(report))
    else:
        STDOUT.print(to_text(report, details=verbose))
        if result.path is not None:
            STDOUT.print(
                f"Artifact: {result.path} (report.html has the plots, recipe.toml replays this run)", markup=False
            )
    return errors.EXIT_DONE if result.report.accuracy_met else errors.EXIT_ACCURACY


def _recipe(config: str | None, pick: int | None) -> Mapping[str, Any]:
    if pick is None:
        return read_recipe(config) if config else {}
    if config is None:
        raise errors.SpecError("--pick needs the front", hint="give --config OUT/pareto.json")
    return read_pick(config, pick)


def _settings(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> Settings:
    merged = dict(recipe)
    if "passes" in given or "preset" in given:  # either one on the command line replaces both of the recipe
        merged.pop("passes", None)
        merged.pop("preset", None)
    if "passes" in given and "preset" in given:
        raise errors.SpecError("--preset and --passes both name a pipeline", hint="give one of them")
    merged.update(given)
    if "model" not in merged:
        raise errors.SpecError("no MODEL given", hint="graphopt optimize MODEL.onnx -o OUT")
    return Settings(**merged)


def _settings_table(settings: Settings, target: Any) -> Table:
    import dataclasses

    table = Table(title="Settings", title_justify="left", title_style="bold", show_header=False)
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if f.name == "inputs":
            value = " ".join(f"{name}:{','.join(map(str, shape))}" for name, shape in value.items()) or None
        if f.name == "sizes":
            value = "; ".join(settings.sizes) or None
        table.add_row(f.name.replace("_", "-"), Text("-" if value is None else str(value)))
    for key, value in target.capabilities.describe().items():
        table.add_row(f"target: {key}", value)
    return table


@group.command()
@click.argument("models", nargs=-1, required=True, type=click.Path())
@THREADS
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Budget for the whole run.")
@click.option("--data", type=click.Path(), help="An .npz whose first sample is fed; default: seeded noise.")
@INPUT
@SEED
@TRUST
@FORMAT
@click.option("-o", "--output", type=click.Path(), help="Save raw samples here (latency.json) for `compare`.")
@click.option("--remote", help="Time compiled artifacts on a device: HOST:PORT/KEY, or tracker:HOST:PORT/KEY.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def bench(models, threads, seconds, data, inputs, seed, trust, format_, output, remote, quiet, verbose) -> int:
    """Time MODELS (ONNX files or artifacts) against each other: paired, interleaved, in one run."""
    from graphopt.benchmarking import bench_models
    from graphopt.report.formats import milliseconds, speedup

    shapes = dict(parse_input(text) for text in inputs)
    result = bench_models(models, threads, seconds, data, shapes, seed, ConsoleProgress(quiet), remote, trust)
    content = result.to_dict()
    if output:
        write_whole(Path(output), json.dumps(content) + "\n")
    if format_ == "json":
        click.echo(json.dumps(content))
        return errors.EXIT_DONE
    first = result.names[0]
    table = Table()
    for heading in ("", "median ms [95 %]", "p95 ms", f"speed against {first} [95 %]"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for name in result.names:
        stats = result.stats[name]
        ratio = result.ratio(first, name)
        table.add_row(
            name,
            milliseconds(stats.to_dict()),
            f"{1e3 * stats.p95_s:.3f}",
            "-" if name == first else speedup([ratio.median, ratio.low, ratio.high]),
        )
    STDOUT.print(table)
    return errors.EXIT_DONE


@group.command()
@click.argument("model", type=click.Path())
@click.option("--layers", is_flag=True, help="A row for each layer.")
@click.option("--against", type=click.Path(), help="Another model: operators before (MODEL) and after.")
@INPUT
@FORMAT
@click.option("-v", "--verbose", is_flag=True)
def inspect(model, layers, against, inputs, format_, verbose) -> int:
    """Operators, MACs, parameters and activation memory of MODEL (an ONNX file or an artifact)."""
    from graphopt.inspection_text import inspect_path, inspection_table, layer_table

    shapes = dict(parse_input(text) for text in inputs)
    found = [inspect_path(path, shapes) for path in (model, against) if path is not None]
    if format_ == "json":
        content = [f.to_dict() for f in found]
        click.echo(json.dumps(content[0] if len(content) == 1 else content))
        return errors.EXIT_DONE
    STDOUT.print(inspection_table(found, [str(p) for p in (model, against) if p is not None]))
    if layers:
        STDOUT.print(layer_table(found[-1]))
    return errors.EXIT_DONE


@group.command()
@click.argument("artifact", type=click.Path())
@click.option("--input", "input_", required=True, type=click.Path(), help="An .npz with one array per input.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The .npz to write.")
@THREADS
@TRUST
@click.option("-v", "--verbose", is_flag=True)
def run(artifact, input_, output, threads, trust, verbose) -> int:
    """Run ARTIFACT once on the arrays of an .npz; write its outputs as an .npz."""
    from graphopt.runtime.artifact import load

    opened = load(artifact, threads, trust)
    outputs = opened.run(_read_npz(Path(input_)))
    target = Path(output)
    staged = target.with_name(f".{target.name}.partial.npz")
    try:
        np.savez(staged, **outputs)  # pyright: ignore[reportArgumentType]
        staged.replace(target)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise errors.DataError(f"cannot write {output}: {error.strerror or error}") from error
    return errors.EXIT_DONE


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name != "labels"}
    except FileNotFoundError:
        raise errors.DataError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise errors.DataError(f"cannot read {path} as .npz: {error}") from error


@group.command(name="passes")
def list_passes() -> int:
    """All passes, with their options, and the presets."""
    table = Table(title="Passes", title_justify="left", title_style="bold")
    for heading in ("pass", "fidelity", "what it does", "options (default)"):
        table.add_column(heading, overflow="fold")
    for name in plugins.pass_names():
        try:
            each = plugins.pass_class(name)
        except errors.SpecError as error:  # a broken plugin must not hide the others
            table.add_row(name, "?", Text(str(error), style="red"), "")
            continue
        table.add_row(name, each.fidelity.name.lower(), _summary(each), Text(_options(each)))
    STDOUT.print(table)
    presets = Table(title="Presets", title_justify="left", title_style="bold", show_header=False)
    for name, passes in PRESETS.items():
        presets.add_row(name, Text(passes))
    STDOUT.print(presets)
    return errors.EXIT_DONE


@group.command()
@click.argument("name", metavar="PASS")
def explain(name: str) -> int:
    """What PASS (or `bf16` or `fp16`, the precision) does: its equation, cases, refusals, fidelity and source."""
    if name in ("bf16", "fp16"):
        from graphopt import precision

        click.echo(introspect.cleandoc(precision.__doc__ or ""))
        return errors.EXIT_DONE
    each = plugins.pass_class(spec.parse(name).name)
    module = sys.modules[each.__module__]
    click.echo(introspect.cleandoc(module.__doc__ or each.__doc__ or "not documented"))
    options = _options(each, separator="\n  ")
    click.echo(f"\nOptions:\n  {options or 'none'}")
    return errors.EXIT_DONE


def _summary(each: type) -> str:
    text = introspect.getdoc(each) or introspect.getdoc(sys.modules[each.__module__]) or ""
    return " ".join(text.split("\n\n")[0].split())


def _options(each: type, separator: str = ", ") -> str:
    import dataclasses

    texts = []
    for f in dataclasses.fields(each):
        default = spec.unbind("", each()).options.get(f.name)
        plain = spec.Spec("", {f.name: default}) if default is not None else None
        value = str(plain)[1:-1].partition("=")[2] if plain else _default(f)
        texts.append(f"{f.name}={value}")
    return separator.join(texts)


def _default(f: Any) -> str:
    import dataclasses

    value = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else "none" if value is None else str(value)


@group.command()
@FORMAT
def doctor(format_: str) -> int:
    """What this machine and each target can do here, and what is missing."""
    from graphopt.diagnosis import diagnose

    rows = diagnose()
    if format_ == "json":
        click.echo(json.dumps([{"what": r.what, "ok": r.ok, "detail": r.detail, "remedy": r.remedy} for r in rows]))
        return errors.EXIT_DONE
    table = Table(show_header=False)
    for row in rows:
        mark = Text("ok", style="green") if row.ok else Text("missing", style="red")
        table.add_row(mark, row.what, Text(row.detail + (f"; {row.remedy}" if row.remedy and not row.ok else "")))
    STDOUT.print(table)
    return errors.EXIT_DONE


group.add_command(compare)
group.add_command(ci)
group.add_command(history)
group.add_command(bisect)
group.add_command(tune)
group.add_command(db)
group.add_command(report)
group.add_command(package)
group.add_command(targets)
group.add_command(farm)
group.add_command(rpc_server)


if __name__ == "__main__":
    main()
