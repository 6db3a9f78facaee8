"""`graphopt report`: what an artifact's run found, and where the time of its compiled model goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from graphopt import errors
from graphopt.artifact_writer import REPORT
from graphopt.console import STDOUT
from graphopt.report.text import to_text
from graphopt.report.text_layers import layer_table
from graphopt.tuning_commands import kernel_table


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="The kernels of every compiled candidate.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", is_flag=True)
def report(artifact: Path, everything: bool, format_: str, verbose: bool) -> int:
    """The report of ARTIFACT: its layers in 8 bits and in float, and its kernels: time, GFLOP/s and share of peak.

    Kernels are those of the delivered candidate, if it was compiled.
    """
    found = _read(artifact)
    if format_ == "json":
        click.echo(json.dumps(found))
        return errors.EXIT_DONE
    STDOUT.print(to_text(found, details=verbose))
    layers = layer_table(found)
    if layers is not None:
        STDOUT.print(layers)
    delivered = (found.get("choice") or {}).get("candidate")
    for candidate in found.get("candidates") or ():
        tuning = candidate.get("tuning")
        if not tuning or not tuning.get("rows") or not (everything or candidate["name"] == delivered):
            continue
        STDOUT.print(f"Kernels of {candidate['name']}", style="bold")
        STDOUT.print(kernel_table(tuning))
        peaks = ", ".join(f"{kind} {value:.0f}" for kind, value in (tuning.get("peaks") or {}).items())
        if peaks:
            STDOUT.print(f"Peak of one core, GFLOP/s: {peaks}", markup=False)
    return errors.EXIT_DONE


def _read(artifact: Path) -> dict[str, Any]:
    file = artifact / REPORT
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise errors.ArtifactError(f"{artifact} has no {REPORT}", hint="give a folder that optimize wrote") from None
    except (OSError, ValueError) as error:
        raise errors.ArtifactError(f"cannot read {file}: {error}") from error
