"""Work that may crash runs in a process of its own: what it returns and raises comes back, and a crash is an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt import guard
from graphopt import model as models
from graphopt.checking import know_operators
from graphopt.errors import ModelError, TargetError
from graphopt.guard import client
from graphopt.rehearsal import rehearse
from graphopt.samples import random_feeds
from graphopt.targets.llvm import load_compiler
from graphopt.tuning import resolve_target, tune_model
from tests import guard_jobs as jobs
from tests.conftest import ROOT
from tests.models import save_small_cnn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="work is guarded on Linux only")
DIGITS = ROOT / "examples" / "digits" / "digits.onnx"


@pytest.fixture(autouse=True)
def _isolated(monkeypatch):
    monkeypatch.delenv(client.SWITCH, raising=False)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- what comes back -------------------------------------------------------------------------------------------------


def test_what_the_work_returns_comes_back():
    found = guard.guarded(jobs.whereabouts, {})
    assert found["pid"] != os.getpid()
    assert found["parents"][2] == os.getpid()
    assert found["infinite"] == float("inf")
    assert found["threads"] == 1


def test_what_the_work_raises_comes_back():
    with pytest.raises(ModelError) as refused:
        guard.guarded(jobs.refuse, {})
    assert (refused.value.what, refused.value.node, refused.value.hint) == ("what", "n", "do this")
    with pytest.raises(guard.UnexpectedError, match="ZeroDivisionError"):
        guard.guarded(jobs.divide, {"by": 0})
    with pytest.raises(MemoryError):
        guard.guarded(jobs.allocate, {})


@pytest.mark.parametrize(
    ("how", "said"), [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("kill", "SIGKILL"), ("exit", "exit code 7")]
)
def test_a_crash_says_where(how, said):
    with pytest.raises(guard.CrashError, match=f"^{said} at node 'conv1'$"):
        guard.guarded(jobs.end, {"how": how})
    assert guard.guarded(jobs.divide, {"by": 1}) == {"x": 1}


def test_progress_is_told():
    told: list[object] = []

    class Recorded:
        @contextmanager
        def task(self, label, total):
            told.append((label, total))
            yield lambda steps: told.append((label, "+", steps))
            told.append((label, "ended"))

        def note(self, text):
            told.append(text)

    guard.guarded(jobs.tell, {}, Recorded())
    assert told == [
        "a line", ("outer", 3), ("outer", "+", 1), ("inner", 2), ("inner", "+", 2), ("inner", "ended"),
        ("outer", "+", 2), ("outer", "ended"),
    ]  # fmt: skip


def test_a_progress_that_raises_ends_the_work(tmp_path):
    class Refusing:
        @contextmanager
        def task(self, label, total):
            raise ValueError("no")
            yield

        def note(self, text):
            pass

    with pytest.raises(ValueError, match="no"):
        guard.guarded(jobs.tell, {}, Refusing())


def test_environment_folder_and_processors_are_the_clients(tmp_path, monkeypatch):
    guard.guarded(jobs.whereabouts, {})  # the server is there before any of these change
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUARD_TEST", "å")
    whole = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(whole)})
    try:
        found = guard.guarded(jobs.whereabouts, {"name": "GUARD_TEST"})
    finally:
        os.sched_setaffinity(0, whole)
    assert found["cwd"] == str(tmp_path)
    assert found["value"] == "å"
    assert found["processors"] == [min(whole)]


def test_a_folder_that_is_gone_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert guard.guarded(jobs.divide, {"by": 1}) == {"x": 1}


def test_what_is_printed_goes_to_stderr(capfd):
    assert len(guard.guarded(jobs.print_much, {})["text"]) == 1 << 22
    out, err = capfd.readouterr()
    assert out == ""
    assert "to stdout" in err
    assert "to stderr" in err


def test_a_job_within_a_job_stays_where_it_is():
    found = guard.guarded(jobs.nested, {})
    assert found["own"] == found["pid"] != os.getpid()


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(client.SWITCH, "0")
    assert guard.guarded(jobs.whereabouts, {})["pid"] == os.getpid()


def test_what_another_process_cannot_find_is_refused():
    with pytest.raises(ValueError, match="another process"):
        guard.guarded(lambda arguments, progress: {}, {})


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_lets_the_work_keep_what_it_has(tmp_path):
    def interrupt():
        until(lambda: (tmp_path / "started").exists())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        guard.guarded(jobs.keep, {"folder": str(tmp_path)})
    assert (tmp_path / "kept").exists()


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_ends_it(tmp_path):
    def interrupt():
        until((tmp_path / "asleep").exists)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        guard.guarded(jobs.sleep_deaf, {"file": str(tmp_path / "asleep"), "seconds": 600})
    assert time.monotonic() - started < 30
    worker = int((tmp_path / "asleep").read_text().split()[0])
    until(lambda: not runs(worker))


def test_work_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(guard.TimeLimitError, match=r"over 0\.5 s at asleep"):
        guard.guarded(jobs.sleep, {"file": str(tmp_path / "pids"), "seconds": 600}, limit_s=0.5)
    assert not runs(int((tmp_path / "pids").read_text().split()[0]))


@pytest.mark.parametrize("forked", [False, True])
def test_a_client_that_is_killed_leaves_nothing_running(tmp_path, forked):
    """Nor where another process still has its end of the socket: one that C forked off."""
    script = (
        "import ctypes, os, sys; from graphopt import guard; from tests import guard_jobs as jobs\n"
        "guard.guarded(jobs.whereabouts, {})\n"
        "if len(sys.argv) > 2 and ctypes.PyDLL(None).fork() == 0:\n"
        "    ctypes.PyDLL(None).sleep(20); os._exit(0)\n"
        "guard.guarded(jobs.sleep, {'file': sys.argv[1], 'seconds': 600})"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "pids"), *["forked"] * forked], cwd=ROOT)
    until((tmp_path / "pids").exists)
    worker, supervisor, server = map(int, (tmp_path / "pids").read_text().split())
    assert all(map(runs, (worker, supervisor, server)))
    process.kill()
    process.wait()
    until(lambda: not any(map(runs, (worker, supervisor, server))), 10)


def test_a_client_that_ends_leaves_no_server():
    script = (
        "from graphopt import guard; from tests import guard_jobs as jobs\n"
        "print(guard.guarded(jobs.whereabouts, {})['parents'][1])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    until(lambda: not runs(int(done.stdout)), 10)


def test_a_server_that_was_killed_is_started_again():
    server = guard.guarded(jobs.whereabouts, {})["parents"][1]
    os.kill(server, signal.SIGKILL)
    found = guard.guarded(jobs.whereabouts, {})
    assert found["parents"][1] != server


def test_a_server_that_cannot_live_is_told():
    """What is preloaded crashes it, twice."""
    with pytest.raises(guard.CrashError, match="SIGABRT"):
        guard.guarded(jobs.divide, {"by": 1}, preload=os.abort)
    assert guard.guarded(jobs.divide, {"by": 1}) == {"x": 1}


def test_work_whose_server_is_killed_has_crashed(tmp_path):
    def kill():
        until((tmp_path / "pids").exists)
        os.kill(int((tmp_path / "pids").read_text().split()[2]), signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(guard.CrashError, match="SIGKILL at asleep"):
        guard.guarded(jobs.sleep, {"file": str(tmp_path / "pids"), "seconds": 600})


def test_a_process_forked_off_has_a_server_of_its_own():
    script = (
        "import os; from graphopt import guard; from tests import guard_jobs as jobs\n"
        "one = guard.guarded(jobs.whereabouts, {})['parents'][1]\n"
        "child = os.fork()\n"
        "two = guard.guarded(jobs.whereabouts, {})['parents'][1]\n"
        "if child == 0: os._exit(one == two)\n"
        "assert os.waitpid(child, 0)[1] == 0; assert one == two"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=60)


# -- many at once, and a client with threads -------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [None, know_operators, load_compiler])
def test_the_server_has_one_thread(preload):
    """What it imports starts none: forking would not be safe."""
    guard.guarded(jobs.divide, {"by": 1}, preload=preload)
    found = guard.guarded(jobs.threads_above, {}, preload=preload)
    assert found["threads"] == 1
    assert ("tvm" in found["modules"]) == (preload is load_compiler)
    assert "onnxruntime" not in found["modules"]


def test_many_jobs_at_once(tmp_path):
    def one(number: int) -> object:
        if number % 5 == 0:
            with pytest.raises(guard.CrashError, match="SIGABRT"):
                guard.guarded(jobs.end, {"how": "abort"})
        if number % 7 == 0:
            guard.guarded(jobs.sleep, {"file": str(tmp_path / str(number)), "seconds": 0.5})
        return guard.guarded(jobs.divide, {"by": number + 1})["x"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(48))) == [1, *[0] * 47]


def test_a_client_full_of_threads(tmp_path):
    """Pools of BLAS, ONNX Runtime and TVM at work, as in a long run: a fork of this process could hang."""
    import onnxruntime
    import tvm

    loaded = onnxruntime.InferenceSession(str(DIGITS), providers=["CPUExecutionProvider"])
    name, shape = loaded.get_inputs()[0].name, [d if isinstance(d, int) else 1 for d in loaded.get_inputs()[0].shape]
    stop = threading.Event()

    def busy(number: int) -> None:
        a = np.ones((128, 128), np.float32)
        while not stop.is_set():
            loaded.run(None, {name: np.zeros(shape, np.float32)})
            tvm.runtime.tensor(a @ a)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert guard.guarded(jobs.divide, {"by": 1}, limit_s=60) == {"x": 1}
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# -- what is guarded -------------------------------------------------------------------------------------------------


@pytest.fixture
def sabotaged(tmp_path, monkeypatch):
    """A function from a few lines of Python to servers in which they have run; the client has not."""

    def sabotage(lines: str) -> None:
        (tmp_path / "site").mkdir()
        script = "import sys\nif any('graphopt.guard' in each for each in sys.orig_argv):\n"
        (tmp_path / "site" / "sitecustomize.py").write_text(script + "".join(f"    {x}\n" for x in lines.splitlines()))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT}")
        client._stop_all()

    yield sabotage
    client._stop_all()


def test_a_compiler_that_crashes_loses_its_candidate_only(tmp_path, monkeypatch, sabotaged):
    """The run goes on with what ONNX Runtime runs; the error names the node and a file that shows the crash again."""
    sabotaged(
        "import ctypes\n"
        "from graphopt.targets.relax import importer\n"
        "whole = importer.Importer.node\n"
        "def crashing(self, node):\n"
        "    whole(self, node)\n"
        "    if node.op_type == 'Relu':\n"
        "        ctypes.string_at(0)\n"
        "importer.Importer.node = crashing\n"
    )
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    model = save_small_cnn(tmp_path)
    result = graphopt.optimize(model, tmp_path / "out", tune_seconds=0, measure_seconds=0.3, threads=1)
    compiled = next(c for c in result.report.candidates if c.engine == "tvm")
    assert compiled.status == "unavailable"
    assert "SIGSEGV" in compiled.reason
    assert "relu1" in compiled.reason
    (saved,) = (tmp_path / "cache" / "crashes").glob("*/model.onnx")
    assert str(saved) in compiled.reason
    assert "graphopt tune model.onnx" in saved.with_name("README.txt").read_text()
    models.load(saved)
    assert graphopt.load(tmp_path / "out").engine == "onnxruntime"


def test_a_tuner_that_crashes_is_an_error(tmp_path, monkeypatch, sabotaged):
    sabotaged(
        "import ctypes\n"
        "from graphopt.targets.tuning.search import Search\n"
        "from graphopt import guard\n"
        "def run(self, seconds):\n"
        "    guard.at('timing a kernel')\n"
        "    ctypes.string_at(0)\n"
        "Search.run = run\n"
    )
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    model = save_small_cnn(tmp_path)
    with pytest.raises(TargetError, match=r"tuning .*model\.onnx crashed \(SIGSEGV at timing a kernel\)") as crashed:
        tune_model(model, resolve_target("cpu{threads=1}"), 0, database=tmp_path / "db.jsonl")
    (saved,) = (tmp_path / "cache" / "crashes").glob("*/model.onnx")
    assert str(saved) in str(crashed.value)


def test_a_runtime_that_crashes_on_the_model_is_an_error(tmp_path, monkeypatch, sabotaged):
    sabotaged(
        "import ctypes\n"
        "from graphopt import verify\n"
        "verify.onnxruntime_runner = lambda *arguments: ctypes.string_at(0)\n"
    )
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(TargetError, match=r"model\.onnx crashes ONNX Runtime \(SIGSEGV"):
        graphopt.optimize(save_small_cnn(tmp_path), tmp_path / "out", tune_seconds=0, threads=1)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (saved,) = (tmp_path / "cache" / "crashes").glob("*/model.onnx")
    assert saved.read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_a_checker_that_crashes_is_an_error(tmp_path, sabotaged):
    sabotaged(
        "import ctypes, onnx\n"
        "whole = onnx.checker.check_model\n"
        "onnx.checker.check_model = lambda m, **b: ctypes.string_at(0) if type(m) is str else whole(m, **b)\n"
    )
    with pytest.raises(ModelError, match=r"model\.onnx crashes ONNX's checker \(SIGSEGV\)"):
        models.load(save_small_cnn(tmp_path))


def test_a_rehearsal_takes_every_type_of_input(tmp_path):
    """What is handed over is what the model takes: floats of 16 and 64 bits, integers, booleans."""
    text = """<ir_version: 9, opset_import: ["" : 19]>
      g (double[2] a, float16[2] b, int64[n] c, bool[2] d) => (float[2] y)
      { e = Cast<to = 1>(a)  f = Cast<to = 1>(b)  h = Cast<to = 1>(c)  i = Cast<to = 1>(d)  y = Sum(e, f, h, i) }"""
    import onnx

    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    feeds = random_feeds(models.signature(models.load(tmp_path / "m.onnx")), batch=2)
    rehearse(tmp_path / "m.onnx", {"c": (2,)}, [feeds], tmp_path)
