"""ARM targets: names, code for them from any machine, and the same numbers as ONNX Runtime's, emulated."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from graphopt.arm_cores import ARM_FEATURES, BOARDS
from graphopt.cli import group
from graphopt.errors import ArtifactError, DataError, SpecError, TargetError
from graphopt.plugins import parse_target
from graphopt.remote.address import Address
from graphopt.remote.emulator import QEMU_CPUS
from graphopt.remote.engine import RemoteEngine
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.arm import Arm
from graphopt.targets.relax import link
from tests.targets.arm_folders import build
from tests.targets.integer_models import integer_conv, quantized_conv
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform

AARCH64 = 183
"""e_machine in an ELF header."""


@pytest.mark.parametrize(
    ("text", "core"),
    [("arm", "generic"), ("arm{mcpu=cortex-a72}", "cortex-a72"), ("arm{mcpu=a76}", "cortex-a76"),
     ("arm{mcpu=n1}", "neoverse-n1"), ("arm{mcpu=m1}", "apple-a14"), ("arm{device=rpi4}", "cortex-a72")],
)  # fmt: skip
def test_cores_have_many_names(text, core):
    target = parse_target(text)
    assert isinstance(target, Arm) and target.llvm_cpu == core and parse_target(str(target)) == target
    assert target.features == ARM_FEATURES[core]


@pytest.mark.parametrize(
    ("text", "said"),
    [("arm{mcpu=cortx-a72}", "cortex-a72"), ("arm{device=rpi44}", "rpi4"), ("arm{mcpu=a72,device=rpi4}", "both"),
     ("arm{precision=bf17}", "precision")],
)  # fmt: skip
def test_what_is_no_core_names_the_nearest(text, said):
    with pytest.raises(SpecError) as caught:
        parse_target(text)
    assert said in f"{caught.value} {caught.value.hint}"


def test_all_processors_are_listed():
    result = CliRunner().invoke(group, ["targets", "--format", "json"], standalone_mode=False)
    found = json.loads(result.output)
    assert {"cpu", "arm"} <= set(found["targets"])
    for name, said in found["processors"].items():
        assert parse_target(name).capabilities.describe().items() <= said.items()
    assert found["processors"]["arm{device=rpi5}"]["int8 dot product"] == "sdot"
    text = CliRunner().invoke(group, ["targets"], standalone_mode=False)
    assert "arm{device=rpi4}" in text.output and "Raspberry Pi 4" in text.output


def test_abilities_follow_the_core():
    found = {core: Arm(mcpu=core).capabilities for core in ARM_FEATURES}
    assert found["cortex-a53"].dot_int8 == "smlal" and found["cortex-a76"].dot_int8 == "sdot"
    assert found["neoverse-v1"].dot_int8 == "i8mm"
    assert all(each.arch == "aarch64" and each.activation_dtype == "int8" for each in found.values())
    assert all(board.core in ARM_FEATURES for board in BOARDS.values())
    assert Arm(device="rpi5").thread_count == BOARDS["rpi5"].cores and Arm(threads=2).thread_count == 2


def test_llvm_knows_every_core():
    import tvm
    from tvm.target import codegen

    any_arm: Any = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic"})
    assert set(ARM_FEATURES) <= set(codegen.llvm_get_cpu_archlist(any_arm))


def test_a_library_is_for_the_other_processor_and_refused_here(tmp_path):
    if link.find_linker("aarch64") is None:
        pytest.skip(f"no linker for aarch64: {link.cross_remedy('aarch64')}")
    made, feeds = convolutions(1)
    folder = build(made, Arm(mcpu="cortex-a72", threads=1), tmp_path / "built")
    head = (folder / "model.so").read_bytes()[:20]
    assert head[:4] == b"\x7fELF" and struct.unpack("<H", head[18:20])[0] == AARCH64
    if link.host_arch() != "aarch64":
        with pytest.raises(ArtifactError, match="aarch64"):
            TvmEngine(folder, 1).run(feeds)


def test_no_cross_linker_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "host_arch", lambda: "x86_64")
    monkeypatch.setattr(link.shutil, "which", {"cc": "/bin/cc"}.get)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="no linker for aarch64") as caught:
        link.link_shared(tmp_path / "a.so", [], "aarch64")
    assert "graphopt[cross]" in str(caught.value.hint) and "g++-aarch64-linux-gnu" in str(caught.value.hint)
    here = {"aarch64-linux-gnu-ld": "/bin/cross-ld", "ld.lld": "/bin/ld.lld"}
    monkeypatch.setattr(link.shutil, "which", here.get)
    assert link.find_linker("aarch64") == ["/bin/cross-ld"]
    del here["aarch64-linux-gnu-ld"]
    assert link.find_linker("aarch64") == ["/bin/ld.lld"]


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    if link.find_linker("aarch64") is None:
        pytest.skip(f"no linker for aarch64: {link.cross_remedy('aarch64')}")
    made, _ = convolutions(2)
    folder = build(made, Arm(threads=1), tmp_path / "built")
    with pytest.raises(TargetError, match=r"no RPC server answers at 127\.0\.0\.1:1"):
        RemoteEngine(folder, Address("127.0.0.1", 1, "none"))


def convolutions(seed: int):
    """Kernels of many kinds: strides, groups, depthwise, odd channels, pooling, a residual, a matrix product."""
    rng = np.random.default_rng(seed)
    channels = int(rng.integers(3, 20))
    x = uniform(seed, 1, channels, 15, 13)
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "w1"], ["d"], pads=[1, 1, 1, 1], group=24),
        node("Add", ["d", "ar"], ["s"]),
        node("HardSwish", ["s"], ["h"]),
        node("Conv", ["h", "w2"], ["g"], group=3, strides=[2, 1]),
        node("MaxPool", ["g"], ["p"], kernel_shape=[2, 2]),
        node("GlobalAveragePool", ["p"], ["m"]),
        node("Flatten", ["m"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["y"], transB=1),
    ]
    constants = {
        "w0": uniform(seed + 1, 24, channels, 3, 3), "b0": uniform(seed + 2, 24), "w1": uniform(seed + 3, 24, 1, 3, 3),
        "w2": uniform(seed + 4, 21, 8, 3, 2), "w3": uniform(seed + 5, 7, 21), "b3": uniform(seed + 6, 7),
    }  # fmt: skip
    return model(nodes, {"x": x}, ["y"], constants), {"x": x}


def bytes_model(seed: int):
    """A convolution of bytes, and the sums it must give exactly."""
    nodes, feeds, constants = quantized_conv(seed, (1, 6, 9, 7), 10, (3, 3), zero=117, pads=[1, 1, 1, 1])
    sums = integer_conv(feeds["x"], constants["w"], 117, pads=(1, 1, 1, 1))
    return model(nodes, feeds, ["y"], constants), feeds, sums.astype(np.float32)


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1"])
def test_emulated_cores_compute_what_onnx_runtime_does(cpu, device, tmp_path):
    made, feeds = convolutions(len(cpu))
    engine = RemoteEngine(build(made, Arm(mcpu=cpu, threads=1), tmp_path / "built"), device(QEMU_CPUS.get(cpu, cpu)))
    wanted = reference(made, feeds)
    for _ in range(2):  # the second run finds the memory of the first
        close(engine.run(feeds), wanted, sum_tolerance(24 * 9 * 4))
    made, fed, sums = bytes_model(len(cpu))
    exact = RemoteEngine(build(made, Arm(mcpu=cpu, threads=1), tmp_path / "bytes"), device(QEMU_CPUS.get(cpu, cpu)))
    np.testing.assert_array_equal(exact.run(fed)["y"], sums)
    with pytest.raises(DataError, match="missing"):
        engine.run({})
    with pytest.raises(DataError, match="float64"):
        engine.run({"x": feeds["x"].astype(np.float64)})
