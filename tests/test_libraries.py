"""Several targets: a library for each in one artifact, and the first that the processor can run is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import capabilities
from graphopt.arm_cores import ARM_FEATURES
from graphopt.capabilities import X86_FEATURES, host_arch, host_features
from graphopt.cli import group
from graphopt.errors import ArtifactError, SpecError
from graphopt.libraries import leading, parse_targets
from graphopt.packaging import package
from graphopt.report.html import to_html
from graphopt.runtime import tvm_engine
from graphopt.runtime.compiled import open_first
from tests.packaging.artifacts import DIGITS, artifact, build_example, run_program, runner
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform

RICH, PLAIN = "cpu{mcpu=graniterapids,threads=1}", "cpu{mcpu=x86-64-v2,threads=1}"
"""One that hardly any machine has (AMX in half precision), and one that all have."""
X86 = pytest.mark.skipif(
    host_arch() != "x86_64" or X86_FEATURES["graniterapids"] <= host_features(), reason="for an x86-64 without amx_fp16"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no target"), ("cpu{mcpu=haswell},cpu{mcpu=haswell}", "twice"), ("cpu{mcpu=haswel},cpu", "haswell"),
     ("cpu{mcpu=haswell},arm", "for aarch64 and x86_64"), ("cpu{mcpu=haswell},cuda{arch=sm_90}", "among several")],
)  # fmt: skip
def test_what_cannot_go_together(text, said):
    with pytest.raises(SpecError) as caught:
        parse_targets(text)
    assert said in f"{caught.value} {caught.value.hint}"


@X86
def test_candidates_are_compared_on_the_first_that_runs_here():
    targets = parse_targets(f"{RICH},cpu{{mcpu=x86-64-v2,threads=2}},{PLAIN}")
    assert leading(targets) == targets[1]
    assert leading(targets[:1]) == targets[0]


def small():
    feeds = {"x": uniform(1, 1, 8, 6, 6)}
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["y"])]
    return model(nodes, feeds, ["y"], {"w": uniform(2, 8, 8, 3, 3)}), feeds


@X86
def test_the_first_that_fits_is_loaded(tmp_path, monkeypatch):
    net, feeds = small()
    folder = artifact(tmp_path / "fat", net, RICH, "cpu{mcpu=haswell,threads=1}", PLAIN)
    wanted = reference(net, feeds)
    for has, target in ((X86_FEATURES["haswell"], "haswell"), (X86_FEATURES["x86-64-v2"], "x86-64-v2")):
        monkeypatch.setattr(tvm_engine, "host_features", lambda has=has: has)
        opened = graphopt.load(folder, threads=1)
        assert f"mcpu={target}" in opened.target
        if has <= host_features():
            close(opened.run(feeds), wanted, sum_tolerance(8 * 9))
    monkeypatch.setattr(tvm_engine, "host_features", frozenset)
    with pytest.raises(ArtifactError) as caught:
        graphopt.load(folder)
    assert all(f"({name})" in str(caught.value) for name in ("graniterapids", "haswell", "x86-64-v2"))
    with pytest.raises(ArtifactError) as caught:
        open_first([folder / "compiled"])
    assert "amx_fp16" in str(caught.value) and "haswell" not in str(caught.value)


@X86
@pytest.mark.long
def test_optimize_makes_a_library_for_each(tmp_path):
    targets = f"{RICH},cpu{{threads=1}},{PLAIN}"
    arguments = [
        "optimize", str(DIGITS / "digits.onnx"), "-o", str(tmp_path / "out"), "--target", targets, "--engine", "tvm",
        "--tune-seconds", "0", "--measure-seconds", "2", "--threads", "1", "-q",
    ]  # fmt: skip
    said = CliRunner().invoke(group, arguments, standalone_mode=False)
    report = json.loads((tmp_path / "out/report.json").read_text())
    if report["choice"]["engine"] != "tvm":
        pytest.skip("untuned, the compiled model was no faster than the input here")
    rows = {row["target"]: row for row in report["libraries"]}
    assert [row["status"] for row in rows.values()] == ["not run", "chosen", "measured"]
    assert "amx_fp16" in rows[RICH]["reason"] and rows[RICH]["latency"] is None
    assert rows[PLAIN]["latency"]["median_s"] > 0
    assert "Libraries" in said.output and "not run: this machine lacks" in " ".join(said.output.split())
    assert "this machine lacks" in to_html(report)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [row["target"] for row in manifest["libraries"]] == list(rows)
    assert {"compiled/model.so", "compiled-1/model.so", "compiled-2/model.so"} <= set(manifest["files"])
    with np.load(DIGITS / "eval.npz") as data:
        feeds = {"image": data["image"][:1]}
    opened = graphopt.load(tmp_path / "out", threads=1)
    assert opened.target == "cpu{threads=1}"
    net = graphopt.model.load(DIGITS / "digits.onnx")
    close(opened.run(feeds), reference(net, feeds), sum_tolerance(96 * 9))
    for runtime in ("cpp", "python"):
        packed = package(tmp_path / "out", tmp_path / runtime, runtime)
        assert [row["file"] for row in packed.description["libraries"]] == [
            "model/model.so", "model/model-1.so", "model/model-2.so"
        ]  # fmt: skip
    np.savez(tmp_path / "in.npz", image=feeds["image"])
    code = "from graphopt_model import Model; print(Model(threads=1).library)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "python", capture_output=True, text=True)
    assert done.stdout.strip() == "model/model-1.so", done.stderr


@pytest.mark.skipif(host_arch() != "x86_64", reason="QEMU's x86 processors on x86")
def test_a_package_falls_back_on_an_older_processor(tmp_path):
    old, newer = runner("x86_64", "Nehalem"), runner("x86_64", "Haswell")
    net, feeds = small()
    packed = package(artifact(tmp_path / "fat", net, "cpu{mcpu=haswell}", PLAIN), tmp_path / "package", "cpp")
    program = build_example(packed.path, "x86_64")
    _falls_back(packed.path, [*newer, str(program)], [*old, str(program)], net, feeds, tmp_path)


@pytest.mark.long
def test_a_package_falls_back_on_an_older_arm_core(tmp_path):
    old, newer = runner("aarch64", "cortex-a53"), runner("aarch64", "cortex-a76")
    assert not ARM_FEATURES["cortex-a76"] <= ARM_FEATURES["cortex-a53"]
    net, feeds = small()
    packed = package(artifact(tmp_path / "fat", net, "arm{mcpu=a76}", "arm{mcpu=a53}"), tmp_path / "package", "cpp")
    program = build_example(packed.path, "aarch64")
    _falls_back(packed.path, [*newer, str(program)], [*old, str(program)], net, feeds, tmp_path)


def _falls_back(folder: Path, newer: list[str], old: list[str], net, feeds, tmp_path: Path) -> None:
    """The newer processor takes the first library: with a damaged one it fails. The old one does not look at it."""
    wanted = reference(net, feeds)
    for name, command in (("newer", newer), ("old", old)):
        out = tmp_path / name
        close(run_program([*command, "-o", str(out), str(folder)], feeds, out), wanted, sum_tolerance(8 * 9))
    (folder / "model/model.so").write_bytes(b"")
    done = subprocess.run([*newer, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "model/model.so is damaged" in done.stderr
    out = tmp_path / "again"
    close(run_program([*old, "-o", str(out), str(folder)], feeds, out), wanted, sum_tolerance(8 * 9))


def test_one_target_is_as_before(tmp_path):
    assert parse_targets("cpu") == (graphopt.plugins.parse_target("cpu"),)
    net, feeds = small()
    folder = artifact(tmp_path / "thin", net, "cpu")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["libraries"]  # as artifacts before several targets were
    (folder / "manifest.json").write_text(json.dumps(manifest))
    opened = graphopt.load(folder, threads=1, trust=True)  # the manifest changed: its signature no longer fits
    assert opened.target == "cpu" and capabilities.host_arch() in ("x86_64", "aarch64")
    close(opened.run(feeds), reference(net, feeds), sum_tolerance(8 * 9))
