"""A compiled library is loaded if its user built it, or says so; nothing else about an artifact can make it run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.errors import ArtifactError
from graphopt.packaging import package
from graphopt.runtime import trust
from graphopt.runtime.artifact import MANIFEST, write_manifest
from graphopt.runtime.hybrid_engine import PartFiles, write_description
from tests.models import save_small_cnn

FEEDS = {"x": np.zeros((1, 3, 8, 8), np.float32)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """An artifact with a compiled library."""
    folder = tmp_path_factory.mktemp("built")
    result = graphopt.optimize(
        save_small_cnn(folder), folder / "out", engine="tvm", tune_seconds=0, measure_seconds=0.2, threads=1
    )
    assert result.report.choice is not None
    manifest = json.loads((folder / "out" / MANIFEST).read_text())
    if manifest["engine"] != "tvm":
        pytest.skip("ONNX Runtime was faster in this run: there is no library in the artifact")
    return folder / "out"


@pytest.fixture
def artifact(tmp_path, built) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture
def other_user(tmp_path, monkeypatch):
    """Somebody with a key of their own."""
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "other"))
    trust.sign(tmp_path, b"their first artifact makes their key")


def refused(artifact: Path, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        graphopt.load(artifact, threads=1)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_you_built_loads_wherever_it_lies(artifact):
    assert graphopt.load(artifact, threads=1).run(FEEDS)["y"].shape == (1, 5)


def test_what_another_built_needs_your_word_and_says_why(artifact, other_user):
    refused(artifact, "by another key", "runs with your rights", "--trust")
    assert graphopt.load(artifact, threads=1, trust=True).run(FEEDS)["y"].shape == (1, 5)


def test_an_unsigned_one_needs_your_word(artifact):
    (artifact / trust.SIGNATURE).unlink()
    refused(artifact, "unsigned", "--trust")


@pytest.fixture
def in_parts(artifact) -> Path:
    """The same library, as the one part of a model in parts."""
    manifest = json.loads((artifact / MANIFEST).read_text())
    (artifact / "hybrid").mkdir()
    (artifact / "compiled").rename(artifact / "hybrid" / "part-0")
    types = {
        each["name"]: (np.dtype(each["dtype"]), (1, *each["shape"][1:])) for each in manifest["signature"]["inputs"]
    }
    write_description(artifact / "hybrid", types, ["y"], {}, [PartFiles("tvm", "part-0", ("x",), ("y",))])
    rewritten(artifact, manifest)
    return artifact


def rewritten(artifact: Path, manifest: dict[str, object]) -> None:
    """Sign it anew, as a model in parts."""
    files = [str(f.relative_to(artifact)) for f in artifact.rglob("*") if f.is_file() and f.name[:8] != "manifest"]
    kept = {k: v for k, v in manifest.items() if k not in ("files", "schema", "libraries")}
    write_manifest(artifact, {**kept, "engine": "hybrid"}, files)


def test_a_model_in_parts_is_yours_or_needs_your_word(in_parts, tmp_path, monkeypatch):
    assert graphopt.load(in_parts, threads=1).run(FEEDS)["y"].shape == (1, 5)
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "other"))
    trust.sign(tmp_path, b"their first artifact makes their key")
    refused(in_parts, "by another key", "--trust")


def test_every_part_has_its_digest(in_parts):
    manifest = json.loads((in_parts / MANIFEST).read_text())
    kept = {k: v for k, v in manifest.items() if k != "files"}
    write_manifest(in_parts, kept, ["model.onnx", "hybrid/hybrid.json", "hybrid/part-0/engine.json"])
    refused(in_parts, "no sha256 of hybrid/part-0/model.so")


def test_without_a_key_nothing_is_trusted(artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "empty"))
    refused(artifact, "no key")
    assert not (tmp_path / "empty").exists(), "checking makes no key"


def test_a_changed_manifest_loses_its_signature(artifact):
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["variant"] = "another"
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    refused(artifact, "by another key")


def test_a_changed_library_is_damaged_whatever_is_trusted(artifact):
    library = artifact / "compiled" / "model.so"
    library.write_bytes(library.read_bytes() + b"\0")
    for given in (False, True):
        with pytest.raises(ArtifactError, match="sha256"):
            graphopt.load(artifact, threads=1, trust=given)


@pytest.mark.parametrize("change", ["left out", "outside", "linked"])
def test_every_library_is_among_the_files_and_in_the_folder(artifact, tmp_path, change):
    manifest = json.loads((artifact / MANIFEST).read_text())
    if change == "left out":
        del manifest["files"]["compiled/model.so"]
    elif change == "outside":
        shutil.copytree(artifact / "compiled", tmp_path / "elsewhere")
        manifest["libraries"] = [{"folder": "../elsewhere", "target": "cpu"}]
        for name in ("model.so", "engine.json"):
            manifest["files"][f"../elsewhere/{name}"] = manifest["files"][f"compiled/{name}"]
    else:
        (artifact / "compiled").rename(tmp_path / "elsewhere")
        (artifact / "compiled").symlink_to(tmp_path / "elsewhere")
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="damaged"):
        graphopt.load(artifact, threads=1, trust=True)


def test_machines_that_share_a_secret_trust_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv(trust.SECRET, "of this CI")
    trust.sign(tmp_path, b"manifest")
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "another machine"))
    trust.require(tmp_path, b"manifest", False)
    monkeypatch.setenv(trust.SECRET, "of another CI")
    with pytest.raises(ArtifactError, match="another key"):
        trust.require(tmp_path, b"manifest", False)


def test_the_key_is_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "config"))
    assert trust.sign(tmp_path, b"manifest")
    key = trust.key_path()
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == trust.KEY_BYTES
    key.chmod(0o644)
    with pytest.raises(ArtifactError, match="open to others"):
        trust.require(tmp_path, b"manifest", False)
    key.chmod(0o600)
    key.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="damaged"):
        trust.require(tmp_path, b"manifest", False)


def test_two_that_make_a_key_at_once_make_one(tmp_path):
    script = (
        "import sys; from pathlib import Path; from graphopt.runtime import trust\n"
        "folder = Path(sys.argv[1]); folder.mkdir(); trust.sign(folder, b'manifest')"
    )
    environment = {**os.environ, "GRAPHOPT_CONFIG": str(tmp_path / "config")}
    folders = [tmp_path / str(n) for n in range(4)]
    running = [subprocess.Popen([sys.executable, "-c", script, str(f)], env=environment) for f in folders]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len({(f / trust.SIGNATURE).read_text() for f in folders}) == 1
    assert [p.name for p in (tmp_path / "config").iterdir()] == ["trust.key"]


def test_a_home_that_cannot_be_written_leaves_artifacts_unsigned(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(tmp_path / "file" / "below"))
    assert not trust.sign(tmp_path, b"manifest")
    assert not (tmp_path / trust.SIGNATURE).exists()


def graphopt_command(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_run_and_bench_ask(artifact, other_user, tmp_path):
    np.savez(tmp_path / "in.npz", x=FEEDS["x"])
    run = ("run", artifact, "--input", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--threads", 1)
    done = graphopt_command(*run)
    assert done.returncode == 2
    assert "--trust" in done.stderr
    assert not (tmp_path / "out.npz").exists()
    assert graphopt_command(*run, "--trust").returncode == 0
    assert (tmp_path / "out.npz").exists()
    bench = ("bench", artifact, "--seconds", 1, "--threads", 1, "-q")
    assert graphopt_command(*bench).returncode == 2
    done = graphopt_command(*bench, "--trust", "--format", "json")
    assert done.returncode == 0, done.stderr


def test_a_package_that_runs_the_library_asks(artifact, other_user, tmp_path):
    with pytest.raises(ArtifactError, match="--trust"):
        package(artifact, tmp_path / "package", "c-static")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine", "pickle"), ("files", []), ("files", {"model.onnx": 1}), ("signature", 3),
        ("signature", {"inputs": [1]}),
        ("compiled_shapes", {"nope": [1]}), ("libraries", [{"folder": 1}]), ("libraries", []), ("schema", "x"),
        ("files", {"/etc/hostname": "0"}), ("files", {}),
    ],
)  # fmt: skip
def test_a_manifest_of_another_kind_is_damaged(artifact, key, value):
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest[key] = value
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="damaged"):
        graphopt.load(artifact, threads=1, trust=True)


def test_no_pickle_anywhere():
    """What unpickles can be made to run anything: nothing here may, not even between processes of its own."""
    word = re.compile(r"\b(c?pickle|cloudpickle|dill|shelve|marshal)\b|allow_pickle=True")
    package_folder = Path(graphopt.__file__).parent
    files = [*package_folder.rglob("*.py"), *package_folder.rglob("*.pyi")]
    assert len(files) > 100
    found = [
        f"{file.relative_to(package_folder)}: {line.strip()}"
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if word.search(line)
    ]
    assert not found
