"""Kills, full disks, closed folders, and two runs at once: nothing half-written, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.errors import ArtifactError, TargetError
from graphopt.output_folder import staged
from graphopt.runtime.artifact import MANIFEST
from graphopt.schedule_database import append_line
from graphopt.targets.tuning import database
from graphopt.targets.tuning.database import Database, Key, Record
from tests.models import save_small_cnn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, locks and limits as Linux has them")

FAST = ("--tune-seconds", "0", "--measure-seconds", "0.3", "--threads", "1", "-q")
KEY = Key("w" * 64, "avx512", 1)


def record(number: int) -> Record:
    return Record("generic", 1, {"n": number}, 1.0 + number, 1, True, "k" * 200, (), database.compiler_version())


def start(*arguments: object, cache: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "graphopt.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRAPHOPT_CACHE": str(cache)},
        preexec_fn=before,
    )


def ended(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    _, said = process.communicate(timeout=timeout)
    return process.returncode, said


def whole(artifact: Path) -> bool:
    """Loads, and computes."""
    y = graphopt.load(artifact, threads=1).run({"x": np.zeros((1, 3, 8, 8), np.float32)})["y"]
    return y.shape == (1, 5)


def kept(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if p.name.startswith(".out"))


@pytest.fixture
def model(tmp_path) -> Path:
    return save_small_cnn(tmp_path)


@pytest.fixture(scope="module")
def seconds(tmp_path_factory) -> float:
    """How long a run takes here, so that kills fall into all of it."""
    folder = tmp_path_factory.mktemp("timed")
    model, begin = save_small_cnn(folder), time.monotonic()
    code, said = ended(start("optimize", model, "-o", folder / "out", *FAST, cache=folder / "cache"))
    assert code == 0, said
    return time.monotonic() - begin


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def kill_one(model: Path, out: Path, cache: Path, after_s: float) -> bool:
    """Kill a run that overwrites `out` after so long; whether it was still running."""
    process = start("optimize", model, "-o", out, "--overwrite", *FAST, cache=cache)
    time.sleep(after_s)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def killed(model: Path, out: Path, cache: Path, seconds: float, times: int) -> int:
    """Kill runs at random moments, the old artifact whole after each; how many did not end before."""
    rng, count = random.Random(7), 0
    for _ in range(times):
        count += kill_one(model, out, cache, seconds * (0.3 + 0.75 * rng.random()))
        assert whole(out)
        text = (cache / "schedules.jsonl").read_text() if (cache / "schedules.jsonl").exists() else ""
        assert database.parse(text)[1] == 0
    return count


@pytest.mark.long
def test_killed_runs_leave_the_old_artifact_and_the_next_clears_up(tmp_path, model, seconds):
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert ended(start("optimize", model, "-o", out, *FAST, cache=cache))[0] == 0
    assert killed(model, out, cache, seconds, 2) >= 1
    code, said = ended(start("optimize", model, "-o", out, "--overwrite", *FAST, cache=cache))
    assert code == 0, said
    assert whole(out)
    assert kept(tmp_path) == []


@pytest.mark.long
def test_twenty_kills(tmp_path, model, seconds):
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert ended(start("optimize", model, "-o", out, *FAST, cache=cache))[0] == 0
    assert killed(model, out, cache, seconds, 20) >= 10


@pytest.mark.parametrize("moment", ["exchange", "after"])
def test_killed_while_it_replaces(tmp_path, moment):
    """Killed right before and right after the step that puts the new folder in the old one's place."""
    script = f"""
import os, sys
from pathlib import Path
from graphopt import output_folder
whole = output_folder._put
def put(stage, folder):
    if {moment == "after"!r}:
        whole(stage, folder)
    os.kill(os.getpid(), 9)
output_folder._put = put
with output_folder.staged(sys.argv[1], True) as stage:
    (stage / "manifest.json").write_text(sys.argv[2])
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("old")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out"), "new"], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / MANIFEST).read_text() == ("new" if moment == "after" else "old")
    assert len(kept(tmp_path)) == 1
    with staged(tmp_path / "out", True) as stage:
        (stage / MANIFEST).write_text("third")
    assert kept(tmp_path) == []


def test_an_old_folder_caught_between_two_renames_gets_its_name_back(tmp_path):
    """Where the system cannot exchange names: killed when the old one was moved away and the new one was not there."""
    aside = tmp_path / ".out.old-abc"
    (aside / "out").mkdir(parents=True)
    (aside / "out" / MANIFEST).write_text("old")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", False):
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"
        raise RuntimeError
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    assert kept(tmp_path) == []


def test_the_work_of_a_run_that_lives_is_not_cleared_away(tmp_path):
    with staged(tmp_path / "out", False) as first:
        (first / MANIFEST).write_text("first")
        with staged(tmp_path / "out", False) as second:
            (second / MANIFEST).write_text("second")
        assert (first / MANIFEST).read_text() == "first"
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_text() == "first"


@pytest.mark.long
def test_tuning_that_was_killed_goes_on_where_it_was(tmp_path, model):
    """Whatever the database held before a kill, it holds after it, and no line is torn."""
    cache = tmp_path / "cache"
    tune = ("tune", model, "--threads", 1, "--tune-seconds", 25, "-q", "--format", "json")
    process, limit = start(*tune, cache=cache), time.monotonic() + 120
    file = cache / "schedules.jsonl"
    while not (file.exists() and file.read_text().count("\n")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before, skipped = database.read(file)
    assert before
    assert skipped == 0
    process = start("tune", model, "--threads", 1, "--tune-seconds", 5, "-q", "--format", "json", cache=cache)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    complete = [k for k, r in before.items() if r.complete]
    assert json.loads(out)["from_database"] >= len(complete)
    after, skipped = database.read(file)
    assert set(before) <= set(after)
    assert skipped == 0


# -- full disks and closed folders -----------------------------------------------------------------------------------


def test_files_that_cannot_grow(tmp_path, model):
    """A limit on the size of files stands in for a full disk: every write fails in the middle."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    code, said = ended(start("optimize", model, "-o", tmp_path / "out", *FAST, cache=tmp_path / "c", before=limited))
    assert code in (1, 2), said
    assert len([line for line in said.splitlines() if line.strip()]) == 1, said
    assert "internal error" not in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert kept(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_the_old_artifact(tmp_path, code):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("old")
    with pytest.raises(ArtifactError), staged(tmp_path / "out", True) as stage:
        (stage / MANIFEST).write_text("new")
        raise OSError(code, os.strerror(code))
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    assert kept(tmp_path) == []


def test_a_full_disk_tears_no_line_of_the_database(tmp_path):
    """The write comes through in part, as on a disk that fills up: what came is taken back, and the user is told."""
    script = """
import resource, signal, sys
from pathlib import Path
from graphopt.schedule_database import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
append_line(Path(sys.argv[1]), "a" * 59 + chr(10))
try:
    append_line(Path(sys.argv[1]), "b" * 59 + chr(10))
except OSError as error:
    print(error.strerror)
"""
    file = tmp_path / "schedules.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip(), done.stderr
    assert file.read_text() == "a" * 59 + "\n"


def test_a_database_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(TargetError, match="cannot be"):
        Database(tmp_path / "folder", None).add(KEY, record(0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, model):
    (tmp_path / "closed").mkdir(mode=0o555)
    code, said = ended(start("optimize", model, "-o", tmp_path / "closed" / "out", *FAST, cache=tmp_path / "cache"))
    assert code == 2
    assert "cannot write" in said


def test_a_closed_folder_whoever_asks(tmp_path, monkeypatch):
    """As above for root, who may write anywhere: the system's answer is given for it."""
    real = os.mkdir

    def closed(path, *arguments, **named):
        if ".partial-" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, *arguments, **named)

    monkeypatch.setattr(os, "mkdir", closed)
    with pytest.raises(ArtifactError, match="Read-only file system"), staged(tmp_path / "out", False):
        pytest.fail("nothing can be staged")
    assert list(tmp_path.iterdir()) == []


# -- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_runs_on_one_output_folder(tmp_path, model):
    """One wins; the other says so. With --overwrite both succeed, and what is there is one of them, whole."""
    out = tmp_path / "out"
    both = [start("optimize", model, "-o", out, *FAST, cache=tmp_path / "cache") for _ in range(2)]
    results = [ended(process) for process in both]
    assert sorted(code for code, _ in results) == [0, 2], results
    assert any("exists" in said for code, said in results if code)
    assert whole(out)
    both = [start("optimize", model, "-o", out, "--overwrite", *FAST, cache=tmp_path / "cache") for _ in range(2)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert whole(out)
    assert kept(tmp_path) == []


def test_a_folder_exchanged_while_it_is_read(tmp_path):
    """Whoever reads sees the old or the new, at every moment."""
    with staged(tmp_path / "out", False) as stage:
        (stage / MANIFEST).write_text("0")
    script = (
        "import sys; from graphopt.output_folder import staged\n"
        "for n in range(60):\n"
        "    with staged(sys.argv[1], True) as stage: (stage / 'manifest.json').write_text(str(n))"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")])
    seen = set()
    while writer.poll() is None:
        seen.add(int((tmp_path / "out" / MANIFEST).read_text()))
    assert writer.returncode == 0
    assert len(seen) > 1


def test_two_that_write_one_database(tmp_path):
    """Every line of both is there, though one tears its last line again and again, as a kill may."""
    file = tmp_path / "schedules.jsonl"
    script = """
import dataclasses, sys
from pathlib import Path
from graphopt.targets.tuning.database import Database
from tests.test_faults import KEY, record
for number in range(200):
    Database(Path(sys.argv[1]), None).add(dataclasses.replace(KEY, threads=number, device=sys.argv[2]), record(number))
    if number % 50 == 7:
        with open(sys.argv[1], "a") as torn:
            torn.write('{"workload": "to')
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(file), name]) for name in "ab"]
    assert [process.wait(120) for process in running] == [0, 0]
    found, skipped = database.read(file)
    assert len(found) == 400
    assert skipped == 8


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    file = tmp_path / "lines"
    file.write_text('{"half')
    append_line(file, "whole\n")
    assert file.read_text() == '{"half\nwhole\n'


# -- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_same_inputs_give_the_same_bytes(tmp_path, model):
    """Model, library, engine.json, recipe, and of the report what was not measured."""
    found = []
    for name in ("one", "two"):
        code, said = ended(
            start("optimize", model, "-o", tmp_path / name / "out", "--engine", "tvm", *FAST, cache=tmp_path / "cache")
        )
        assert code == 0, said
        found.append(deterministic(tmp_path / name / "out"))
    assert found[0] == found[1]


def deterministic(folder: Path) -> dict[str, object]:
    report = json.loads((folder / "report.json").read_text())
    compiled = next(c for c in report["candidates"] if c["engine"] == "tvm")
    wanted: dict[str, object] = {
        "variants": report["variants"],
        "passes": [{k: v for k, v in each.items() if k != "seconds"} for each in report["passes"]],
        "errors": compiled["errors"],
        "size": compiled["size_bytes"],
        "tuning": compiled["tuning"]["digest"],
        "model": (folder / "model.onnx").read_bytes(),
        "recipe": (folder / "recipe.toml").read_text().replace(str(folder.parent), ""),
    }
    if (folder / "compiled").is_dir():
        for name in ("model.so", "engine.json"):
            wanted[name] = (folder / "compiled" / name).read_bytes()
    return wanted


def test_the_same_model_compiles_to_the_same_library(tmp_path):
    """Whatever the race decides, in processes of their own."""
    script = """
import sys
from pathlib import Path
from graphopt import model as models
from graphopt.plugins import parse_target
target = parse_target("cpu{threads=1}")
target.build(target.lower(models.fix_inputs(models.load(sys.argv[1]), {"x": (1, 3, 8, 8)})), Path(sys.argv[2]))
"""
    save_small_cnn(tmp_path)
    made = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "model.onnx"), str(folder)], check=True, env=environment
        )
        made.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert made[0].keys() == made[1].keys() == {"model.so", "engine.json"}
    assert made[0] == made[1]
