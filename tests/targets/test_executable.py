"""The library of a model: joined from kernels compiled side by side, with constants that no compiler saw."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.runtime.vm import VirtualMachine

from graphopt.errors import TargetError
from graphopt.targets import schedules
from graphopt.targets.relax import blob_object, executable, link
from graphopt.targets.schedules.workload import Kernel
from tests.targets.oracle import TARGET, close, compiled, model, node, reference, uniform

ARCH = TARGET.capabilities.arch


def _two_kernels():
    feeds = {"x": uniform(1, 1, 16, 6, 6)}
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("GlobalAveragePool", ["a"], ["y"])]
    return model(nodes, feeds, ["y"], {"w": uniform(2, 16, 16, 3, 3)}), feeds


@settings(max_examples=20, deadline=None)
@given(content=st.binary(min_size=1, max_size=200))
def test_linked_bytes_are_found_under_their_symbol(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("blob")
    blob_object.write(content, ARCH, folder / "blob.o")
    link.link_shared(folder / "blob.so", [str(folder / "blob.o")])
    found = ctypes.c_char.in_dll(ctypes.CDLL(str(folder / "blob.so")), blob_object.SYMBOL)
    assert ctypes.string_at(ctypes.addressof(found), len(content)) == content
    assert ctypes.addressof(found) % blob_object.ALIGNMENT == 0


def test_an_unknown_architecture_is_named(tmp_path):
    with pytest.raises(TargetError, match="sparc"):
        blob_object.write(b"x", "sparc", tmp_path / "blob.o")
    assert not (tmp_path / "blob.o").exists()


def test_threads_do_not_change_the_library(tmp_path):
    made, _ = _two_kernels()
    for jobs in (1, 3):
        module = TARGET.scheduled(TARGET.lower(made))
        executable.export(module, TARGET.tvm_target(), tmp_path / f"{jobs}.so", arch=ARCH, jobs=jobs)
    assert (tmp_path / "1.so").read_bytes() == (tmp_path / "3.so").read_bytes()


def test_several_functions_share_their_constants(tmp_path):
    """One for each batch, in one library: each right, and the weights, which all want in one form, are there once."""
    weights = {"w": uniform(1, 3000, 64) / 50}
    product = [node("MatMul", ["x", "w"], ["y"])]
    made = {n: model(product, {"x": uniform(0, n, 3000)}, ["y"], weights) for n in (8, 16, 24)}
    modules = {f"of_{n}": TARGET.scheduled(TARGET.lower(each)) for n, each in made.items()}
    sizes = {}
    for names in (["of_8"], list(modules)):
        library = tmp_path / f"{len(names)}.so"
        chosen = {name: modules[name] for name in names}
        executable.export(chosen, TARGET.tvm_target(), library, arch=ARCH, jobs=2)
        sizes[len(names)] = library.stat().st_size
    assert sizes[3] < 2 * sizes[1]
    loaded: Any = tvm.runtime.load_module(str(tmp_path / "3.so"))
    processor: Any = tvm.cpu()
    machine = VirtualMachine(loaded, processor)
    for n, each in made.items():
        x = uniform(n, n, 3000)
        found = machine[f"of_{n}"](tvm.runtime.tensor(x)).numpy()
        close({"y": found}, reference(each, {"x": x}), 1e-4)


def test_a_model_that_computes_nothing_runs():
    feeds = {"x": uniform(1, 2, 3)}
    made = model([node("Identity", ["x"], ["y"])], feeds, ["y"])
    np.testing.assert_array_equal(compiled(made, feeds)["y"], feeds["x"])


def test_it_computes_what_the_model_says():
    made, feeds = _two_kernels()
    close(compiled(made, feeds), reference(made, feeds), 1e-5)


def test_a_kernel_that_cannot_be_compiled_fails_the_build(tmp_path, monkeypatch):
    made, _ = _two_kernels()
    real = schedules.schedule

    def for_another_device(workload, choice):
        from tvm import tirx

        func = real(workload, choice).func
        body = tirx.Evaluate(tirx.call_intrin("int32", "tirx.ptx.wgmma_fence"))
        return Kernel(func.with_body(body), {})

    monkeypatch.setattr(schedules, "schedule", for_another_device)
    with pytest.raises(TargetError, match="ptx"):
        TARGET.build(TARGET.lower(made), tmp_path)
    assert list(tmp_path.iterdir()) == []
