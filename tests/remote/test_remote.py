"""Devices over RPC: addresses, what a server says of itself, and one clear line for all that may be wrong."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import capabilities, errors
from graphopt.cli import group
from graphopt.plugins import parse_target
from graphopt.remote import farm as farms
from graphopt.remote import python_server
from graphopt.remote.address import Address, parse_address, parse_host
from graphopt.remote.device import check_memory, device_of, needed_bytes
from graphopt.remote.engine import RemoteEngine
from graphopt.remote.farm import Farm
from graphopt.remote.session import connected
from graphopt.runtime.artifact import read_manifest
from graphopt.targets.llvm import FFI_PIN, TVM_PIN
from graphopt.tuning import resolve_target, tune_model
from tests.remote import servers
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits" / "digits.onnx"


@pytest.fixture(scope="module")
def address():
    with servers.server() as found:
        yield found


@pytest.mark.parametrize(
    ("text", "found"),
    [("10.0.0.7:9090/rpi4", Address("10.0.0.7", 9090, "rpi4")), ("9090/x", Address("127.0.0.1", 9090, "x")),
     ("tracker:9190/rpi4", Address("127.0.0.1", 9190, "rpi4", tracker=True)),
     ("tracker:farm.local:9190/rpi4", Address("farm.local", 9190, "rpi4", tracker=True))],
)  # fmt: skip
def test_addresses(text, found):
    assert parse_address(text) == found and parse_address(str(found)) == found


@pytest.mark.parametrize("text", ["", "box", "box:9090", "box:99999/x", "tracker/rpi4", "box:port/x", "a b:1/x"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(errors.SpecError, match="--remote"):
        parse_address(text)


def test_hosts():
    assert parse_host("9190") == ("127.0.0.1", 9190) and parse_host("farm:1") == ("farm", 1)
    with pytest.raises(errors.SpecError):
        parse_host("farm")
    assert python_server.is_loopback("127.0.0.1") and python_server.is_loopback("localhost")
    assert not python_server.is_loopback("0.0.0.0") and not python_server.is_loopback("farm")


def test_a_device_says_what_it_is(address):
    with connected(address) as session:
        device = session.device
    assert device.arch == capabilities.host_arch() and device.features == capabilities.host_features()
    assert (device.tvm, device.tvm_ffi) == (TVM_PIN, FFI_PIN) and len(device.cores) >= 1
    assert 0 < device.available_bytes < device.memory_bytes and not device.emulated
    later = dataclasses.replace(device, available_bytes=1, system="Linux 9")
    assert later.fingerprint == device.fingerprint, "neither memory nor kernel decide which schedule is fastest"
    assert dataclasses.replace(device, cores=(*device.cores, "another")).fingerprint != device.fingerprint


def test_arm_cores_are_named():
    said = {
        "arch": "aarch64", "cores": ["0x41:0xd08"] * 4 + ["0x77:0x123"], "features": ["asimd"], "board": "Pi",
        "system": "Linux", "memory_bytes": 1, "available_bytes": 1, "emulated": "", "tvm": "", "tvm_ffi": "",
    }  # fmt: skip
    assert device_of(said).name == "Pi, 1 x 0x77:0x123 + 4 x cortex-a72"


def small() -> tuple:
    x = uniform(1, 1, 8, 12, 12)
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["y"])]
    return model(nodes, {"x": x}, ["y"], {"w": uniform(2, 16, 8, 3, 3)}), {"x": x}


def built(made, folder: Path, target: str = "cpu{threads=1}") -> Path:
    folder.mkdir()
    cpu = parse_target(target)
    cpu.build(cpu.lower(made), folder)
    return folder


def test_runs_and_times_there(address, tmp_path):
    made, feeds = small()
    with RemoteEngine(built(made, tmp_path / "built"), address) as engine:
        close(engine.run(feeds), reference(made, feeds), sum_tolerance(72))
        times = engine.times_s(5)
        assert len(times) == 5 and all(0 < t < 1 for t in times)
        with pytest.raises(errors.DataError, match="missing"):
            engine.run({})
    with connected(address) as session:  # the last one has ended, or this would wait for it
        assert session.device.cores


def refused(tmp_path, code: int, *said: str, remote: str = "", target: str = "cpu") -> None:
    """`optimize` ends with one line that says this, and with this exit code; nothing is left behind."""
    with pytest.raises(errors.GraphoptError) as caught:
        graphopt.optimize(DIGITS, tmp_path / "out", target=target, remote=remote, tune_seconds=0.0, threads=1)
    line = str(caught.value)
    assert caught.value.exit_code == code and "\n" not in line
    for each in said:
        assert each in line
    assert not list(tmp_path.iterdir())


def test_nobody_there(tmp_path):
    port = python_server.free_port("127.0.0.1")
    refused(tmp_path, errors.EXIT_DEVICE, f"no RPC server answers at 127.0.0.1:{port}", remote=f"{port}/x")
    refused(tmp_path, errors.EXIT_DEVICE, f"no tracker answers at 127.0.0.1:{port}", remote=f"tracker:{port}/x")
    with pytest.raises(errors.DeviceError, match="no tracker answers"):
        CliRunner().invoke(
            group, ["farm", "status", "--tracker", str(port)], standalone_mode=False, catch_exceptions=False
        )
    with pytest.raises(errors.DeviceError, match="no tracker answers"):
        python_server.start("127.0.0.1", 0, "x", ("127.0.0.1", port))


def test_what_is_no_tracker_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            client.recv(4)
            client.sendall(b"HTTP")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        port = listener.getsockname()[1]
        refused(tmp_path, errors.EXIT_DEVICE, "it is no TVM tracker", remote=f"tracker:{port}/x")


def test_a_port_that_is_taken():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(errors.DeviceError, match=r"cannot listen on 127\.0\.0\.1"),
    ):
        python_server.start("127.0.0.1", taken.getsockname()[1], "x")


def test_wrong_key(address, tmp_path):
    where = f"{address.host}:{address.port}"
    refused(tmp_path, errors.EXIT_USAGE, where, "does not have the key 'bax'", remote=f"{where}/bax")


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [(servers.saying(tvm="0.26.0"), errors.EXIT_DEVICE, ("runs TVM 0.26.0", f"apache-tvm=={TVM_PIN}")),
     (servers.silent, errors.EXIT_DEVICE, ("does not say what it is", "graphopt rpc-server")),
     (servers.saying(features=["sse2"]), errors.EXIT_FAILURE, ("lacks", "--target")),
     (servers.saying(arch="riscv64"), errors.EXIT_FAILURE, ("is riscv64", "--target")),
     (servers.saying(available_bytes=100_000), errors.EXIT_FAILURE, ("0 MB free", "nothing was uploaded"))],
    ids=["other version", "not ours", "other features", "other processor", "full"],
)  # fmt: skip
def test_a_device_that_does_not_fit(prepare, code, said, tmp_path):
    with servers.server(prepare) as address:
        refused(tmp_path, code, *said, remote=str(address))


def test_memory_is_known_before_anything_is_uploaded(tmp_path):
    """A small library whose values between kernels are large."""
    x = uniform(1, 1, 4, 256, 256)
    nodes = [
        node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w1"], ["b"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["b"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], {"w0": uniform(2, 64, 4, 3, 3), "w1": uniform(3, 64, 64, 3, 3)})
    folder = built(made, tmp_path / "built")
    image = 64 * 256 * 256 * 4
    assert 2 * image <= needed_bytes(folder) - (folder / "model.so").stat().st_size <= 3 * image
    device = device_of({**json.loads(python_server.describe()), "available_bytes": image})
    with pytest.raises(errors.TargetError, match=r"takes \d+ MB .* has 17 MB free"):
        check_memory(folder, device, "the box")
    check_memory(folder, dataclasses.replace(device, available_bytes=needed_bytes(folder)), "the box")


def test_a_device_out_of_memory_is_one_line(tmp_path):
    """It has memory by its own account, and cannot get it: somebody else took it meanwhile, or it has a limit."""
    x = np.zeros((1, 4, 1024, 1024), np.float32)
    nodes = [
        node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w1"], ["b"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["b"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], {"w0": uniform(2, 128, 4, 1, 1), "w1": uniform(3, 128, 128, 1, 1)})
    folder = built(made, tmp_path / "built")
    with servers.server(servers.cramped) as address, pytest.raises(errors.TargetError) as caught:
        RemoteEngine(folder, address).run({"x": x})
    assert "out of memory" in str(caught.value) and caught.value.exit_code == errors.EXIT_FAILURE


def test_trials_come_back_from_a_server(address):
    def job(name: str) -> Callable:
        return lambda session: (name, len(session.device.cores))

    with Farm(address, 20.0) as farm:
        for name in "abc":
            farm.submit(name, job(name))
        found = {}
        while farm.in_flight:
            outcome = farm.next_outcome(20.0)
            assert outcome is not None
            found[outcome[0]] = outcome[1]
        assert {k: v.value[0] for k, v in found.items()} == {"a": "a", "b": "b", "c": "c"}
        assert farm.next_outcome(0.0) is None and not farm.losses
        assert sum(farm.trials.values()) == 3


def test_what_the_device_refuses_is_the_trials_own_fault(address, tmp_path):
    with Farm(address, 20.0) as farm:
        (tmp_path / "no.so").write_bytes(b"no library")
        farm.submit("bad", lambda session: session.load(tmp_path / "no.so", "no.so"))
        found = farm.next_outcome(30.0)
        assert found is not None and found[1].problem and found[1].attempts == 1 and not farm.losses


def test_a_server_that_hangs_loses_its_trial_and_it_is_repeated(address, monkeypatch):
    monkeypatch.setattr(farms, "GRACE_S", 0.5)
    told = []
    hung = threading.Event()

    def job(session) -> str:
        if not hung.is_set():
            hung.set()
            time.sleep(8)
        return "done"

    with Farm(address, 1.0, told.append) as farm:
        farm.submit("x", job)
        found = farm.next_outcome(30.0)
        assert found is not None and found[1].value == "done" and found[1].attempts == 2
        assert len(told) == 1 and "no answer" in str(told[0])


def test_nobody_left_is_told_apart_from_a_bad_trial(monkeypatch):
    monkeypatch.setattr(farms, "RETURN_S", 1.0)
    port = python_server.free_port("127.0.0.1")
    with Farm(Address("127.0.0.1", port, "x"), 1.0) as farm:
        farm.submit("x", lambda session: None)
        found = farm.next_outcome(30.0)
        assert found is not None and found[1].unreached and "no RPC server answers" in found[1].problem


def test_the_same_commands_measure_milliseconds_there(tmp_path):
    """`rpc-server` in a process of its own, as on a device; optimize, tune and bench over it."""
    line = [sys.executable, "-m", "graphopt.cli", "rpc-server", "--port", "0", "--key", "box"]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None and running.stderr is not None
        word, port = running.stdout.readline().split()
        assert word == "listening"
        remote = f"127.0.0.1:{port}/box"
        report = graphopt.optimize(
            DIGITS, tmp_path / "out", remote=remote, tune_seconds=0.0, measure_seconds=1.0, threads=1
        ).report  # fmt: skip
        assert report.place["kind"] == "device" and report.place["unit"] == "seconds"
        assert report.place["device"]["fingerprint"] and report.place["baseline"] == "exact · tvm"
        (candidate,) = report.candidates
        assert candidate.latency is not None and 0 < candidate.latency["median_s"] < 1 and candidate.speedup is not None
        assert len(candidate.latency["samples_s"]) >= 3 * 5 * 3, "three sessions of five bursts of three runs"
        saved = json.loads((tmp_path / "out" / "latency.json").read_text())
        assert saved["environment"]["machine"]["features"] == report.place["device"]["fingerprint"]
        assert len(saved["sessions"]) == 3 and remote in read_manifest(tmp_path / "out")["measured"]["where"]

        bench = ["bench", str(tmp_path / "out"), "--remote", remote, "--seconds", "1", "--threads", "1", "-q"]
        said = CliRunner().invoke(group, [*bench, "--format", "json"], standalone_mode=False)
        assert 0 < json.loads(said.output)["contenders"]["out"]["median_s"] < 1
        bench[1] = str(DIGITS)
        with pytest.raises(errors.ArtifactError, match="nothing else runs on a remote device"):
            CliRunner().invoke(group, bench, standalone_mode=False, catch_exceptions=False)

        made, _ = small()
        ir.save(made, tmp_path / "small.onnx")
        target = resolve_target("cpu{threads=1}")
        found = tune_model(tmp_path / "small.onnx", target, 20.0, database=tmp_path / "db.jsonl", remote=remote).report
        assert found.trials and found.devices == {remote: found.trials} and not found.losses
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
    with pytest.raises(errors.DeviceError), connected(parse_address(remote)):
        pass
