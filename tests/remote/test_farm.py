"""A farm: TVM's tracker, three emulated devices, one of them killed while it times a candidate."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from graphopt import errors
from graphopt.cli import group
from graphopt.remote.address import Address
from graphopt.remote.emulator import emulated_process, find_emulator, find_system, remedy
from graphopt.remote.session import connected
from graphopt.remote.tracker import Tracker, wait_until
from graphopt.targets.tuning import database as databases
from graphopt.targets.tuning import device_timing, timers
from graphopt.tuning import resolve_target, tune_model
from tests.targets.oracle import model, node, uniform

KEY = "rpi4"
DEVICES = 3


@pytest.fixture
def farm(runtime_cache, monkeypatch):
    """The tracker's address, and the processes of its devices by `host:port`."""
    pytest.importorskip("tornado", reason="TVM's tracker needs it: pip install 'graphopt[farm]'")
    if find_emulator("aarch64") is None or find_system("aarch64") is None:
        pytest.skip(f"no emulator of aarch64: {remedy('aarch64')}")
    from tvm.rpc import tracker as trackers

    monkeypatch.setenv("GRAPHOPT_CACHE", str(runtime_cache))
    running = trackers.Tracker("127.0.0.1", port=19190, port_end=19390, silent=True)
    address = Address("127.0.0.1", running.port, KEY, tracker=True)
    with ExitStack() as ending:
        ending.callback(running.terminate)
        servers = {}
        for _ in range(DEVICES):
            options = ("--tracker", f"127.0.0.1:{running.port}")
            try:
                server, where = ending.enter_context(emulated_process("aarch64", "cortex-a72", KEY, options))
            except errors.TargetError as error:
                pytest.skip(str(error))
            servers[f"{where.host}:{where.port}"] = server
        with Tracker(address.host, address.port) as asked:
            assert wait_until(lambda: sum(len(each.devices) for each in asked.status()) == DEVICES, 10)
        yield address, servers


def status(address: Address) -> dict:
    where = f"{address.host}:{address.port}"
    said = CliRunner().invoke(group, ["farm", "status", "--tracker", where, "--format", "json"], standalone_mode=False)
    return {each["key"]: each for each in json.loads(said.output)["keys"]}


def small(folder: Path) -> Path:
    import onnx_ir as ir

    x = uniform(1, 1, 8, 10, 10)
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["y"])]
    made = model(nodes, {"x": x}, ["y"], {"w": uniform(2, 16, 8, 3, 3)})
    ir.save(made, folder / "small.onnx")
    return folder / "small.onnx"


def test_status_wrong_key_and_sessions(farm):
    address, servers = farm
    found = status(address)[KEY]
    assert sorted(found["devices"]) == sorted(servers) and (found["free"], found["busy"]) == (DEVICES, 0)
    where = f"{address.host}:{address.port}"
    text = CliRunner().invoke(group, ["farm", "status", "--tracker", where], standalone_mode=False).output
    assert "rpi4: 3 devices, all free" in text
    with connected(address) as one, connected(address) as two:
        assert one.where != two.where and one.device.fingerprint == two.device.fingerprint
        assert one.device.emulated == "cortex-a72" and set(one.device.cores) == {"cortex-a72"}
        assert (status(address)[KEY]["free"], status(address)[KEY]["busy"]) == (1, 2)
        with connected(address), pytest.raises(errors.DeviceError, match="became free"), connected(address, wait_s=0.5):
            pass
    assert wait_until(lambda: status(address)[KEY]["free"] == DEVICES, 10), "sessions give their devices back"
    wrong = Address(address.host, address.port, "rpi5", tracker=True)
    with pytest.raises(errors.SpecError, match="has the key 'rpi5'") as caught, connected(wrong):
        pass
    assert "rpi4" in str(caught.value.hint)


def test_a_device_killed_in_the_middle_of_tuning_loses_one_trial(farm, tmp_path, monkeypatch):
    address, servers = farm
    seen: Counter[str] = Counter()
    killed: list[str] = []

    def timed(session, *rest):
        """The first device that is at its second trial is killed within it."""
        seen[session.where] += 1
        if seen[session.where] == 2 and not killed:
            killed.append(session.where.removesuffix(f"/{KEY}"))
            os.killpg(servers[killed[0]].pid, signal.SIGKILL)
        return device_timing.timed(session, *rest)

    monkeypatch.setattr(timers, "timed", timed)
    target = resolve_target("arm{device=rpi4,threads=1,without=winograd}")
    database = tmp_path / "schedules.jsonl"
    report = tune_model(small(tmp_path), target, 300.0, database=database, remote=str(address)).report
    assert len(killed) == 1

    assert not report.stopped_early and all(row["time_us"] > 0 for row in report.rows)
    assert sum(report.devices.values()) == report.trials, "every trial has its result, the lost one too"
    assert len(report.losses) == 1 and report.losses[0].startswith(f"{killed[0]}/{KEY}: closed the connection")
    assert len(report.devices) >= 2
    assert status(address)[KEY]["devices"] == sorted(set(servers) - set(killed))

    records = databases.read(database)[0]
    assert records and len({key.device for key in records}) == 1
    for key, record in records.items():
        assert key.device and "cortex-a72, emulated" in record.measured_on and record.complete
    again = tune_model(small(tmp_path), target, 300.0, database=database, remote=str(address)).report
    assert again.trials == 0 and again.from_database == again.tasks
