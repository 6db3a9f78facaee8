"""Packages: small models in fp32 and INT8, packed, built and run without graphopt, on x86-64 and (emulated) ARM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from graphopt import model as models
from graphopt.capabilities import host_arch, host_features
from graphopt.cli import group
from graphopt.errors import ArtifactError, SpecError, TargetError
from graphopt.packaging import package
from graphopt.packaging.c_compiler import find_c_compiler
from graphopt.runtime.artifact import read_manifest, write_manifest
from graphopt.runtime.tvm_engine import TvmEngine
from graphopt.targets.relax import link
from tests.packaging.artifacts import (
    DIGITS,
    artifact,
    build_example,
    compiler,
    quantized_digits,
    refusal,
    run_program,
    runner,
)
from tests.targets.oracle import close, model, node, reference, sum_tolerance, uniform

TARGETS = {"x86_64": "cpu{mcpu=x86-64-v3}", "aarch64": "arm{mcpu=cortex-a53}"}
ARCHS = [pytest.param(arch, id=arch) for arch in TARGETS]
TERMS = 96 * 9
"""Products in the longest sum of the digits' network."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """TVM's libraries for ARM are fetched once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield os.environ["GRAPHOPT_CACHE"]


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", cache)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from "fp32" or "int8" and an architecture to the model and its artifact."""
    known: dict[tuple[str, str], tuple[ir.Model, Path]] = {}

    def make(kind: str, arch: str) -> tuple[ir.Model, Path]:
        if (kind, arch) not in known:
            if link.find_linker(arch) is None:
                pytest.skip(f"no linker for {arch}: {link.cross_remedy(arch)}")
            target = TARGETS[arch]
            net = models.load(DIGITS / "digits.onnx") if kind == "fp32" else quantized_digits(target)
            known[kind, arch] = net, artifact(tmp_path_factory.mktemp("made") / "artifact", net, target)
        return known[kind, arch]

    return make


@pytest.fixture(scope="module")
def example(made, tmp_path_factory):
    """A function from an architecture to the example, compiled for it: it runs every package for C++."""
    known: dict[str, Path] = {}

    def build(arch: str) -> str:
        if arch not in known:
            _, folder = made("fp32", arch)
            packed = package(folder, tmp_path_factory.mktemp("example") / "package", "cpp")
            known[arch] = build_example(packed.path, arch)
        return str(known[arch])

    return build


def pictures(count: int) -> list[dict[str, np.ndarray]]:
    with np.load(DIGITS / "eval.npz") as data:
        return [{"image": data["image"][i : i + 1]} for i in range(count)]


def check(kind: str, net: ir.Model, feeds: list, found: list) -> None:
    """fp32: within rounding. INT8: a value between two quanta may fall either way, and no more noise may come of it
    than twice what quantizing made."""
    wanted = [reference(net, each) for each in feeds]
    if kind == "fp32":
        for one, other in zip(found, wanted, strict=True):
            close(one, other, sum_tolerance(TERMS))
        return
    whole = models.load(DIGITS / "digits.onnx")
    plain = np.concatenate([reference(whole, each)["logits"] for each in feeds])
    exact = np.concatenate([each["logits"] for each in wanted])
    ours = np.concatenate([each["logits"] for each in found])
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    assert np.sum((ours - exact) ** 2) <= 2 * np.sum((exact - plain) ** 2)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_cpp_package(kind, arch, made, example, tmp_path):
    net, folder = made(kind, arch)
    before = runner(arch)
    packed = package(folder, tmp_path / "package", "cpp")
    program = example(arch)
    feeds = pictures(4)
    command = [*before, program, "-t", "2", "-o"]
    found = [
        run_program([*command, str(tmp_path / f"out{i}"), str(packed.path)], each, tmp_path / f"out{i}")
        for i, each in enumerate(feeds)
    ]
    check(kind, net, feeds, found)
    said = subprocess.run([*before, program, str(packed.path)], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["input image: float32(1, 1, 16, 16)", "output logits: float32(1, 10)"]
    sizes = json.loads((packed.path / "package.json").read_text())["files"]
    assert {"model/model.so", "lib/libtvm_runtime.so", "lib/libtvm_ffi.so", "include/graphopt/runner.h"} <= set(sizes)
    assert all((packed.path / name).stat().st_size == size for name, size in sizes.items())
    assert packed.description["total_bytes"] == sum(sizes.values())


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_cmake_builds_the_example(arch, made, tmp_path):
    if shutil.which("cmake") is None or shutil.which("make") is None:
        pytest.skip("no cmake")
    compiler(arch)
    net, folder = made("fp32", arch)
    before = runner(arch)
    packed = package(folder, tmp_path / "package", "cpp")
    cross = [] if arch == host_arch() else ["-DCMAKE_TOOLCHAIN_FILE=toolchain.cmake", f"-DGRAPHOPT_ARCH={arch}"]
    for command in (["cmake", "-S", ".", "-B", "build", *cross], ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=packed.path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    moved = packed.path.rename(tmp_path / "moved")  # the runtime is found beside the program
    command = [*before, str(moved / "build/example"), "-o", str(tmp_path / "o"), str(moved)]
    found = run_program(command, pictures(1)[0], tmp_path / "o")
    close(found, reference(net, pictures(1)[0]), sum_tolerance(TERMS))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("arch", ARCHS)
def test_static_executable(kind, arch, made, tmp_path):
    if find_c_compiler(arch) is None:
        pytest.skip(f"no C compiler for {arch}")
    net, folder = made(kind, arch)
    before = runner(arch)
    packed = package(folder, tmp_path / "package", "c-static")
    feeds = pictures(4)
    found = [
        run_program([*before, str(packed.path / "run"), "-t", str(1 + i % 3), "-o", str(tmp_path / f"out{i}")], each,
                    tmp_path / f"out{i}")
        for i, each in enumerate(feeds)
    ]  # fmt: skip
    check(kind, net, feeds, found)
    if arch == host_arch():
        assert packed.description["checked"].startswith("every bit")
        for one, each in zip(found, feeds, strict=True):
            np.testing.assert_array_equal(one["logits"], TvmEngine(folder / "compiled", 1).run(each)["logits"])
        with pytest.raises(subprocess.CalledProcessError):  # there is no dynamic section to print
            subprocess.run(["ldd", packed.path / "run"], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_python_package_needs_no_tvm(kind, made, tmp_path):
    net, folder = made(kind, host_arch())
    packed = package(folder, tmp_path / "package", "python")
    feeds = pictures(4)
    arrays = {str(i): each["image"] for i, each in enumerate(feeds)}
    np.savez(tmp_path / "feeds.npz", **arrays)  # pyright: ignore[reportArgumentType]
    code = (
        "import sys; sys.modules['tvm'] = None; sys.modules['graphopt'] = None\n"
        "import numpy as np; from graphopt_model import Model\n"
        f"feeds = np.load({str(tmp_path / 'feeds.npz')!r}); model = Model(threads=2)\n"
        "assert model.inputs == {'image': ('float32', (1, 1, 16, 16))}, model.inputs\n"
        "found = [model.run({'image': feeds[name]})['logits'] for name in feeds.files]\n"
        f"np.savez({str(tmp_path / 'found.npz')!r}, *found)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=packed.path, check=True, timeout=120, env=_plain_environment())
    with np.load(tmp_path / "found.npz") as arrays:
        check(kind, net, feeds, [{"logits": arrays[name]} for name in arrays.files])


def _plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def several_outputs() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Outputs that are an input, a constant, and a view of another; an input that nobody reads; names with slashes."""
    feeds = {"x": uniform(1, 2, 6), "unread": uniform(2, 3)}
    nodes = [
        node("Relu", ["x"], ["a/b"]), node("Identity", ["x"], ["same"]), node("Reshape", ["a/b", "shape"], ["flat"]),
        node("Identity", ["c"], ["constant"]), node("Add", ["x", "c"], ["sum"]),
    ]  # fmt: skip
    constants = {"c": uniform(3, 6), "shape": np.array([3, 4])}
    return model(nodes, feeds, ["a/b", "same", "flat", "constant", "sum"], constants), feeds


def test_outputs_of_every_kind(example, tmp_path):
    net, feeds = several_outputs()
    folder = artifact(tmp_path / "artifact", net, "cpu")
    wanted = {name.replace("/", "_"): array for name, array in reference(net, feeds).items()}
    packed = package(folder, tmp_path / "cpp", "cpp")
    program = example(host_arch())
    found = run_program([program, "-o", str(tmp_path / "o1"), str(packed.path)], feeds, tmp_path / "o1")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    if find_c_compiler(host_arch()) is None:
        pytest.skip("no C compiler")
    static = package(folder, tmp_path / "static", "c-static")
    found = run_program([str(static.path / "run"), "-o", str(tmp_path / "o2")], feeds, tmp_path / "o2")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


LOADER = """
import numpy as np
from graphopt_model import Error, Model
model, other = Model(threads=1), Model(threads=1)
x, unread = np.arange(12, dtype=np.float32).reshape(2, 6) - 5, np.ones(3, np.float32)
first = model.run({"x": x, "unread": unread})
kept = {name: array.copy() for name, array in first.items()}
for name, array in first.items():
    array[...] = -7  # they are the caller's: neither a constant nor an input changes
np.testing.assert_array_equal(x, np.arange(12, dtype=np.float32).reshape(2, 6) - 5)
for again in (model, other):
    for name, array in again.run({"x": x.astype(np.float16), "unread": unread}).items():
        np.testing.assert_array_equal(array, kept[name])
for feeds, said in (({"x": x}, "missing"), ({"x": x, "unread": unread, "z": x}, "no input 'z'"),
                    ({"x": x[:1], "unread": unread}, "shape"), ({"x": x.astype(complex), "unread": unread}, "complex")):
    try:
        model.run(feeds)
    except Error as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
"""


def test_python_outputs_belong_to_the_caller(tmp_path):
    net, _ = several_outputs()
    packed = package(artifact(tmp_path / "artifact", net, "cpu"), tmp_path / "package", "python")
    subprocess.run([sys.executable, "-c", LOADER], cwd=packed.path, check=True, timeout=120, env=_plain_environment())


def run_loader(package_: Path, tmp_path: Path) -> str:
    np.savez(tmp_path / "in.npz", image=pictures(1)[0]["image"])
    command = [sys.executable, "graphopt_model.py", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, cwd=package_, capture_output=True, text=True, check=False, env=_plain_environment())
    assert done.returncode == 1, done.stderr
    return done.stderr.strip()


def test_damaged_packages_are_refused(made, example, tmp_path):
    arch = host_arch()
    _, folder = made("fp32", arch)
    packed = package(folder, tmp_path / "cpp", "cpp")
    command = [example(arch), str(packed.path)]
    library = packed.path / "model/model.so"
    library.write_bytes(library.read_bytes()[:5000])
    assert "is damaged: it has 5000 bytes" in refusal(command)
    library.unlink()
    assert refusal(command).endswith("is missing")
    description = packed.path / "package.json"
    text = description.read_text()
    description.write_text(text.replace('"format": 1', '"format": 7'))
    assert "has format 7" in refusal(command)
    description.write_text(text.replace(f'"arch": "{arch}"', '"arch": "riscv64"'))
    assert f"was built for riscv64, this machine is {arch}" in refusal(command)
    description.write_text(text[:100])
    assert "package.json is damaged" in refusal(command)
    description.write_text("{}")
    assert "package.json is damaged" in refusal(command)
    description.unlink()
    assert "graphopt package" in refusal(command)
    loaded = package(folder, tmp_path / "python", "python").path
    (loaded / "model/model.so").write_bytes(b"\x7fELF")
    assert "is not the file that was packed" in run_loader(loaded, tmp_path)
    (loaded / "package.json").write_text("[]")
    assert "format 1" in run_loader(loaded, tmp_path)


def test_wrong_arrays_are_refused(made, example, tmp_path):
    _, folder = made("fp32", host_arch())
    packed = package(folder, tmp_path / "package", "cpp")
    command = [example(host_arch()), str(packed.path)]
    for name, array in (("type", np.zeros((1, 1, 16, 16))), ("shape", np.zeros((1, 1, 16, 15), np.float32)),
                        ("order", np.asfortranarray(np.zeros((1, 1, 16, 16), np.float32)))):  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    assert "is not float32(1, 1, 16, 16)" in refusal([*command, str(tmp_path / "type.npy")])
    assert "is not float32(1, 1, 16, 16)" in refusal([*command, str(tmp_path / "shape.npy")])
    np.save(tmp_path / "order.npy", np.zeros((1, 1, 16, 16), np.float32, order="F"))
    (tmp_path / "text.npy").write_text("no array")
    assert "is no .npy file" in refusal([*command, str(tmp_path / "text.npy")])
    whole = (tmp_path / "shape.npy").read_bytes()
    np.save(tmp_path / "short.npy", np.zeros((1, 1, 16, 16), np.float32))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[: len(whole) - 100])
    assert "is cut short" in refusal([*command, str(tmp_path / "short.npy")])
    assert "cannot be opened" in refusal([*command, str(tmp_path / "absent.npy")])
    assert "takes 1 inputs, 2 files" in refusal([*command, "a.npy", "b.npy"])


def test_an_artifact_of_onnx_runtime_is_packed_as_such(tmp_path):
    net = models.load(DIGITS / "digits.onnx")
    folder = artifact(tmp_path / "artifact", net, engine="onnxruntime")
    packed = package(folder, tmp_path / "python", "python")
    assert packed.description["engine"] == "onnxruntime" and packed.description["arch"] is None
    feeds = pictures(3)
    batch = np.concatenate([each["image"] for each in feeds])
    np.savez(tmp_path / "in.npz", image=batch)
    command = [sys.executable, "graphopt_model.py", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, cwd=packed.path, check=True, timeout=120, env=_plain_environment())
    with np.load(tmp_path / "out.npz") as found:
        close({"logits": found["logits"]}, reference(net, {"image": batch}), sum_tolerance(TERMS))
    (packed.path / "model.onnx").write_bytes(b"")
    assert "is not the file that was packed" in run_loader(packed.path, tmp_path)
    for name in ("cpp", "python"):
        readme = (package(folder, tmp_path / f"said-{name}", name).path / "README.md").read_text()
        assert "ONNX Runtime was the fastest" in readme
    assert "onnxruntime_cxx_api.h" in (tmp_path / "said-cpp/example/main.cc").read_text()
    with pytest.raises(TargetError, match="makes no static executables"):
        package(folder, tmp_path / "static", "c-static")
    assert not (tmp_path / "static").exists()


def test_nothing_is_written_over_and_nothing_half(made, tmp_path, monkeypatch):
    _, folder = made("fp32", host_arch())
    with pytest.raises(SpecError, match="unknown runtime 'cp'") as caught:
        package(folder, tmp_path / "package", "cp")
    assert "cpp" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match="no such artifact"):
        package(tmp_path / "absent", tmp_path / "package", "cpp")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError):
            package(folder, tmp_path / "mine", "cpp", overwrite)
    assert (tmp_path / "mine/file").read_text() == "kept"
    first = package(folder, tmp_path / "package", "python")
    with pytest.raises(ArtifactError, match="exists"):
        package(folder, tmp_path / "package", "cpp")
    assert package(folder, tmp_path / "package", "cpp", overwrite=True).path == first.path
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "compiled/model.so").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is damaged"):
        package(damaged, tmp_path / "none", "cpp")
    described = damaged / "compiled/engine.json"
    shutil.copy(folder / "compiled/model.so", damaged / "compiled/model.so")
    described.write_text(json.dumps({**json.loads(described.read_text()), "device": "cuda"}))
    write_manifest(damaged, read_manifest(damaged), ["model.onnx", "compiled/model.so", "compiled/engine.json"])
    with pytest.raises(TargetError, match="runs on cuda"):
        package(damaged, tmp_path / "none", "cpp")
    monkeypatch.setattr("graphopt.packaging.c_compiler.shutil.which", lambda name: None)
    monkeypatch.setattr("graphopt.packaging.c_compiler.importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError, match="wants a C compiler"):
        package(folder, tmp_path / "none", "c-static")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "mine", "package"]


def test_the_command_prints_sizes(made, tmp_path):
    _, folder = made("fp32", host_arch())
    arguments = ["package", str(folder), "--runtime", "python"]
    text = CliRunner().invoke(group, [*arguments, "-o", str(tmp_path / "a")], standalone_mode=False)
    assert text.return_value == 0 and "graphopt_model.py" in text.output and "together" in text.output
    found = CliRunner().invoke(
        group, [*arguments, "-o", str(tmp_path / "b"), "--format", "json"], standalone_mode=False
    )
    assert json.loads(found.output) == json.loads((tmp_path / "b/package.json").read_text())


@pytest.mark.skipif(host_arch() != "x86_64", reason="QEMU's x86 processors on x86")
def test_a_library_for_more_than_the_x86_processor_has_is_refused(example, tmp_path):
    before = runner("x86_64", "Nehalem")
    net = models.load(DIGITS / "digits.onnx")
    folder = artifact(tmp_path / "artifact", net, "cpu{mcpu=haswell}")
    packed = package(folder, tmp_path / "package", "cpp")
    program = example("x86_64")
    said = refusal([*before, program, str(packed.path)])
    assert "is for haswell and needs" in said and "avx2" in said and "avx512" not in said
    static = package(folder, tmp_path / "static", "c-static")
    np.save(tmp_path / "in.npy", pictures(1)[0]["image"])
    said = refusal([*before, str(static.path / "run"), "-o", str(tmp_path), str(tmp_path / "in.npy")])
    assert "lacks what the model was built for (haswell)" in said and "avx2" in said
    run_program([*runner("x86_64", "Haswell"), str(static.path / "run"), "-o", str(tmp_path / "o")], pictures(1)[0],
                tmp_path / "o")  # fmt: skip


def test_a_library_for_more_than_the_arm_core_has_is_refused(example, tmp_path):
    before, newer = runner("aarch64", "cortex-a53"), runner("aarch64", "cortex-a76")
    net = models.load(DIGITS / "digits.onnx")
    folder = artifact(tmp_path / "artifact", net, "arm{mcpu=cortex-a76}")
    packed = package(folder, tmp_path / "package", "cpp")
    program = example("aarch64")
    said = refusal([*before, program, str(packed.path)])
    assert "is for cortex-a76 and needs" in said and "asimddp" in said
    found = run_program([*newer, program, "-o", str(tmp_path / "o"), str(packed.path)], pictures(1)[0],
                        tmp_path / "o")  # fmt: skip
    close(found, reference(net, pictures(1)[0]), sum_tolerance(TERMS))


@pytest.mark.skipif(host_arch() != "x86_64" or "amx_tile" in host_features(), reason="needs a processor without AMX")
def test_the_python_loader_refuses_what_this_processor_lacks(tmp_path):
    net = models.load(DIGITS / "digits.onnx")
    folder = artifact(tmp_path / "artifact", net, "cpu{mcpu=sapphirerapids}")
    packed = package(folder, tmp_path / "package", "python")
    said = run_loader(packed.path, tmp_path)
    assert "is for sapphirerapids and needs amx_bf16, amx_int8, amx_tile" in said
    static = package(folder, tmp_path / "static", "c-static")
    assert static.description["checked"].startswith("not run")
