"""Tuning for a processor that is not there: by instructions in the emulator, with LLVM's model of the core beside."""

from __future__ import annotations

import pytest

from graphopt.errors import TargetError
from graphopt.remote import emulator, instructions
from graphopt.remote.instructions import Block
from graphopt.targets.arm import Arm
from graphopt.targets.tuning import counted_search, pipeline_model
from graphopt.targets.tuning.pipeline_model import PipelineModel
from tests.targets.oracle import model, node, uniform

A72 = Arm(mcpu="cortex-a72", threads=1)


class Notes:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def task(self, label, total):
        from graphopt.progress import SILENT

        return SILENT.task(label, total)


def two_convolutions():
    x = uniform(1, 1, 16, 14, 14)
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "v"], ["y"], strides=[2, 2]),
    ]
    made = model(nodes, {"x": x}, ["y"], {"w": uniform(2, 24, 16, 1, 1), "v": uniform(3, 8, 24, 3, 3)})
    return made, {"x": x}


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Skips where nothing can be counted; else a cache of its own."""
    if emulator.find_emulator("aarch64") is None or emulator.find_system("aarch64") is None:
        pytest.skip(f"no emulator of aarch64: {emulator.remedy('aarch64')}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            instructions.plugin(instructions.find_counting_emulator("aarch64"))
            instructions.counted_program("aarch64")
        except TargetError as error:
            pytest.skip(f"{error}; {error.hint}")
        yield


@pytest.fixture
def llvm():
    if pipeline_model.find_tools() is None:
        pytest.skip(f"no llvm-mca: {pipeline_model.REMEDY}")
    return PipelineModel("aarch64", "cortex-a72", A72.features)


def test_the_fewest_instructions_win(counting, tmp_path):
    made, feeds = two_convolutions()
    lowered = A72.lower(made)
    first = A72.lower(made)
    database = tmp_path / "schedules.jsonl"
    report = A72.tune(lowered, seconds=40, database=database, progress=Notes())
    assert report.unit == "instructions" and report.trials >= 1 and not database.exists()
    rows = {row["workload"]: row for row in report.rows}
    assert all(row["time_us"] is None for row in rows.values())
    (tmp_path / "built").mkdir()
    A72.build(lowered, tmp_path / "built")
    counted = instructions.count_instructions(tmp_path / "built", feeds, "cortex-a72").by_kernel
    for name, row in rows.items():  # what is delivered is what was counted
        assert row["instructions"] * row["calls"] == counted.get(name, 0)
    (tmp_path / "first").mkdir()
    A72.build(first, tmp_path / "first")
    before = instructions.count_instructions(tmp_path / "first", feeds, "cortex-a72").by_kernel
    assert all(counted[name] <= before[name] for name in before)


def test_a_candidate_must_save_more_than_the_prediction_knows(counting, tmp_path, monkeypatch):
    made, _ = two_convolutions()
    lowered = A72.lower(made)
    search = counted_search.CountedSearch(lowered, A72, tmp_path / "schedules.jsonl", 0, Notes())
    kernel = max(search.kernels, key=lambda k: len(k.task.choices))
    kernel.settle(0, 1000)
    kernel.settle(1, 990)
    assert kernel.best == 0 and kernel.fruitless == 1
    kernel.settle(2, 900)
    assert kernel.best == 2 and kernel.fruitless == 0
    for position in (3, 4, 5):
        kernel.settle(position, None)
    assert kernel.best == 2 and kernel.next_position is None


def test_a_round_that_cannot_be_built_leaves_what_was_best(counting, tmp_path, monkeypatch):
    made, _ = two_convolutions()
    lowered, notes = A72.lower(made), Notes()
    search = counted_search.CountedSearch(lowered, A72, tmp_path / "schedules.jsonl", 0, notes)
    real = search._round

    def failing(folder, candidates):
        if candidates:
            raise TargetError("no such instruction")
        return real(folder, candidates)

    monkeypatch.setattr(search, "_round", failing)
    report = search.run(60)
    assert report.trials == counted_search.PATIENCE and "no such instruction" in notes.said[-1]
    assert all(kernel.best == 0 for kernel in search.kernels)


def test_without_an_emulator_first_decisions_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "find_emulator", lambda arch: None)
    made, _ = two_convolutions()
    notes = Notes()
    report = A72.tune(A72.lower(made), seconds=5, database=tmp_path / "schedules.jsonl", progress=notes)
    assert report.trials == 0 and "not tuned: QEMU is not installed" in notes.said[0]


def test_the_model_knows_the_core(llvm):
    """A chain of additions waits for each; a multiply-add a cycle is what one of two 64-bit pipes each makes."""
    (chain,) = llvm.cycles_of([["fadd v0.4s, v0.4s, v1.4s"] * 10])
    (independent,) = llvm.cycles_of([[f"fadd v{i}.4s, v{i}.4s, v31.4s" for i in range(10)]])
    assert chain > 2 * independent
    peak = llvm.peak("float32")
    assert peak is not None and 2 <= peak <= 8 and llvm.peak("int8") is None and llvm.peak("none") is None
    with_dots = PipelineModel("aarch64", "cortex-a76", Arm(mcpu="cortex-a76").features)
    wide, bytes_ = with_dots.peak("float32"), with_dots.peak("int8")
    assert wide is not None and bytes_ is not None and bytes_ > 2 * wide


def test_cycles_of_a_kernel_are_at_least_its_arithmetic(counting, llvm, tmp_path):
    made, feeds = two_convolutions()
    (tmp_path / "built").mkdir()
    A72.build(A72.lower(made), tmp_path / "built")
    counts = instructions.count_instructions(tmp_path / "built", feeds, "cortex-a72")
    cycles = llvm.kernel_cycles(tmp_path / "built" / "model.so", counts.blocks)
    assert cycles.keys() == counts.blocks.keys()
    least = 24 * 16 * 14 * 14 / (llvm.peak("float32") or 1)
    (first,) = (name for name, _ in counts.calls if name.startswith("fused_conv2d") and "relu" in name)
    # One part in fifty for how the model starts and ends, which makes the peak a little less than it is.
    assert 0.98 * least <= cycles[first] <= 3 * least
    twice = {first: tuple(Block(b.offset, b.instructions, 2 * b.times) for b in counts.blocks[first])}
    assert llvm.kernel_cycles(tmp_path / "built" / "model.so", twice)[first] == pytest.approx(2 * cycles[first])


def test_code_that_llvm_cannot_read_is_said(llvm, tmp_path):
    with pytest.raises(TargetError, match="cortex-a72"):
        llvm.cycles_of([["no such instruction"]])
    (tmp_path / "model.so").write_bytes(b"text")
    with pytest.raises(TargetError, match="llvm-objdump"):
        llvm.kernel_cycles(tmp_path / "model.so", {})


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(pipeline_model.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="llvm-mca") as caught:
        PipelineModel("aarch64", "cortex-a72", A72.features)
    assert caught.value.hint == pipeline_model.REMEDY
