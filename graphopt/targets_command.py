"""`graphopt targets`: what can be compiled for, and what each processor can do."""

from __future__ import annotations

import json

import click
from rich.table import Table

from graphopt import errors, plugins
from graphopt.arm_cores import ARM_FEATURES, BOARDS
from graphopt.capabilities import (
    X86_FEATURES,
    Capabilities,
    arm_capabilities,
    gpu_capabilities,
    host_arch,
    x86_capabilities,
)
from graphopt.console import STDOUT
from graphopt.gpu_names import ARCHITECTURES, GPUS

FORMAT = click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)


def known_processors() -> dict[str, Capabilities]:
    """By what `--target` calls them."""
    x86 = {f"cpu{{mcpu={name}}}": x86_capabilities(features) for name, features in X86_FEATURES.items()}
    cores = {f"arm{{mcpu={name}}}": arm_capabilities(features) for name, features in ARM_FEATURES.items()}
    boards = {f"arm{{device={name}}}": arm_capabilities(ARM_FEATURES[b.core]) for name, b in BOARDS.items()}
    families = {
        f"cuda{{arch={name}}}": gpu_capabilities(host_arch(), each.features) for name, each in ARCHITECTURES.items()
    }
    cards = {
        f"cuda{{device={name}}}": gpu_capabilities(each.host or host_arch(), ARCHITECTURES[each.arch].features)
        for name, each in GPUS.items()
    }
    return {**x86, **cores, **boards, **families, **cards}


@click.command(name="targets")
@FORMAT
def targets(format_: str) -> int:
    """All targets, the processors they know by name, and what these can do."""
    processors = known_processors()
    if format_ == "json":
        rows = {name: {**c.describe(), "features": sorted(c.features)} for name, c in processors.items()}
        click.echo(json.dumps({"targets": plugins.target_names(), "processors": rows}))
        return errors.EXIT_DONE
    table = Table(title=f"Targets: {', '.join(plugins.target_names())}", title_justify="left", title_style="bold")
    for heading in ("target", "float32 lanes", "int8 dot product", "recipe", "extensions"):
        table.add_column(heading, overflow="fold")
    for name, each in processors.items():
        said = each.describe()
        table.add_row(
            name,
            said["float32 lanes"],
            said["int8 dot product"],
            said["quantization recipe"],
            " ".join(sorted(each.features)),
        )
    STDOUT.print(table)
    for name, board in BOARDS.items():
        STDOUT.print(f"arm{{device={name}}}: {board.what}; {board.cores} x {board.core}", markup=False, highlight=False)
    for name, card in GPUS.items():
        STDOUT.print(
            f"cuda{{device={name}}}: {card.what}; {card.multiprocessors} multiprocessors, {card.arch}",
            markup=False,
            highlight=False,
        )
    for name, each in ARCHITECTURES.items():
        STDOUT.print(
            f"cuda{{arch={name}}}: {each.family}; {each.registers} registers and {each.shared_bytes >> 10} KB of "
            "shared memory a multiprocessor",
            markup=False,
            highlight=False,
        )
    STDOUT.print("`cpu` alone is this machine's processor.", markup=False, highlight=False)
    return errors.EXIT_DONE
