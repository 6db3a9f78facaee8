"""`--precision bf16` from the settings to the artifact: asked for, judged, delivered or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import graphopt
from graphopt import capabilities, precision
from graphopt.cli import group
from graphopt.errors import EXIT_ACCURACY, EXIT_DONE, SpecError, TargetError, VerificationError
from graphopt.plugins import parse_target
from graphopt.settings import Settings, read_recipe
from graphopt.targets.arm import Arm
from graphopt.targets.cpu import Cpu
from graphopt.verify import OutputError

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
FAST = {"tune_seconds": 0.0, "measure_seconds": 0.5, "threads": 1}
NEEDS_BF16 = pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & capabilities.host_features(), reason="this processor has no bfloat16 instructions"
)


@pytest.mark.parametrize("word", ["bf16", "bfloat16"])
def test_a_target_spec_says_the_precision_and_round_trips(word: str):
    target = parse_target(f"cpu{{mcpu=sapphirerapids,precision={word}}}")
    assert target == Cpu(mcpu="sapphirerapids", precision="bfloat16")
    assert parse_target(str(target)) == target


def test_a_target_refuses_an_unknown_precision():
    with pytest.raises(SpecError, match="float32 or bfloat16"):
        parse_target("cpu{precision=half}")


def test_a_processor_without_the_instructions_is_refused():
    with pytest.raises(TargetError, match="skylake-avx512 has no bfloat16 instructions"):
        precision.settled(Settings("m.onnx", precision="bf16"), Cpu(mcpu="skylake-avx512"))


def test_settings_and_target_mean_the_same():
    by_target = precision.settled(Settings("m.onnx"), Cpu(mcpu="sapphirerapids", precision="bfloat16"))
    by_option = precision.settled(Settings("m.onnx", precision="bf16"), Cpu(mcpu="sapphirerapids"))
    assert by_target == by_option
    assert precision.settled(Settings("m.onnx"), Cpu())[0].precision == "float32"


def test_it_needs_the_compiled_engine():
    with pytest.raises(SpecError, match="needs the compiled engine"):
        precision.settled(Settings("m.onnx", precision="bf16", engine="onnxruntime"), Cpu(mcpu="sapphirerapids"))


def test_float16_is_a_precision_of_some_processors():
    by_target = precision.settled(Settings("m.onnx"), Arm(mcpu="cortex-a76", precision="float16"))
    by_option = precision.settled(Settings("m.onnx", precision="fp16"), Arm(mcpu="cortex-a76"))
    assert by_target == by_option
    assert by_target[0].precision == "fp16" and by_target[1] == Arm(mcpu="cortex-a76")
    assert precision.narrowed(by_target[1], "fp16") == Arm(mcpu="cortex-a76", precision="fp16")


@pytest.mark.parametrize("target", [Arm(mcpu="cortex-a72"), Cpu(mcpu="sapphirerapids")])
def test_float16_is_refused_elsewhere(target):
    with pytest.raises(TargetError, match="has no float16 instructions"):
        precision.settled(Settings("m.onnx", precision="fp16"), target)


def test_settings_and_target_may_not_contradict():
    with pytest.raises(SpecError, match="contradict"):
        precision.settled(Settings("m.onnx", precision="bf16"), Arm(mcpu="cortex-a76", precision="fp16"))


def test_unknown_words_are_refused():
    with pytest.raises(SpecError, match="unknown precision 'fp8'"):
        Settings("m.onnx", precision="fp8").resolved()  # pyright: ignore[reportArgumentType]


def test_a_recipe_keeps_it(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(Settings("m.onnx", precision="bf16").to_toml())
    assert read_recipe(recipe)["precision"] == "bf16"


def test_noise_is_held_against_the_bound():
    quiet, loud = OutputError("a", 0.1, math.inf, 41.0), OutputError("b", 0.1, math.inf, 19.0)
    precision.check_noise([quiet], 20.0, "bf16")
    precision.check_noise([OutputError("a", 0.0, math.inf, math.inf)], 300.0, "bf16")
    with pytest.raises(VerificationError, match=r"19\.0 dB to output 'b', at least 20 dB"):
        precision.check_noise([quiet, loud], 20.0, "bf16")
    with pytest.raises(VerificationError):
        precision.check_noise([OutputError("c", 0.1, math.inf, math.nan)], 20.0, "bf16")


@pytest.mark.parametrize("word", ["bf16", "fp16"])
def test_explain_says_what_it_is(word):
    said = CliRunner().invoke(group, ["explain", word], standalone_mode=False)
    assert "nearest even" in said.output and "Fidelity: lossy" in said.output


def run(*arguments: str):
    return CliRunner().invoke(group, ["optimize", *arguments, "-q"], standalone_mode=False)


@NEEDS_BF16
def test_the_command_line_compiles_judges_and_reports(tmp_path):
    out = tmp_path / "out"
    done = run(
        str(DIGITS / "digits.onnx"), "-o", str(out), "--precision", "bf16", "--eval", str(DIGITS / "eval.npz"),
        "--tune-seconds", "0", "--measure-seconds", "0.5", "--threads", "1",
    )  # fmt: skip
    assert done.exception is None and done.return_value == EXIT_DONE, done.output
    report = json.loads((out / "report.json").read_text())
    found = {c["name"]: c for c in report["candidates"]}
    assert {"exact · tvm", "exact · tvm bf16"} <= set(found)
    narrow = found["exact · tvm bf16"]
    assert narrow["precision"] == "bf16" and narrow["status"] == "measured"
    assert 30 < narrow["errors"][0]["snr_db"] < 80  # 8 bits of significand, a few layers
    assert found["exact · tvm"]["precision"] == "float32"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["precision"] == found[report["choice"]["candidate"]]["precision"]
    assert 'precision = "bf16"' in (out / "recipe.toml").read_text()


@NEEDS_BF16
def test_an_impossible_bound_is_refused_and_said(tmp_path):
    out = tmp_path / "out"
    done = run(
        str(DIGITS / "digits.onnx"), "-o", str(out), "--precision", "bf16", "--min-snr", "200",
        "--input", "image:1,1,16,16", "--tune-seconds", "0", "--measure-seconds", "0.5", "--threads", "1",
    )  # fmt: skip
    assert done.return_value == EXIT_ACCURACY
    report = json.loads((out / "report.json").read_text())
    narrow = next(c for c in report["candidates"] if c["precision"] == "bf16")
    assert narrow["status"] == "outside bound" and "at least 200 dB" in narrow["reason"]
    assert report["choice"]["candidate"] != narrow["name"]
    assert any("MISSED in bf16" in w for w in report["warnings"])


@NEEDS_BF16
def test_never_compiled_unless_asked_for(tmp_path):
    result = graphopt.optimize(
        DIGITS / "digits.onnx", tmp_path / "out", engine="tvm", inputs={"image": (1, 1, 16, 16)}, **FAST
    )
    assert {c.precision for c in result.report.candidates} == {"float32"}


@NEEDS_BF16
def test_a_compiled_bf16_model_takes_and_gives_float32(tmp_path):
    from graphopt import model as models
    from graphopt.runtime.tvm_engine import TvmEngine

    model = models.fix_inputs(models.load(DIGITS / "digits.onnx"), {"image": (2, 1, 16, 16)})
    target = Cpu(threads=1, precision="bf16")
    target.build(target.lower(model), tmp_path)
    engine = TvmEngine(tmp_path, 1)
    images = np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32)
    found = engine.run({"image": images})["logits"]
    assert found.dtype == np.float32 and found.shape == (2, 10)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(DIGITS / "digits.onnx"), providers=["CPUExecutionProvider"])
    wanted = np.asarray(session.run(None, {"image": images})[0])
    # 2^-8 relative for each of two dozen roundings on the way, independent: sqrt(24) * 2^-8, times 8 for confidence
    assert np.abs(found - wanted).max() <= 8 * math.sqrt(24) * 2.0**-8 * np.abs(wanted).max()
    assert not np.array_equal(found, wanted)  # it really is bfloat16
