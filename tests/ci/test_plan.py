"""graphopt.toml: what it may say, and that what it may not say is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.ci.plan import read_plan, slug
from graphopt.errors import SpecError

WHOLE = """
[ci]
base = "b"
output = "o"
history = "latency.jsonl"
threads = 2
[ci.bounds]
max-regression = "3%"
max-size = "10%"
[models.digits]
model = "digits.onnx"
data = "eval.npz"
optimize = {preset = "int8", calib = "calib.npz", tune-seconds = 5, preprocess = "imagenet"}
bounds = {max-size = "5%", max-drop = 0.5}
[models.digits.targets."cpu{mcpu=cascadelake}"]
[models.digits.targets."arm{mcpu=cortex-a72}"]
max-instructions = "2%"
[models.asis]
new = "asis.onnx"
base = "elsewhere.onnx"
"""


def written(folder: Path, text: str) -> Path:
    (folder / "graphopt.toml").write_text(text)
    return folder / "graphopt.toml"


def test_a_case_for_each_model_and_target(tmp_path):
    plan = read_plan(written(tmp_path, WHOLE))
    cpu, arm, asis = plan.cases
    assert (cpu.name, arm.name) == ("digits@cpu-mcpu-cascadelake", "digits@arm-mcpu-cortex-a72")
    assert cpu.base == tmp_path / "b" / cpu.name
    assert arm.new == tmp_path / "o" / arm.name
    assert cpu.bounds.max_regression == 0.03
    assert cpu.bounds.figures["size_bytes"].text == "5%"  # the model's own bound goes before that of all
    assert "instructions" not in cpu.bounds.figures
    assert arm.bounds.figures["instructions"].text == "2%"
    assert cpu.settings == {
        "threads": 2, "seed": 0, "preset": "int8", "calib": str(tmp_path / "calib.npz"), "tune_seconds": 5.0,
        "preprocess": "imagenet",
    }  # fmt: skip
    assert (asis.model, asis.new, asis.base) == (None, tmp_path / "asis.onnx", tmp_path / "elsewhere.onnx")
    assert plan.history == tmp_path / "latency.jsonl"
    assert [case.name for case in read_plan(tmp_path / "graphopt.toml", ("asis",)).cases] == ["asis"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no model"),
        ("[models.a]\n", "needs either `model`"),
        ("[models.a]\nmodel = 'm'\nnew = 'n'", "needs either `model`"),
        ("[models.a]\nnew = 'n'\ntargets = ['cpu']", "judged as it is"),
        ("[models.a]\nmodel = 3", "model must be text"),
        ("[models.a]\nmodel = 'm'\ntargets = []", "targets is a list"),
        ("[models.a]\nmodel = 'm'\ntargets = ['cpu', 'arm']\nbase = 'b'", "cannot serve several"),
        ("[models.a]\nmodel = 'm'\nbounds = {max-sizes = '1%'}", "unknown bound 'max-sizes'"),
        ("[models.a]\nmodel = 'm'\nbounds = {max-drop = 1}", "max-drop needs `data`"),
        ("[models.a]\nmodel = 'm'\noptimize = {tune-second = 1}", "did you mean 'tune_seconds'"),
        ("[models.a]\nmodel = 'm'\noptimize = {target = 'cpu'}", "decided by the plan"),
        ("[models.a]\nmodel = 'm'\noptimize = {tune-seconds = 'x'}", "must be float"),
        ("[models.'../a']\nmodel = 'm'", "a name is letters"),
        ("[model.a]\nmodel = 'm'", "did you mean 'models'"),
        ("[ci]\nthreads = 0\n[models.a]\nmodel = 'm'", "must be positive"),
        ("[ci]\nthreads = true\n[models.a]\nmodel = 'm'", "threads must be a whole number"),
        ("ci = 1", "ci must be a table"),
        ("[models]\na = 1", "must be a table"),
        ("[[", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, text, told):
    with pytest.raises(SpecError) as caught:
        read_plan(written(tmp_path, text))
    assert told in str(caught.value)


def test_unknown_models_and_files(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        read_plan(tmp_path / "graphopt.toml")
    with pytest.raises(SpecError, match="did you mean 'digits'"):
        read_plan(written(tmp_path, WHOLE), ("digit",))


def test_folders_are_named_by_targets():
    assert slug('cpu{mcpu=x86-64-v3,keys=["a b"]}') == "cpu-mcpu-x86-64-v3-keys-a-b"
