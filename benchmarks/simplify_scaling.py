"""How simplification grows with the number of nodes, and how much memory it takes; beside onnxsim and OnnxSlim.

    python benchmarks/simplify_scaling.py [--nodes 100 1000 10000 50000] [--tools simplify exact onnxsim onnxslim]
    python benchmarks/simplify_scaling.py --external-gb 4 [--folder DIR]

Two graphs of about so many nodes: `chain`, Add, Relu, Identity and Cast one behind the other; and `export`, blocks as
exporters write them: a residual Conv with BatchNormalization, a Reshape by Shape, Gather and Concat, a layer
normalization and a GELU written out, Dropout, equal subexpressions, Constant nodes.

Every tool runs in a process of its own, which reads and writes a file. Seconds are of that, imports left out, and
processor seconds behind the stroke, which other load on the machine changes less; memory is the largest
resident set of the process beyond what it had after its imports. The exponent is the slope of log(processor time) over
log(nodes) between the two largest graphs: 1 is linear.

`--external-gb` writes a model of that size whose weights lie in external data (matrices of 64 MiB; DIR needs twice so
much room, which is freed at the end) and prints the peak of reading, simplifying and writing it: the largest resident
set, pages of the mapped file included.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from simplifiers import TOOLS, measured

DEFAULT_TOOLS = ("simplify", "exact", "onnxsim", "onnxslim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10000, 50000])
    parser.add_argument("--tools", nargs="+", choices=sorted(TOOLS), default=list(DEFAULT_TOOLS))
    parser.add_argument("--graphs", nargs="+", choices=("chain", "export"), default=["chain", "export"])
    parser.add_argument("--external-gb", type=float)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.external_gb:
            _external(folder, arguments.external_gb)
            return
        print("| graph | nodes | " + " | ".join(f"{tool}: s, MiB, nodes left" for tool in arguments.tools) + " |")
        print("|---|---|" + "---|" * len(arguments.tools))
        for graph in arguments.graphs:
            _grow(folder, graph, arguments.nodes, arguments.tools)


def _grow(folder: Path, graph: str, sizes: list[int], tools: list[str]) -> None:
    seconds: dict[str, list[float]] = {tool: [] for tool in tools}
    counts = []
    for size in sizes:
        file = folder / f"{graph}.onnx"
        model = (chain if graph == "chain" else export)(size)
        onnx.save(model, file)
        counts.append(len(model.graph.node))
        cells = []
        for tool in tools:
            found = measured(tool, file, folder / "out.onnx")
            cells.append(
                "over the limit"
                if found is None
                else f"{found['s']:.2f}/{found['cpu_s']:.2f}, {found['mib']:.0f}, {found['nodes']}"
            )
            seconds[tool].append(math.nan if found is None else found["cpu_s"])
        print(f"| {graph} | {counts[-1]} | {' | '.join(cells)} |", flush=True)
    if len(sizes) > 1:
        slopes = [math.log(times[-1] / times[-2]) / math.log(counts[-1] / counts[-2]) for times in seconds.values()]
        print(f"| {graph} | exponent | {' | '.join(f'{slope:.2f}' for slope in slopes)} |", flush=True)


def chain(size: int) -> onnx.ModelProto:
    """Add, Relu, Identity, Cast (to the same type) one behind the other."""
    nodes, value = [], "x"
    for k in range(size):
        made = f"v{k}"
        inputs = [value, "one"] if k % 4 == 0 else [value]
        attributes: dict[str, Any] = {"to": TensorProto.FLOAT} if k % 4 == 3 else {}
        nodes.append(helper.make_node(("Add", "Relu", "Identity", "Cast")[k % 4], inputs, [made], **attributes))
        value = made
    return _model(nodes, [numpy_helper.from_array(np.ones(4, np.float32), "one")], ["N", 4], value)


def export(size: int) -> onnx.ModelProto:
    """Blocks of 42 nodes each; the image is (N, 8, 4, 4)."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def call(op: str, *inputs: str, **attributes) -> str:
        made = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [made], name=f"{op}_{len(nodes)}", **attributes))
        return made

    def constant(array, node: bool = False) -> str:
        array = np.asarray(array, np.float32) if np.asarray(array).dtype == np.float64 else np.asarray(array)
        if node:
            return call("Constant", value=numpy_helper.from_array(array))
        initializers.append(numpy_helper.from_array(array, f"c{len(initializers)}"))
        return initializers[-1].name

    value = "x"
    while len(nodes) < size:
        conv = call("Conv", value, constant(rng.standard_normal((8, 8, 3, 3)) / 9), pads=[1, 1, 1, 1])
        statistics = [constant(rng.uniform(0.5, 1.5, 8)) for _ in range(4)]
        summed = call("Add", call("Relu", call("BatchNormalization", conv, *statistics)), value)
        shape = call("Shape", summed)
        batch = call("Unsqueeze", call("Gather", shape, constant(np.int64(0), True)), constant(np.array([0]), True))
        rows = call("Reshape", summed, call("Concat", batch, constant(np.array([8, 16]), True), axis=0))
        mean = call("ReduceMean", rows, axes=[-1])
        difference, again = call("Sub", rows, mean), call("Sub", rows, mean)
        spread = call("ReduceMean", call("Pow", again, constant(2.0, True)), axes=[-1])
        root = call("Sqrt", call("Add", spread, constant(1e-5, True)))
        norm = call("Mul", call("Div", difference, root), constant(rng.uniform(0.5, 1.5, 16)))
        half = call("Mul", norm, constant(0.5, True))
        wave = call("Erf", call("Div", norm, constant(math.sqrt(2), True)))
        gelu = call("Mul", half, call("Add", wave, constant(1.0, True)))
        kept = call("Dropout", call("Identity", gelu))
        again_shape = call("Gather", call("Shape", summed), constant(np.int64(0), True))
        target = call(
            "Concat",
            call("Unsqueeze", again_shape, constant(np.array([0]), True)),
            constant(np.array([8, 4, 4]), True),
            axis=0,
        )
        value = call("Reshape", kept, target)
    return _model(nodes, initializers, ["N", 8, 4, 4], value)


def _model(nodes, initializers, shape, output: str) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _external(folder: Path, gigabytes: float) -> None:
    """MatMuls of 4096 x 4096 (64 MiB) with a bias, Identity and Dropout between them."""
    side = 4096
    count = max(1, round(gigabytes * 2**30 / (4 * side * side)))
    file, data = folder / "large.onnx", folder / "large.data"
    nodes, initializers, value = [], [], "x"
    rng = np.random.default_rng(0)
    with data.open("wb") as stream:
        for k in range(count):
            tensor = TensorProto(name=f"w{k}", data_type=TensorProto.FLOAT, dims=[side, side])
            tensor.data_location = TensorProto.EXTERNAL
            for key, number in (("location", data.name), ("offset", stream.tell()), ("length", 4 * side * side)):
                tensor.external_data.add(key=key, value=str(number))
            stream.write((rng.standard_normal((side, side), np.float32) / 64).tobytes())
            initializers += [tensor, numpy_helper.from_array(np.ones(side, np.float32), f"b{k}")]
            for op, inputs in (("MatMul", [value, f"w{k}"]), ("Add", [f"m{k}", f"b{k}"]), ("Identity", [f"a{k}"]),
                               ("Dropout", [f"i{k}"])):  # fmt: skip
                value = f"{op[0].lower()}{k}"
                nodes.append(helper.make_node(op, inputs, [value]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", side])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", side])],
        initializers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(proto.SerializeToString())
    size = data.stat().st_size / 2**20
    out = folder / "out"
    out.mkdir()
    print("| passes | MiB of weights | peak MiB, mapped pages included | of the size | seconds | nodes left |")
    print("|---|---|---|---|---|---|")
    for tool in ("simplify checked", "exact checked"):
        found = measured(tool, file, out / "out.onnx")
        if found is not None:
            cells = [tool, f"{size:.0f}", f"{found['mib']:.0f}", f"{found['mib'] / size:.2f}", f"{found['s']:.1f}"]
            print(f"| {' | '.join(cells)} | {found['nodes']} |")


if __name__ == "__main__":
    main()
