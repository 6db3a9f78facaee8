"""The CPU target as a value, its build, and what `doctor` says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from graphopt import spec
from graphopt.capabilities import X86_FEATURES
from graphopt.errors import SpecError, TargetError
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.cpu import Cpu, doctor
from graphopt.targets.relax import link
from tests.targets.oracle import TARGET, close, model, node, reference, sum_tolerance, uniform


def _small():
    x = uniform(1, 1, 4, 6, 6)
    made = model([node("Conv", ["x", "w"], ["y"])], {"x": x}, ["y"], {"w": uniform(2, 8, 4, 3, 3)})
    return made, {"x": x}


@pytest.mark.parametrize("text", ["cpu", "cpu{threads=1}", "cpu{mcpu=cascadelake,threads=2}"])
def test_spec_round_trip(text):
    assert str(spec.bind(spec.parse(text), Cpu, "target")) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [("cpu{mcpu=cascadelak}", "cascadelake"), ("cpu{threads=-1}", "threads"), ("cpu{mcp=x}", "mcpu")],
)
def test_wrong_options_name_the_right_ones(text, said):
    with pytest.raises(SpecError, match=said):
        spec.bind(spec.parse(text), Cpu, "target")


def test_capabilities_follow_mcpu():
    assert Cpu(mcpu="haswell").capabilities.float_lanes == 8
    assert Cpu(mcpu="cascadelake").capabilities.dot_int8 == "avx512vnni"


def test_build_describes_itself(tmp_path):
    made, feeds = _small()
    target = Cpu(mcpu="x86-64-v3", threads=1)
    assert set(target.build(target.lower(made), tmp_path)) == {p.name for p in tmp_path.iterdir()}
    described = json.loads((tmp_path / "engine.json").read_text())
    assert set(described["features"]) == X86_FEATURES["x86-64-v3"]
    assert described["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 4, 6, 6]}]
    assert described["outputs"][0]["shape"] == [1, 8, 4, 4]
    close(TvmEngine(tmp_path, 1).run(feeds), reference(made, feeds), sum_tolerance(36))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_generated_code_keeps_to_the_instruction_set(tmp_path):
    made, _ = _small()
    for mcpu, has_ymm, has_zmm in (
        ("x86-64-v2", False, False),
        ("x86-64-v3", True, False),
        ("skylake-avx512", True, True),
    ):
        target = Cpu(mcpu=mcpu, threads=1)
        target.build(target.lower(made), tmp_path)
        text = subprocess.run(
            ["objdump", "-d", tmp_path / "model.so"], capture_output=True, text=True, check=True
        ).stdout
        assert ("%zmm" in text) <= has_zmm
        assert ("%ymm" in text or "%zmm" in text) == has_ymm


def test_building_twice_gives_the_same_code(tmp_path):
    made, _ = _small()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        TARGET.build(TARGET.lower(made), tmp_path / name)
    assert (tmp_path / "a" / "model.so").read_bytes() == (tmp_path / "b" / "model.so").read_bytes()


@pytest.mark.parametrize("linker", ["ld", "ld.lld", "gcc"])
def test_each_linker_will_do(tmp_path, monkeypatch, linker):
    path = shutil.which(linker)
    if path is None:
        pytest.skip(f"{linker} is not installed")
    made, feeds = _small()
    monkeypatch.setattr(link, "find_linker", lambda arch=None: [path])
    TARGET.build(TARGET.lower(made), tmp_path)
    close(TvmEngine(tmp_path, 1).run(feeds), reference(made, feeds), sum_tolerance(36))


def test_no_linker_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    made, _ = _small()
    with pytest.raises(TargetError, match=r"no linker.*graphopt\[cross\]"):
        TARGET.build(TARGET.lower(made), tmp_path)
    assert "linker" in [d.what for d in doctor() if not d.ok]


def test_linker_order(monkeypatch):
    here = {"ld": "/bin/ld", "cc": "/bin/cc"}
    monkeypatch.setattr(link.shutil, "which", here.get)
    assert link.find_linker() == ["/bin/cc"]
    del here["cc"]
    assert link.find_linker() == ["/bin/ld"]
    here.clear()
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: object())
    assert link.find_linker() == [sys.executable, "-m", "ziglang", "ld.lld"]


def test_failing_linker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "find_linker", lambda arch=None: [shutil.which("false") or "false"])
    made, _ = _small()
    with pytest.raises(TargetError, match="failed") as caught:
        TARGET.build(TARGET.lower(made), tmp_path)
    assert "\n" not in str(caught.value)


def test_folder_that_is_not_there(tmp_path):
    made, _ = _small()
    with pytest.raises(TargetError):
        TARGET.build(TARGET.lower(made), tmp_path / "absent")


def test_doctor_has_a_row_for_everything():
    rows = {d.what: d for d in doctor()}
    assert {"instruction set", "processor for LLVM", "apache-tvm", "apache-tvm-ffi", "linker", "processors"} <= set(
        rows
    )
    assert all(d.remedy for d in rows.values() if not d.ok)
    assert rows["apache-tvm"].ok
    assert rows["apache-tvm-ffi"].ok


def test_importing_the_target_does_not_import_tvm():
    code = (
        "import sys, graphopt.targets.cpu, graphopt.runtime.tvm_engine, graphopt.targets.relax.importer\n"
        "import graphopt.targets.tuning.search, graphopt.targets.schedules\n"
        "print([m for m in ('tvm', 'tvm_ffi', 'onnxruntime', 'onnxscript') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
