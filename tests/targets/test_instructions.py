"""Counting the instructions of an inference in the emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import ArtifactError, DataError, TargetError
from graphopt.remote import instructions
from graphopt.remote.elf_functions import read_functions
from graphopt.remote.emulator import find_emulator, find_system, remedy
from graphopt.remote.instructions import InstructionCounts, count_instructions
from graphopt.targets.arm import Arm
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform

LANES = 4
WITHIN = 2000
"""Instructions by which two counts of one model may differ: the C library's work depends on where memory lies (zeroing
and copying take up to 64 bytes' worth of single steps more at each end, for each of a few tensors), nothing else's."""


def convolution(channels: int, out: int, size: int):
    """A 5x5 convolution (no Winograd) with ReLU, its feeds and its multiply-accumulates."""
    x = uniform(1, 1, channels, size, size)
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    w = uniform(2, out, channels, 5, 5)
    return model(nodes, {"x": x}, ["y"], {"w": w}), {"x": x}, out * channels * 25 * (size - 4) ** 2


def build(made, folder: Path, **options) -> Path:
    folder.mkdir()
    target = Arm(**{"mcpu": "cortex-a72", "threads": 1, **options})
    target.build(target.lower(made), folder)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a compiled model, its feeds, what it should compute, its multiply-accumulates.

    Skips where nothing can be counted.
    """
    if find_emulator("aarch64") is None or find_system("aarch64") is None:
        pytest.skip(f"no emulator of aarch64: {remedy('aarch64')}")
    folder = tmp_path_factory.mktemp("counted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(folder / "cache"))
        try:
            instructions.plugin(instructions.find_counting_emulator("aarch64"))
            instructions.counted_program("aarch64")
        except TargetError as error:
            pytest.skip(f"{error}; {error.hint}")
        made, feeds, macs = convolution(8, 16, 16)
        yield build(made, folder / "built"), feeds, reference(made, feeds), macs


def test_counts_are_right_and_the_same_every_time(built):
    folder, feeds, wanted, macs = built
    first, second = (count_instructions(folder, feeds, "cortex-a72") for _ in range(2))
    close(first.outputs, wanted, sum_tolerance(8 * 25))
    assert abs(first.total - second.total) <= WITHIN
    assert first.calls == second.calls  # kernels do the same whatever the addresses
    assert 0 < sum(first.by_kernel.values()) <= first.total
    (kernel, *_) = first.by_kernel
    for name, blocks in first.blocks.items():  # the same instructions, by place
        assert sum(block.instructions * block.times for block in blocks) == first.by_kernel[name]
    assert first.blocks.keys() == first.by_kernel.keys()
    assert "conv2d" in kernel
    # A vector instruction makes LANES products, and none needs more than a load of each operand beside it.
    assert macs / LANES <= first.by_kernel[kernel] <= 3 * macs / LANES


def test_instructions_do_not_depend_on_the_emulated_core(built):
    folder, feeds, _, _ = built
    assert (
        count_instructions(folder, feeds, "cortex-a53").calls == count_instructions(folder, feeds, "cortex-a76").calls
    )


def test_calls_of_one_kernel_are_told_apart(built, tmp_path):
    x = uniform(3, 1, 8, 12, 12)
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[2, 2, 2, 2]), node("Conv", ["a", "v"], ["y"], pads=[2, 2, 2, 2])]
    made = model(nodes, {"x": x}, ["y"], {"w": uniform(4, 8, 8, 5, 5), "v": uniform(5, 8, 8, 5, 5)})
    found = count_instructions(build(made, tmp_path / "twice"), {"x": x}, "cortex-a72")
    convolutions = [count for name, count in found.calls if "conv2d" in name]
    assert len(convolutions) == 2 and convolutions[0] == convolutions[1]
    assert sum(convolutions) == max(found.by_kernel.values())


def test_worker_threads_are_not_needed(built, tmp_path):
    """A model that was built for several threads runs on one, and takes about as many instructions."""
    made, feeds, _ = convolution(8, 16, 16)
    alone = count_instructions(built[0], feeds, "cortex-a72")
    shared = count_instructions(build(made, tmp_path / "four", threads=4), feeds, "cortex-a72")
    assert alone.total <= shared.total + WITHIN and shared.total <= 1.2 * alone.total


def test_more_work_counts_more(built, tmp_path):
    made, feeds, macs = convolution(16, 16, 16)
    more = count_instructions(build(made, tmp_path / "double"), feeds, "cortex-a72")
    assert more.total - count_instructions(built[0], built[1], "cortex-a72").total >= (macs - built[3]) / LANES


def test_what_is_missing_is_said(built, tmp_path, monkeypatch):
    folder, feeds, _, _ = built
    with pytest.raises(DataError, match="'x' is missing"):
        count_instructions(folder, {}, "cortex-a72")
    with pytest.raises(DataError, match="float64"):
        count_instructions(folder, {"x": feeds["x"].astype(np.float64)}, "cortex-a72")
    with pytest.raises(ArtifactError, match="missing"):
        count_instructions(tmp_path, feeds, "cortex-a72")
    with pytest.raises(TargetError, match="no-such-core"):
        count_instructions(folder, feeds, "no-such-core")
    monkeypatch.setattr(instructions, "find_c_compiler", lambda: None)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    with pytest.raises(TargetError, match="no C compiler") as caught:
        count_instructions_plugin_only()
    assert "gcc" in str(caught.value.hint)
    monkeypatch.setattr(instructions.emulator, "find_emulator", lambda arch: None)
    with pytest.raises(TargetError, match="QEMU") as caught:
        instructions.find_counting_emulator("aarch64")
    assert "qemu-user" in str(caught.value.hint)


def count_instructions_plugin_only() -> None:
    instructions.plugin(instructions.find_counting_emulator("aarch64"))


def test_an_emulator_without_plugins_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / "qemu-aarch64"
    fake.write_text("#!/bin/sh\necho '-cpu model'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(instructions.emulator, "find_emulator", lambda arch: str(fake))
    with pytest.raises(TargetError, match="takes no plugins"):
        instructions.find_counting_emulator("aarch64")


def test_what_is_no_library_has_no_functions(tmp_path):
    file = tmp_path / "model.so"
    with pytest.raises(ArtifactError, match="cannot read"):
        read_functions(file)
    file.write_bytes(b"text")
    with pytest.raises(ArtifactError, match="no library"):
        read_functions(file)
    file.write_bytes(b"\x7fELF\x02\x01" + bytes(34) + b"\xff" * 24)
    with pytest.raises(ArtifactError, match="damaged"):
        read_functions(file)


def test_kernels_are_summed_from_calls():
    counts = InstructionCounts(100, (("a", 10), ("b", 30), ("a", 25)))
    assert counts.by_kernel == {"a": 35, "b": 30} and list(counts.by_kernel) == ["a", "b"]
    assert counts.elsewhere == 35
