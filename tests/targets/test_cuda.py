"""CUDA targets: names, machine code without a GPU, and the same numbers as ONNX Runtime's on an emulated one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import graphopt
from graphopt.cli import group
from graphopt.errors import ArtifactError, SpecError, TargetError
from graphopt.gpu_names import ARCHITECTURES, GPUS
from graphopt.plugins import parse_target
from graphopt.runtime import gpu
from graphopt.runtime.cuda_engine import CudaEngine
from graphopt.targets import cuda, nvcc
from graphopt.targets.cuda import Cuda
from tests.targets import cuda_emulator
from tests.targets.oracle import close, reference, sum_tolerance
from tests.targets.test_arm import convolutions

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits" / "digits.onnx"
FATBIN = bytes.fromhex("50ed55ba")
"""How a fat binary starts."""
needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=f"{nvcc.missing()}: nothing can be compiled")
needs_emulator = pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
HALF = float(np.finfo(np.float16).eps)


def build(model, target: Cuda, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    lowered = target.lower(model)
    target.tune(lowered, seconds=0, database=folder / "schedules.jsonl")
    target.build(lowered, folder)
    return folder


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """A function from a model, a target and inputs to the outputs that its kernels compute in the emulator."""
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)

    def outputs(model, target: Cuda, feeds, times: int = 1):
        return cuda_emulator.run(build(model, target, tmp_path / "built"), feeds, times)

    return outputs


@pytest.mark.parametrize(
    ("text", "arch", "host"),
    [("cuda{arch=sm_90}", "sm_90", ""), ("cuda{arch=75}", "sm_75", ""), ("cuda{device=h100}", "sm_90", ""),
     ("cuda{device=jetson-orin}", "sm_87", "aarch64"), ("cuda{arch=sm_87,host=aarch64}", "sm_87", "aarch64")],
)  # fmt: skip
def test_gpus_have_many_names(text, arch, host):
    target = parse_target(text)
    assert isinstance(target, Cuda) and target.gpu_arch == arch and parse_target(str(target)) == target
    assert host in ("", target.host_arch)


@pytest.mark.parametrize(
    ("text", "said"),
    [("cuda{arch=sm_91}", "sm_90"), ("cuda{device=h10}", "h100"), ("cuda{arch=sm_90,device=h100}", "both"),
     ("cuda{precision=fp15}", "precision"), ("cuda{host=mips}", "host")],
)  # fmt: skip
def test_what_is_no_gpu_names_the_nearest(text, said):
    with pytest.raises(SpecError) as caught:
        parse_target(text)
    assert said in f"{caught.value} {caught.value.hint}"


def test_every_gpu_has_a_known_architecture():
    assert all(each.arch in ARCHITECTURES for each in GPUS.values())
    for arch in ARCHITECTURES:
        abilities = Cuda(arch=arch).capabilities
        assert abilities.dot_int8 == "mma" and abilities.activation_dtype == "int8" and not abilities.reduce_range


def test_all_gpus_are_listed():
    result = CliRunner().invoke(group, ["targets", "--format", "json"], standalone_mode=False)
    found = json.loads(result.output)["processors"]
    assert "tensor_bf16" in found["cuda{arch=sm_90}"]["features"] and "cuda{device=t4}" in found
    text = CliRunner().invoke(group, ["targets"], standalone_mode=False)
    assert "cuda{device=h100}: H100; 132 multiprocessors, sm_90" in text.output


def test_doctor_says_in_words_what_is_missing(monkeypatch):
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: None)
    monkeypatch.setattr(gpu, "missing", lambda: "no NVIDIA driver on this machine (libcuda.so.1)")
    rows = {row.what: row for row in cuda.doctor()}
    assert not rows["CUDA compiler"].ok and "nvcc" in rows["CUDA compiler"].detail
    assert "graphopt[cuda]" in rows["CUDA compiler"].remedy
    assert not rows["GPU"].ok and "driver" in rows["GPU"].detail


def test_without_a_toolkit_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "find_toolkit", lambda: None)
    made, _ = convolutions(1)
    with pytest.raises(TargetError, match="no CUDA compiler") as caught:
        build(made, Cuda(arch="sm_80"), tmp_path / "built")
    assert "graphopt[cuda]" in str(caught.value.hint) and not list((tmp_path / "built").glob("*.so"))


def test_the_toolkit_is_found_where_it_may_be(monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc, "_package_roots", lambda: [tmp_path / "cu13"])
    for path in (tmp_path / "cu13" / "bin" / "nvcc", tmp_path / "own" / "bin" / "nvcc"):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "own"))
    found = nvcc.find_toolkit()
    assert found is not None and found.nvcc == tmp_path / "own" / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    found = nvcc.find_toolkit()
    assert found is not None and found.nvcc.parent.parent in (tmp_path / "cu13", Path("/usr/local/cuda"))


@pytest.mark.skipif(gpu.missing() is None, reason="this machine has a GPU")
def test_nothing_is_measured_or_run_without_a_gpu(monkeypatch, tmp_path):
    with pytest.raises(SpecError, match="does not say which to build for") as caught:
        graphopt.optimize(DIGITS, tmp_path / "out", target="cuda")
    assert "--remote" in str(caught.value.hint) and not (tmp_path / "out").exists()
    if cuda_emulator.available() is not None:
        pytest.skip(str(cuda_emulator.available()))
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)
    made, _ = convolutions(1)
    folder = build(made, Cuda(arch="sm_80", host=cuda.capabilities.host_arch()), tmp_path / "built")
    with pytest.raises(TargetError, match="runs on a GPU: no NVIDIA driver"):
        CudaEngine(folder)
    described = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**described, "arch": "s390x"}))
    with pytest.raises(ArtifactError, match="s390x"):
        CudaEngine(folder)


def test_precisions_that_an_architecture_lacks_are_refused():
    made, _ = convolutions(1)
    with pytest.raises(TargetError, match="sm_75 has no bfloat16"):
        Cuda(arch="sm_75", precision="bfloat16").lower(made)


@needs_nvcc
@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(a, marks=pytest.mark.long) for a in ARCHITECTURES if a != "sm_90")]
)
def test_libraries_hold_machine_code_and_no_source(arch, tmp_path):
    made, _ = convolutions(3)
    folder = build(made, Cuda(arch=arch), tmp_path / "built")
    library = (folder / "model.so").read_bytes()
    assert FATBIN in library and b"__global__" not in library and arch.encode() in library
    described = json.loads((folder / "engine.json").read_text())
    assert described["gpu"] == arch and len(described["kernels"]) >= 6
    for name, needs in described["kernels"].items():
        assert 0 < needs["registers"] <= 255 and needs["spill_bytes"] == 0, name


@needs_nvcc
def test_a_jetson_gets_code_for_its_own_processor(tmp_path):
    from graphopt.targets.relax import link

    if link.find_linker("aarch64") is None:
        pytest.skip(f"no linker for aarch64: {link.cross_remedy('aarch64')}")
    made, _ = convolutions(3)
    folder = build(made, parse_target("cuda{device=jetson-orin}"), tmp_path / "built")  # type: ignore[arg-type]
    library = (folder / "model.so").read_bytes()
    assert library[18:20] == b"\xb7\x00" and FATBIN in library and b"sm_87" in library


@needs_nvcc
def test_what_nvcc_refuses_is_one_line():
    with pytest.raises(TargetError, match=r"nvcc refuses the kernels for sm_80: .*error"):
        nvcc.compile_source('extern "C" __global__ void k(float* x) { x[0] = nothing; }', "sm_80")


def test_what_ptxas_says_is_understood():
    said = (
        "ptxas info    : Compiling entry function 'a' for 'sm_80'\nptxas info    : Function properties for a\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 368 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_80'\nptxas info    : Used 10 registers\n"
    )
    assert nvcc.resources(said) == {"a": nvcc.Resources(40, 4096, 8, 16), "b": nvcc.Resources(10, 0, 0, 0)}


@needs_emulator
@pytest.mark.parametrize("graphs", [True, pytest.param(False, marks=pytest.mark.long)])
def test_kernels_compute_what_onnx_runtime_does(graphs, emulated, tmp_path):
    made, feeds = convolutions(5)
    found = emulated(made, Cuda(arch="sm_80", graphs=graphs), feeds, times=3)  # a graph is recorded by the first run
    close(found, reference(made, feeds), sum_tolerance(24 * 9 * 4))
    built = tmp_path / "built"
    with pytest.raises(AssertionError, match="DataError: input 'x' has shape"):
        cuda_emulator.run(built, {"x": feeds["x"][..., :3]})
    for variable, value, said in (
        ("ARCH", "75", "ArtifactError: .* was built for sm_80, this machine's GPU is sm_75"),
        ("MEMORY", "1000", "TargetError: .* of the GPU's memory at least"),
        ("ALLOCATION", "64", "TargetError: .* cannot run|ArtifactError: .* cannot be loaded"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match=said):
            patch.setenv(f"GRAPHOPT_EMULATED_{variable}", value)
            cuda_emulator.run(built, feeds)


@needs_emulator
def test_float16_rounds_once_a_layer(emulated):
    made, feeds = convolutions(6)
    # five stored layers, each rounded to 11 bits, and weights as well; sums are float32
    close(emulated(made, Cuda(arch="sm_80", precision="float16"), feeds), reference(made, feeds), 8 * HALF * 10**0.5)
