"""GPUs over RPC: a server on the emulated driver, and a client without one, as a laptop has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import graphopt
from graphopt import errors
from graphopt import model as models
from graphopt.cli import group
from graphopt.places import place_for
from graphopt.plugins import parse_target
from graphopt.remote.address import Address
from graphopt.remote.device import DeviceGpu
from graphopt.remote.engine import RemoteEngine
from graphopt.remote.server_folder import write_server
from graphopt.remote.session import connected
from graphopt.runtime import gpu
from graphopt.runtime.artifact import read_manifest
from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from tests.targets import cuda_emulator
from tests.targets.oracle import close, reference
from tests.targets.test_cuda import HALF, build, needs_emulator, needs_nvcc
from tests.targets.test_cuda_tuning import small

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"
needs_no_gpu = pytest.mark.skipif(gpu.missing() is None, reason="this machine has a GPU")
pytestmark = [needs_emulator, needs_no_gpu]


@contextmanager
def listening(command: list[str], **environment: str):
    """The address of a server that runs on the emulated driver."""
    around = {**os.environ, "LD_LIBRARY_PATH": str(cuda_emulator.driver_folder()), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**around, **environment})
    try:
        assert server.stdout is not None
        yield Address("127.0.0.1", int(server.stdout.readline().split()[1]), "gpu")
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def python_server():
    command = [sys.executable, "-m", "graphopt.cli", "rpc-server", "--port", "0", "--key", "gpu"]
    with listening(command) as found:
        yield found


@pytest.fixture(scope="module")
def cpp_server(tmp_path_factory):
    """Without Python, as on a Jetson. Of this machine's processor, so that the emulated driver can run beside it."""
    if shutil.which("x86_64-linux-gnu-g++") is None:
        pytest.skip("no x86_64-linux-gnu-g++ on this machine")
    folder = tmp_path_factory.mktemp("server")
    write_server("x86_64", folder)
    with listening([str(folder / "rpc_server"), "0", "gpu"]) as found:
        yield found


@pytest.fixture(params=["python_server", "cpp_server"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def emulated_kernels(monkeypatch):
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)


def test_a_device_names_its_gpus(server):
    with connected(server) as session:
        device = session.device
    assert device.gpus == (DeviceGpu("emulated", "sm_80", 8 << 30, 80),)
    assert "emulated (sm_80)" in device.name and device.to_dict()["gpus"][0]["multiprocessors"] == 80


def test_a_model_runs_there(server, tmp_path):
    made, feeds = small()
    folder = build(made, Cuda(arch="sm_80", precision="fp16"), tmp_path / "built")
    with RemoteEngine(folder, server) as engine:
        outputs = [engine.run(feeds) for _ in range(3)]  # the second records the CUDA graph, the third replays it
        engine.feed(feeds)
        assert len(engine.times_s(3)) == 3
    for found in outputs:
        close(found, reference(made, feeds), 8 * HALF)


def test_a_target_without_a_name_is_the_devices(python_server):
    place = place_for(parse_target("cuda"), str(python_server))
    assert place.completed(parse_target("cuda")) == Cuda(arch="sm_80", host="x86_64", sms=80)
    assert place.completed(Cuda(arch="sm_80")) == Cuda(arch="sm_80", sms=80)
    assert place.completed(Cuda(arch="sm_80", sms=7)) == Cuda(arch="sm_80", sms=7)


@pytest.mark.parametrize(
    ("target", "said"),
    [("cuda{arch=sm_90}", r"the GPU of .* is sm_80 \(emulated\), .* is for sm_90"),
     ("cuda{arch=sm_80,host=aarch64}", "is x86_64, .* is aarch64")],
)  # fmt: skip
def test_another_gpu_is_a_sentence(python_server, target, said):
    with pytest.raises(errors.TargetError, match=said):
        place_for(parse_target(target), str(python_server))


def test_a_device_without_a_gpu_is_a_sentence():
    command = [sys.executable, "-m", "graphopt.cli", "rpc-server", "--port", "0", "--key", "gpu"]
    with (
        listening(command, LD_LIBRARY_PATH="") as address,
        pytest.raises(errors.TargetError, match="has no GPU that its server can use"),
    ):
        place_for(parse_target("cuda"), str(address))


def test_a_model_larger_than_the_gpu_is_not_sent(tmp_path):
    folder = build(small()[0], Cuda(arch="sm_80", precision="fp16"), tmp_path / "built")
    command = [sys.executable, "-m", "graphopt.cli", "rpc-server", "--port", "0", "--key", "gpu"]
    with (
        listening(command, GRAPHOPT_EMULATED_MEMORY="1000") as address,
        pytest.raises(errors.TargetError, match="on its GPU"),
    ):
        RemoteEngine(folder, address)


def test_kernels_are_tuned_there(python_server, tmp_path, monkeypatch):
    """Times of the emulated driver mean nothing but are times; what wins there is recorded for its multiprocessors."""
    from graphopt.tuning import tune_model

    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.onnx"
    path.write_bytes(models.to_bytes(small()[0]))
    target = parse_target("cuda{precision=fp16}")
    tuned = tune_model(path, target, 300, database=tmp_path / "db.jsonl", remote=str(python_server)).report
    assert tuned.trials >= 4 and sum(tuned.devices.values()) == 2 and not tuned.losses
    assert not tuned.stopped_early and any(row["time_us"] for row in tuned.rows)
    again = tune_model(path, target, 300, database=tmp_path / "db.jsonl", remote=str(python_server)).report
    assert again.trials == 0 and again.from_database == 2  # the others have one choice only


@pytest.mark.long
def test_optimize_on_a_gpu_elsewhere(python_server, tmp_path):
    out = tmp_path / "out"
    result = graphopt.optimize(
        DIGITS, out, target="cuda", precision="fp16", preset="int8", calib=DIGITS.parent / "calib.npz",
        eval=DIGITS.parent / "eval.npz", remote=str(python_server), tune_seconds=1, measure_seconds=1,
    )  # fmt: skip
    status = {c.name: c.status for c in result.report.candidates}
    assert {"exact · tvm", "exact · tvm fp16", "final · tvm"} <= set(status)
    assert set(status.values()) == {"measured"}, status
    assert read_manifest(out)["measured"]["timed"] and result.report.place["kind"] == "device"


@needs_nvcc
def test_without_any_gpu_it_is_built_and_says_so(tmp_path, monkeypatch):
    """With nvcc's own machine code; the emulator has no part in this."""
    monkeypatch.undo()
    path, out = tmp_path / "m.onnx", tmp_path / "out"
    path.write_bytes(models.to_bytes(small()[0]))
    done = CliRunner().invoke(
        group, ["optimize", str(path), "-o", str(out), "--target", "cuda{arch=sm_90}", "--precision", "fp16"]
    )
    assert done.exit_code == errors.EXIT_DONE, done.output
    text = " ".join(done.output.split())
    assert "NOT MEASURED: there is no sm_90 GPU here" in text and "neither run nor timed" in text
    manifest, report = read_manifest(out), json.loads((out / "report.json").read_text())
    assert manifest["measured"] == {
        "where": "sm_90 GPU, which is not here", "unit": "nothing", "timed": False
    } and manifest["precision"] == "fp16"  # fmt: skip
    assert [c["status"] for c in report["candidates"]] == ["not run", "not run"]
    assert report["choice"]["candidate"] == "exact · tvm fp16" and not (out / "latency.json").exists()
    assert "neither run nor timed" in (out / "report.html").read_text()


def test_which_gpu_must_be_said():
    with pytest.raises(errors.SpecError, match="no GPU here"):
        place_for(parse_target("cuda"))
