"""Racing real workers: what they report, and what happens when one misbehaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import DataError, EnvironmentMismatchError, MeasurementError
from graphopt.measure import (
    Contender,
    Environment,
    Leniency,
    PairedResult,
    Verdict,
    compare,
    compare_saved,
    race,
    time_reference,
    wire,
)
from graphopt.measure.lineup import Lineup

ROWS, WIDTH = 32, 128


def chain(path: Path, products: int) -> Path:
    """`products` dependent matrix products of (32, 128) by (128, 128), about 10 us each."""
    weight = np.eye(WIDTH, dtype=np.float32)[::-1] * np.float32(0.99)
    names = ["x", *(f"v{i}" for i in range(1, products)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"m{i}") for i in range(products)]
    shape = [ROWS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, f"w{i}") for i in range(products)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Contender:
    return Contender.onnx(chain(tmp_path_factory.mktemp("light") / "light.onnx", 4))


@pytest.fixture(scope="module")
def heavy(tmp_path_factory) -> Contender:
    return Contender.onnx(chain(tmp_path_factory.mktemp("heavy") / "heavy.onnx", 24))


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    return {"x": np.ones((ROWS, WIDTH), np.float32)}


def test_a_race_finds_who_does_more_work(light, heavy, feeds):
    result = race([light, heavy], feeds, rounds=6, seed=3)
    assert result.names == ("light.onnx", "heavy.onnx")
    assert result.rounds == 6
    assert not result.failed
    ratio = result.ratio("heavy.onnx", "light.onnx")  # six times the arithmetic, and some fixed cost
    assert 1.5 < ratio.low <= ratio.median < 12
    assert result.ratio("light.onnx", "heavy.onnx").median == pytest.approx(1 / ratio.median, rel=0.2)
    for turns in result.bursts.values():
        assert all(len(burst) >= 3 and min(burst) > 0 for burst in turns)
    again = PairedResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result
    assert again.ratio("heavy.onnx", "light.onnx") == ratio
    with pytest.raises(MeasurementError, match="no figures for 'other'"):
        result.ratio("other", "light.onnx")


def test_seconds_bound_the_race_and_threads_go_to_sleep(light, feeds):
    result = race([light], feeds, threads=2, seconds=1.0)
    assert result.rounds >= 5
    assert result.environment.machine["threads"] == 2


class Recorder:
    """A progress display that adds up what it is told."""

    def __init__(self) -> None:
        self.total, self.steps = 0.0, 0.0

    @contextlib.contextmanager
    def task(self, label: str, total: float):
        self.total = total

        def advance(steps: float) -> None:
            assert steps >= 0
            self.steps += steps

        yield advance

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.mark.parametrize("budget", [{"seconds": 0.2}, {"rounds": 2}])
def test_progress_ends_at_its_total(light, feeds, budget):
    progress = Recorder()
    race([light], feeds, progress=progress, **budget)
    assert progress.steps == pytest.approx(progress.total)


def test_a_compiled_folder_races_the_model_it_came_from(tmp_path):
    from graphopt import model as models
    from graphopt.samples import random_feeds
    from graphopt.targets.cpu import Cpu

    digits = Path(__file__).resolve().parent.parent / "examples" / "digits" / "digits.onnx"
    model = models.fix_inputs(models.load(digits), {"image": (1, 1, 16, 16)})
    target = Cpu(threads=1)
    lowered = target.lower(model)
    target.tune(lowered, seconds=0, database=tmp_path / "database.jsonl")
    (tmp_path / "compiled").mkdir()
    target.build(lowered, tmp_path / "compiled")
    feeds = random_feeds(models.signature(model))
    result = race([Contender.onnx(digits), Contender.compiled(tmp_path / "compiled", "tvm")], feeds, rounds=5)
    assert not result.failed
    assert 0.05 < result.ratio("tvm", "digits.onnx").median < 50


def test_who_cannot_run_is_named_and_left_out(light, feeds, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    result = race([light, Contender.onnx(broken), Contender.onnx(tmp_path / "gone.onnx")], feeds, rounds=1)
    assert result.names == ("light.onnx",)
    assert "ONNX Runtime cannot load" in result.failed["broken.onnx"]
    assert "no such file" in result.failed["gone.onnx"]
    with pytest.raises(MeasurementError, match=r"no figures for 'gone.onnx': .*no such file"):
        result.ratio("gone.onnx", "light.onnx")


def test_nobody_left_is_an_error(light, tmp_path):
    with pytest.raises(MeasurementError, match=r"is tensor.float. of shape"):
        race([light], {"x": np.ones((1, 1), np.float32)}, rounds=1)
    with pytest.raises(MeasurementError, match="nothing to time"):
        race([], {}, rounds=1)
    with pytest.raises(MeasurementError, match="two contenders are named"):
        race([light, light], {}, rounds=1)
    with pytest.raises(MeasurementError, match="rounds must be"):
        race([light], {}, rounds=0)
    with pytest.raises(MeasurementError, match="cannot be timed"):
        race([light], {"x": np.array(["text"])}, rounds=1)
    with pytest.raises(MeasurementError, match="no such file or folder"):
        Contender.of(tmp_path / "gone")


def test_an_awkward_input_name_reaches_the_model(tmp_path):
    path = chain(tmp_path / "m.onnx", 1)
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = "file"
    onnx.save(model, path)
    assert race([Contender.onnx(path)], {"file": np.ones((ROWS, WIDTH), np.float32)}, rounds=1).rounds == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGILL, "SIGILL.*another processor"),
        (signal.SIGKILL, "SIGKILL.*out of memory"),
        (signal.SIGSEGV, "SIGSEGV"),
    ],
)
def test_a_crash_is_one_clear_line(light, feeds, number, says):
    with Lineup([light], feeds, threads=1, timeout_s=30) as lineup:
        racer = lineup.racers["light.onnx"]
        racer.burst()
        os.kill(racer.pid, number)
        with pytest.raises(MeasurementError, match=f"light.onnx was killed by {says}") as caught:
            racer.burst()
        assert "\n" not in str(caught.value)


def test_a_hang_is_ended(light, feeds):
    with Lineup([light], feeds, threads=1, timeout_s=60) as lineup:
        racer = lineup.racers["light.onnx"]
        racer.timeout_s = 0.5
        os.kill(racer.pid, signal.SIGSTOP)
        with pytest.raises(MeasurementError, match=r"no answer within .* s while timing"):
            racer.burst()
        assert not _alive(racer.pid)


def test_a_crash_in_the_middle_drops_one_contender(light, heavy, feeds):
    from graphopt.measure.paired import turns

    with Lineup([light, heavy], feeds, threads=1, timeout_s=30) as lineup:
        rounds = turns(lineup, 0)
        assert set(next(rounds)) == {"light.onnx", "heavy.onnx"}
        os.kill(lineup.racers["heavy.onnx"].pid, signal.SIGKILL)
        assert set(next(rounds)) == {"light.onnx"}
        assert "SIGKILL" in lineup.failed["heavy.onnx"]


def test_memory_that_is_not_there_is_not_asked_for(light, feeds, monkeypatch):
    import psutil

    class Scarce:
        available = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Scarce)
    with pytest.raises(MeasurementError, match=r"needs about .* MB, 1 MB are free; time fewer"):
        race([light], feeds, rounds=1)


def test_workers_die_with_their_parent(light):
    script = (
        "import os, signal, sys, numpy\n"
        "from graphopt.measure import Contender\n"
        "from graphopt.measure.lineup import Lineup\n"
        f"feeds = {{'x': numpy.ones(({ROWS}, {WIDTH}), numpy.float32)}}\n"
        "lineup = Lineup([Contender.onnx(sys.argv[1])], feeds, threads=1, timeout_s=60)\n"
        "print(next(iter(lineup.racers.values())).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(light.path)], capture_output=True, timeout=60, check=False)
    worker = int(done.stdout)
    limit = time.monotonic() + 10
    while _alive(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not _alive(worker)


def test_a_script_without_a_main_guard_is_not_run_again(light, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy\n"
        "print('started')\n"
        "from graphopt.measure import Contender, race\n"
        f"feeds = {{'x': numpy.ones(({ROWS}, {WIDTH}), numpy.float32)}}\n"
        "print(race([Contender.onnx(sys.argv[1])], feeds, rounds=1).rounds)\n"
    )
    command = [sys.executable, str(script), str(light.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["started", "1"], done.stderr


def test_what_libraries_print_does_not_reach_the_answers(tmp_path):
    script = (
        "import os, sys, types\n"
        "from graphopt.measure import worker\n"
        "class Engine:\n"
        "    def __init__(self, path, threads): print('loading'); os.write(1, b'from C')\n"
        "    def run(self, feeds): os.write(1, b'running'); print('running')\n"
        "sys.modules['loud'] = types.SimpleNamespace(Engine=Engine)\n"
        "worker._ENGINES['loud'] = ('loud', 'Engine')\n"
        "worker.main(os.getppid())\n"
    )
    wire.save_feeds({}, tmp_path / "feeds.npz")
    requests = (
        {"do": "open", "engine": "loud", "path": ".", "threads": 1, "feeds": str(tmp_path / "feeds.npz")},
        {"do": "warm up", "seconds": 0.01},
        {"do": "burst", "seconds": 0.001, "at_least": 3, "keep": 3},
    )
    child = subprocess.run(
        [sys.executable, "-c", script],
        input=b"".join(map(wire.encode, requests)),
        capture_output=True,
        timeout=60,
        check=True,
    )
    answers = tmp_path / "answers"
    answers.write_bytes(child.stdout)
    with answers.open("rb") as stream:
        got = [wire.read(stream) for _ in range(4)]
    assert got[0] == {"ready": True}
    assert got[1] is not None
    assert got[1]["runs"] >= 2
    assert got[2] is not None
    assert len(got[2]["samples_s"]) == 3
    assert got[3] is None
    assert b"from C" in child.stderr


def test_measuring_imports_no_engine():
    heavy = {"tvm", "onnxruntime", "onnxscript", "onnxsim"}
    code = f"import sys, graphopt.measure, graphopt.samples; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_several_times_the_work_is_slower(light, heavy, feeds):
    comparison = compare(light, heavy, feeds, max_regression=0.2, seconds=60)
    assert comparison.verdict is Verdict.SLOWER, comparison.describe()
    assert comparison.exit_code == 4
    assert len(comparison.runs) == 2  # confirmed by a rerun
    assert comparison.ratio.low > 1.5
    assert comparison.describe().startswith("SLOWER: heavy.onnx takes ")
    json.dumps(comparison.to_dict(), allow_nan=False)
    assert compare(heavy, light, feeds, max_regression=0.2, seconds=30).verdict is Verdict.FASTER


def test_a_model_is_not_slower_than_itself(light, feeds):
    comparison = compare(light, light, feeds, max_regression=0.25, seconds=10)
    assert comparison.verdict is not Verdict.SLOWER, comparison.describe()
    assert comparison.exit_code in (0, 5)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_no_time_gives_no_verdict(light, heavy, feeds):
    comparison = compare(light, heavy, feeds, seconds=0.0)
    assert comparison.verdict is Verdict.INCONCLUSIVE
    assert comparison.exit_code == 5
    assert "allow more seconds" in comparison.describe()
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_comparing_what_does_not_start_is_an_error(light, feeds, tmp_path):
    with pytest.raises(MeasurementError, match=r"gone\.onnx: .*no such file"):
        compare(light, Contender.onnx(tmp_path / "gone.onnx"), feeds)
    with pytest.raises(MeasurementError, match="max_regression"):
        compare(light, light, feeds, max_regression=-0.1)


def saved(name: str, seconds: float, rounds: int = 30, machine: str = "a", version: str = "1") -> PairedResult:
    rng = np.random.default_rng(len(name))
    bursts = tuple(tuple(seconds * rng.lognormal(0, 0.02, 20)) for _ in range(rounds))
    return PairedResult({name: bursts}, 1, 0, Environment({"cpu": machine, "threads": 1}, {"graphopt": version}))


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [(1.0, Verdict.SAME), (1.3, Verdict.SLOWER), (0.7, Verdict.FASTER), (1.05, Verdict.INCONCLUSIVE)],
)
def test_saved_latencies_of_one_machine(seconds, verdict):
    comparison = compare_saved(saved("base", 1.0), saved("new!", seconds), max_regression=0.05)
    assert comparison.verdict is verdict
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_saved_latencies_of_two_machines_are_refused():
    with pytest.raises(
        EnvironmentMismatchError, match=r"different conditions \(cpu: a, b\).*measure both on one"
    ) as caught:
        compare_saved(saved("base", 1.0), saved("new", 1.0, machine="b"))
    assert caught.value.exit_code == 2


def test_versions_may_differ_only_where_that_is_said():
    pair = saved("base", 1.0), saved("new!", 1.0, version="2")
    with pytest.raises(EnvironmentMismatchError, match=r"graphopt 1 -> 2.*--any-versions"):
        compare_saved(*pair)
    comparison = compare_saved(*pair, leniency=Leniency(any_versions=True))
    assert comparison.verdict is Verdict.SAME
    assert "graphopt 1 -> 2" in comparison.describe()


NORMALISE = Leniency(normalise=True)


def elsewhere(seconds: float, **kernels: float) -> PairedResult:
    return replace(saved("new", seconds, machine="b"), reference=kernels)


def test_figures_of_two_machines_are_normalised_when_asked():
    """The other machine takes twice the time for the kernels; so does the model: nothing changed."""
    base = replace(saved("base", 1.0), reference={"matmul": 1.0, "memory": 1.0, "old": 1.0})
    same = compare_saved(base, elsewhere(2.0, matmul=2.0, memory=2.0), leniency=NORMALISE)
    assert same.verdict is Verdict.SAME
    assert same.ratio.median == pytest.approx(1.0, abs=0.02)
    assert "NORMALISED by reference kernels" in same.describe()
    assert "cpu: a, b" in same.describe()
    apart = compare_saved(base, elsewhere(2.0, matmul=2.5, memory=1.6), leniency=NORMALISE)
    assert apart.verdict is Verdict.INCONCLUSIVE  # the kernels do not agree well enough to tell
    assert apart.ratio.low < 0.85 < 1.2 < apart.ratio.high


def test_normalised_figures_fail_only_when_asked():
    base = replace(saved("base", 1.0), reference={"matmul": 1.0})
    slower = elsewhere(3.0, matmul=2.0)
    soft = compare_saved(base, slower, leniency=NORMALISE)
    assert (soft.verdict, soft.exit_code) == (Verdict.INCONCLUSIVE, 5)
    assert "NORMALISED" in soft.reason
    hard = compare_saved(base, slower, leniency=Leniency(normalise=True, fail_normalised=True))
    assert hard.exit_code == 4
    with pytest.raises(MeasurementError, match="without reference kernels"):
        compare_saved(base, saved("new", 1.0, machine="b"), leniency=NORMALISE)


def test_reference_kernels_are_timed_and_kept():
    found = time_reference(1, seconds=0.01)
    assert set(found) == {"matmul", "convolution", "memory"}
    assert all(0 < seconds < 1 for seconds in found.values())
    result = replace(saved("a", 1.0), reference=found)
    content = json.loads(json.dumps(result.to_dict()))
    assert PairedResult.from_dict(content).reference == found
    content["reference_s"]["matmul"] = -1
    with pytest.raises(DataError, match="damaged"):
        PairedResult.from_dict(content)


def test_few_saved_rounds_decide_nothing():
    assert compare_saved(saved("b", 1.0), saved("n", 2.0, rounds=5)).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(kind="other"),
        lambda d: d.update(schema=99),
        lambda d: d.pop("environment"),
        lambda d: d["contenders"]["b"].update(samples_s=[-1.0]),
        lambda d: d["contenders"]["b"].update(samples_s="text"),
        lambda d: d.update(contenders=[]),
    ],
)
def test_damaged_latencies_are_refused(change):
    data = json.loads(json.dumps(saved("b", 1.0).to_dict()))
    change(data)
    with pytest.raises(DataError, match="saved latencies"):
        PairedResult.from_dict(data)


def _alive(pid: int) -> bool:
    """Running: neither gone nor a zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
