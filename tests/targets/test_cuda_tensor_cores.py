"""Tensor core kernels: tiles on layers of drawn shapes, emulated, against ONNX Runtime; and their registers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt.gpu_names import ARCHITECTURES
from graphopt.targets import nvcc
from graphopt.targets.cuda import Cuda
from graphopt.targets.schedules import cuda
from graphopt.targets.schedules.cuda import tensor_cores
from graphopt.targets.schedules.cuda.products import product_of
from tests.targets import cuda_emulator
from tests.targets.integer_models import integer_conv
from tests.targets.oracle import close, model, node, reference, uniform
from tests.targets.test_cuda import needs_emulator, needs_nvcc

BFLOAT16_EPSILON = 2.0**-7
EPSILONS = {"float16": float(np.finfo(np.float16).eps), "bfloat16": BFLOAT16_EPSILON}
LAYERS = 6


def drawn_layers(rng: np.random.Generator, channels: int):
    """Attributes and kernels (M, C, kH, kW) of convolutions of one picture: strides, pads, dilations, odd channels."""
    found = []
    for _ in range(LAYERS):
        k_h, k_w = (int(x) for x in rng.integers(1, 4, 2))
        attributes = {
            "strides": [int(x) for x in rng.integers(1, 3, 2)],
            "pads": [int(x) for x in rng.integers(0, 3, 4)],
            "dilations": [int(x) for x in rng.integers(1, 3, 2)],
        }
        found.append((attributes, (int(rng.integers(5, 90)), channels, k_h, k_w)))
    return found


def drawn_decisions(rng: np.random.Generator, lowered, target: Cuda) -> set[str]:
    """Give each product on tensor cores a decision at random; returns the names of the kernels."""
    found = set()
    for name, workload in target.workloads(lowered).items():
        space = tensor_cores.match(workload)
        if space:
            lowered.decisions[name] = tensor_cores.NAME, space[int(rng.integers(len(space)))]
            found.add(name)
    return found


def emulated(target: Cuda, lowered, folder: Path, feeds, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_EMULATED_ARCH", target.gpu_arch[3:])
    monkeypatch.setattr(nvcc, "compile_source", cuda_emulator.compile_source)
    target.build(lowered, folder)
    return cuda_emulator.run(folder, feeds)


@needs_emulator
@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("arch", [*(pytest.param(a, marks=pytest.mark.long) for a in ("sm_75", "sm_80")), "sm_90"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_every_tile_computes_the_convolution(seed, arch, precision, tmp_path, monkeypatch):
    if (arch, precision) == ("sm_75", "bfloat16"):
        pytest.skip("sm_75 does not have it")
    rng = np.random.default_rng(seed)
    channels = (24, 3, 19)[seed]
    x = uniform(seed, int(rng.integers(1, 4)), channels, 11, 14)
    constants, nodes = {}, []
    for i, (attributes, shape) in enumerate(drawn_layers(rng, channels)):
        constants[f"w{i}"], constants[f"b{i}"] = uniform(i, *shape), uniform(i + 50, shape[0])
        nodes += [node("Conv", ["x", f"w{i}", f"b{i}"], [f"c{i}"], **attributes), node("Relu", [f"c{i}"], [f"y{i}"])]
    nodes += [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "m"], ["y"])]
    constants["m"] = uniform(99, channels * 11 * 14, 21)
    made = model(nodes, {"x": x}, [*(f"y{i}" for i in range(LAYERS)), "y"], constants)
    target = Cuda(arch=arch, precision=precision)
    lowered = target.lower(made)
    assert len(drawn_decisions(rng, lowered, target)) >= LAYERS
    # x, w and the result are rounded, each by at most eps / 2 of its own; the products' errors add up at random and
    # their sum is compared with the largest of many outputs: together well below four such roundings
    tolerance = 4 * EPSILONS[precision]
    close(emulated(target, lowered, tmp_path, {"x": x}, monkeypatch), reference(made, {"x": x}), tolerance)


@needs_emulator
@pytest.mark.parametrize(
    "channels", [3, pytest.param(1, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
def test_first_layers_read_pairs_of_pixels(channels, tmp_path, monkeypatch):
    """Windows that start at either pixel of a pair, and ones that cannot be pairs: of stride 1, or in an odd width."""
    rng = np.random.default_rng(channels)
    feeds = {"x": uniform(1, 2, channels, 9, 12), "odd": uniform(2, 1, channels, 8, 11)}
    constants, nodes, outputs = {}, [], []
    for i in range(LAYERS):
        k_h, k_w = (int(v) for v in rng.integers(1, 8, 2))
        stride = 1 if i == LAYERS - 1 else 2
        pads = [int(v) for v in rng.integers(0, 4, 4)]
        constants[f"w{i}"] = uniform(i + 3, int(rng.integers(5, 40)), channels, k_h, k_w)
        source = "odd" if i == LAYERS - 2 else "x"
        nodes.append(node("Conv", [source, f"w{i}"], [f"y{i}"], strides=[1 + i % 2, stride], pads=pads))
        outputs.append(f"y{i}")
    made = model(nodes, feeds, outputs, constants)
    target = Cuda(arch="sm_80", precision="float16")
    lowered = target.lower(made)
    assert "pair_pixels" in str(lowered.module) and len(drawn_decisions(rng, lowered, target)) == LAYERS
    close(emulated(target, lowered, tmp_path, feeds, monkeypatch), reference(made, feeds), 4 * EPSILONS["float16"])


@needs_emulator
@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.long), "sm_90"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_bytes_are_multiplied_exactly(seed, arch, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    channels = (20, 48)[seed]
    x = rng.integers(-128, 128, (2, channels, 9, 12)).astype(np.int8)
    constants = {"s": np.float32(1), "z": np.int8(-7), "wz": np.zeros((), np.int8)}
    nodes, wanted = [node("DequantizeLinear", ["x", "s", "z"], ["d"])], {}
    for i, (attributes, shape) in enumerate(drawn_layers(rng, channels)):
        constants[f"w{i}"] = rng.integers(-127, 128, shape).astype(np.int8)
        nodes += [node("DequantizeLinear", [f"w{i}", "s", "wz"], [f"v{i}"]),
                  node("Conv", ["d", f"v{i}"], [f"y{i}"], **attributes)]  # fmt: skip
        wanted[f"y{i}"] = integer_conv(x, constants[f"w{i}"], -7, **attributes).astype(np.float32)
    made = model(nodes, {"x": x}, list(wanted), constants)
    target = Cuda(arch=arch)
    lowered = target.lower(made)
    assert len(drawn_decisions(rng, lowered, target)) == LAYERS
    found = emulated(target, lowered, tmp_path, {"x": x}, monkeypatch)
    for name, sums in wanted.items():
        np.testing.assert_array_equal(found[name], sums)


def one_layer(precision: str, channels: int, outs: int, size: int, arch: str = "sm_80"):
    """A 3x3 layer with bias, residual and activation."""
    x = uniform(0, 1, channels, size, size)
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("Add", ["c", "x"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    constants = {"w": uniform(1, outs, channels, 3, 3), "b": uniform(2, outs)}
    target = Cuda(arch=arch, precision=precision)
    return target, target.lower(model(nodes, {"x": x}, ["y"], constants))


@needs_nvcc
@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("arch", ["sm_80", *(pytest.param(a, marks=pytest.mark.long) for a in ("sm_75", "sm_90"))])
def test_tiles_stay_in_registers(arch, count):
    """Tiles of a layer, evenly drawn, in one compilation. The first choice spills nothing; ptxas puts a word or two of
    others' into memory by its own choice, far below the limit. None needs more registers than the rule counts with."""
    import tvm

    target, lowered = one_layer("float16", 256, 256, 28, arch)
    workload = next(w for w in target.workloads(lowered).values() if product_of(w) is not None)
    space = tensor_cores.match(workload) or []
    tiles = {(d["rows"], d["columns"], d["down"], d["across"]) for d in space}
    assert len(tiles) >= 8 and len(space) >= 20
    space = space[:: max(len(space) // count, 1)]
    kernels = {}
    for i, decision in enumerate(space):
        kernel = cuda.schedule(workload, cuda.Choice(tensor_cores.NAME, decision))
        kernels[f"k{i}"] = kernel.func.with_attr("global_symbol", f"k{i}")
    from graphopt.targets.relax import cuda_executable

    compiled = target.tvm_target()
    with compiled, tvm.transform.PassContext(opt_level=3):
        host = cuda_executable.compile_kernels(tvm.IRModule(kernels), compiled)
    source = "\n".join(str(each.inspect_source()) for each in host.imports)
    needs = nvcc.compile_source(source, arch, jobs=2).kernels
    assert len(needs) == len(space)
    for i, decision in enumerate(space):
        needed = needs[f"k{i}_kernel"]
        assert needed.spill_bytes <= (0 if i == 0 else 32), decision
        assert needed.registers <= tensor_cores.Tile(**decision).registers("float16"), (decision, needed)


def test_the_rule_fills_the_multiprocessors():
    """Small layers get small tiles, or share out k; large ones large tiles."""
    small, large = (_first("float16", 512, 7), _first("float16", 128, 112))
    assert small["rows"] * small["columns"] < large["rows"] * large["columns"]
    assert large["rows"] * large["columns"] >= 64 * 64


def _first(precision: str, channels: int, size: int):
    target, lowered = one_layer(precision, channels, channels, size)
    workload = next(w for w in target.workloads(lowered).values() if product_of(w) is not None)
    space = tensor_cores.match(workload)
    assert space
    return space[0]


def test_architectures_without_units_get_other_kernels():
    target, lowered = one_layer("float32", 64, 64, 14)
    assert all(tensor_cores.match(w) is None for w in target.workloads(lowered).values())
    assert all("tensor_fp16" in each.features for each in ARCHITECTURES.values())
    assert json.loads(json.dumps(_first("float16", 64, 14))) == _first("float16", 64, 14)
