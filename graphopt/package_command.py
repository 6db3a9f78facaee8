"""`graphopt package`: an artifact as a folder for machines without graphopt."""

from __future__ import annotations

import json

import click
from rich.table import Table

from graphopt import errors
from graphopt.console import STDOUT

RUNTIMES = ("cpp", "python", "c-static")


@click.command(name="package")
@click.argument("artifact", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), help="Package folder to write.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="cpp",
    show_default=True,
    help="cpp: TVM's runtime and graphopt/runner.h; python: one module for numpy and apache-tvm-ffi; "
    "c-static: one static executable.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing package.")
@click.option(
    "--trust", is_flag=True, help="For c-static: run the artifact's library though you did not build it here."
)
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", is_flag=True)
def package(artifact, output, runtime, overwrite, trust, format_, verbose) -> int:
    """Pack ARTIFACT for a machine without graphopt: model, runtime, interface, example; sizes are printed."""
    from graphopt.packaging import package as pack

    packed = pack(artifact, output, runtime, overwrite, trust)
    described = packed.description
    if format_ == "json":
        click.echo(json.dumps(described))
        return errors.EXIT_DONE
    table = Table(title=f"Package {packed.path}", title_justify="left", title_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    headers = sum(
        size for name, size in described["files"].items() if name.startswith(("include/tvm", "include/dlpack"))
    )
    for name, size in described["files"].items():
        if not name.startswith(("include/tvm", "include/dlpack")):
            table.add_row(name, f"{size:,}")
    if headers:
        table.add_row("include/: headers of apache-tvm-ffi and dlpack", f"{headers:,}")
    table.add_row("together", f"{described['total_bytes']:,}")
    STDOUT.print(table)
    if described["arch"] is None:
        STDOUT.print(
            "ONNX Runtime was measured fastest for this model, so the package has it run the model.", markup=False
        )
    else:
        where = f"For {described['arch']}, {described['target']}; {runtime}."
        checked = described.get("checked")
        STDOUT.print(f"{where} Checked: {checked}." if checked else where, markup=False)
    return errors.EXIT_DONE
