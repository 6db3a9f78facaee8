"""`graphopt farm` and `graphopt rpc-server`: devices over TVM's RPC and its tracker."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from graphopt import errors
from graphopt.console import STDERR, STDOUT

TRACKER_PORT = 9190
SERVER_PORT = 9090


@click.group()
def farm() -> None:
    """Devices that a tracker of TVM's knows: `python -m tvm.exec.rpc_tracker` starts one.

    Tuning spreads over all devices of a key: `graphopt optimize MODEL --target ... --remote tracker:HOST:PORT/KEY`.
    """


@farm.command()
@click.option("--tracker", default=f"127.0.0.1:{TRACKER_PORT}", show_default=True, help="HOST:PORT of the tracker.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(tracker: str, format_: str) -> int:
    """The devices at a tracker, by key: how many are free, busy and waited for.

    Exit code 6 where no tracker answers.
    """
    from graphopt.remote.address import parse_host
    from graphopt.remote.tracker import Tracker

    host, port = parse_host(tracker)
    with Tracker(host, port) as asked:
        found = asked.status()
    if format_ == "json":
        keys = [{**dataclasses.asdict(each), "busy": each.busy} for each in found]
        click.echo(json.dumps({"tracker": f"{host}:{port}", "keys": keys}))
        return errors.EXIT_DONE
    if not found:
        STDOUT.print(f"The tracker {host}:{port} knows no device: `graphopt rpc-server --tracker` offers one")
        return errors.EXIT_DONE
    table = Table()
    for heading in ("key", "devices", "free", "busy", "waiting", "where"):
        right = heading not in ("key", "where")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for each in found:
        counts = (len(each.devices), each.free, each.busy, each.waiting)
        table.add_row(each.key, *map(str, counts), " ".join(each.devices))
    STDOUT.print(table)
    for each in found:
        STDOUT.print(_words(each), markup=False, soft_wrap=True)
    return errors.EXIT_DONE


@farm.command()
@click.option("--arch", type=click.Choice(["aarch64", "x86_64"]), default="aarch64", show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
def server(arch: str, output: Path) -> int:
    """Write the RPC server for a device without Python: one program and four libraries, to be copied there.

    On the device: ./rpc_server PORT KEY [--host ADDRESS] [--tracker HOST:PORT] [--advertise ADDRESS]. It listens on
    127.0.0.1 unless told otherwise: whoever reaches it can run any code there.
    """
    from graphopt.remote.server_folder import write_server
    from graphopt.report.formats import size

    for file in write_server(arch, output):
        STDOUT.print(f"{file}  {size(file.stat().st_size)}", markup=False, soft_wrap=True)
    return errors.EXIT_DONE


def _words(status: Any) -> str:
    count = len(status.devices)
    devices = f"{count} device{'' if count == 1 else 's'}"
    free = "all free" if not status.busy else f"{status.free} free, {status.busy} busy"
    waiting = f"; {status.waiting} waiting for one" if status.waiting else ""
    return f"{status.key}: {devices}, {free}{waiting}"


@click.command(name="rpc-server")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=int, default=SERVER_PORT, show_default=True, help="0: any that is free.")
@click.option("--key", default="device", show_default=True, help="What clients and the tracker call it.")
@click.option("--tracker", help="HOST:PORT of a tracker to offer this device at.")
@click.option("--advertise", metavar="HOST", help="The address that clients are told; default: what the tracker sees.")
def rpc_server(host: str, port: int, key: str, tracker: str | None, advertise: str | None) -> int:
    """Let other machines run and time compiled models on this one.

    Whoever can reach the port can run any code here: TVM's RPC has neither passwords nor encryption. It listens on
    this machine only unless --host says otherwise. Exit code 6 where no tracker answers or the port is taken.
    """
    from graphopt.remote import python_server
    from graphopt.remote.address import parse_host

    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    found = None if tracker is None else parse_host(tracker)
    server = python_server.start(host, port, key, found, advertise)
    try:
        if not python_server.is_loopback(host):
            STDERR.print(
                f"WARNING: whoever can reach {host}:{server.port} can run any code on this machine", style="bold red"
            )
        where = f"{host}:{server.port}/{key}" if found is None else f"tracker:{found[0]}:{found[1]}/{key}"
        STDERR.print(f"--remote {where} reaches this machine; Ctrl-C ends it", markup=False)
        click.echo(f"listening {server.port}")
        signal.pause()
    except KeyboardInterrupt:
        return errors.EXIT_DONE
    finally:
        server.terminate()
    return errors.EXIT_DONE
