"""The simplifiers that are compared, each in a process of its own: `python benchmarks/simplifiers.py TOOL IN OUT`.

It reads IN, writes OUT, and prints a line of JSON: seconds and processor seconds of that, imports left out; the largest
resident set beyond what the process had after its imports, in MiB; nodes left, Constant nodes not counted, subgraphs
included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx

LIMIT_S = 900.0


def measured(tool: str, file: Path, out: Path) -> dict[str, float] | None:
    """Seconds, MiB and nodes left of a tool on a file; None where it takes over the limit or fails."""
    command = [sys.executable, __file__, tool, str(file), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(f"{tool} on {file.name}: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _child(tool: str, source: str, target: str) -> None:
    run = TOOLS[tool]()
    before, begun, processor = _status("VmRSS"), time.perf_counter(), time.process_time()
    run(source, target)
    seconds, processor = time.perf_counter() - begun, time.process_time() - processor
    peak = _status("VmHWM")
    model = onnx.load(target, load_external_data=False)
    found = {"s": seconds, "cpu_s": processor, "mib": (peak - before) / 1024, "nodes": count_nodes(model.graph)}
    print(json.dumps(found))


def count_nodes(graph: onnx.GraphProto) -> int:
    """Constant nodes not counted, subgraphs included."""
    inner = sum(count_nodes(g) for node in graph.node for a in node.attribute for g in (*a.graphs, *_graph(a)))
    return inner + sum(node.op_type != "Constant" for node in graph.node)


def _graph(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [attribute.g] if attribute.HasField("g") else []


def _status(key: str) -> int:
    """KiB, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


def _graphopt(passes: str, checked: bool = False):
    import onnxruntime  # noqa: F401 - an import is not what is timed

    from graphopt import model as models
    from graphopt.passes.base import Context
    from graphopt.pipeline import Pipeline

    pipeline = Pipeline.parse(passes)

    def run(source: str, target: str) -> None:
        model = models.load(source) if checked else models.read(source)
        if checked:  # as `graphopt optimize` runs them: on a copy, ONNX's checker after each
            model, _ = pipeline.run(model, Context())
        else:
            for each in pipeline.passes:
                model = each.run(model, Context()).model
        models.save(model, target)

    return run


def _onnxsim():
    import onnxsim

    return lambda source, target: onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxslim():
    import onnxslim  # pyright: ignore[reportMissingImports]

    def run(source: str, target: str) -> None:
        slimmed: Any = onnxslim.slim(onnx.load(source))
        onnx.save(slimmed, target)

    return run


def _onnxscript():
    import onnx_ir as ir
    import onnxscript.optimizer

    def run(source: str, target: str) -> None:
        model = ir.load(Path(source).absolute())
        onnxscript.optimizer.optimize(model)
        ir.save(model, target)

    return run


def _onnxruntime(level: str):
    import onnxruntime

    def run(source: str, target: str) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = target
        options.log_severity_level = 4
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    return run


TOOLS = {
    "simplify": lambda: _graphopt("simplify"),
    "exact": lambda: _graphopt("standard-operators,simplify,fold-batch-norm,fuse-operators"),
    "simplify checked": lambda: _graphopt("simplify", True),
    "exact checked": lambda: _graphopt("standard-operators,simplify,fold-batch-norm,fuse-operators", True),
    "onnxsim": _onnxsim,
    "onnxslim": _onnxslim,
    "onnxscript": _onnxscript,
    "ort-basic": lambda: _onnxruntime("BASIC"),
    "ort-extended": lambda: _onnxruntime("EXTENDED"),
}


if __name__ == "__main__":
    _child(*sys.argv[1:])
