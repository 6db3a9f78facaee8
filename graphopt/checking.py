"""ONNX's checker and shape inference on a model that nobody has looked at yet, in a process of their own: they are
native code, and there are models that they crash on, or that make them compute for ever.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from graphopt import guard
from graphopt.errors import ModelError
from graphopt.progress import Progress

LIMIT_S = 30.0
LIMIT_S_PER_BYTE = 60e-9
"""How long checking may take: that, and a minute for each gigabyte."""
LIMIT_BYTES = 4 << 30
LIMIT_BYTES_PER_BYTE = 8
"""How much memory: that, and so much for each byte of the file."""

_GROWING = frozenset({"Tile", "Expand", "ConstantOfShape", "Range", "OneHot", "Pad", "Resize"})
_LARGE = 4096
_LONG = 1 << 20


def check_apart(file: Path, light: bytes | None, what: str) -> None:
    """Check a file as `graphopt.model.check` does, and infer the shapes of `light`: the model as it is handed to shape
    inference afterwards, if it can be. Raises ModelError naming `what`."""
    size = file.stat().st_size
    try:
        with tempfile.NamedTemporaryFile(prefix="graphopt-", suffix=".onnx") as handed:
            handed.write(light or b"")
            handed.flush()
            arguments = {"file": str(file), "light": handed.name, "what": what}
            limit_s = LIMIT_S + LIMIT_S_PER_BYTE * size
            guard.guarded(_check, arguments, preload=know_operators, limit_s=limit_s)
    except guard.CrashError as crash:
        raise ModelError(f"{what} crashes ONNX's checker ({crash}): it is no valid ONNX model") from crash
    except guard.TimeLimitError as late:
        raise ModelError(f"{what} keeps ONNX's checker busy for {late}: it is no valid ONNX model") from late
    except MemoryError:
        raise ModelError(f"{what} takes more memory to check than there is") from None
    except OSError as error:
        raise ModelError(f"cannot check {what}: {error.strerror or error}") from error


def check_file(file: Path | onnx.ModelProto, what: str) -> None:
    """ONNX's checker with full shape inference. Raises ModelError naming `what`."""
    try:
        onnx.checker.check_model(str(file) if isinstance(file, Path) else file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(f"{what} is not a valid ONNX model: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of ONNX's says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] if lines else type(error).__name__


def inferred(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with inferred shapes; None where inference refuses it.

    Contents of vectors are followed, too, as shapes may be computed from them; not where a vector is so long that ONNX,
    which makes an entry for each element of what is concatenated, would take all memory.
    """
    try:
        if _may_grow(model.graph):
            plain = onnx.shape_inference.infer_shapes(model)
            if _has_long_vector(plain.graph):
                return plain
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, MemoryError):  # the last: values of a huge declared size
        return None


def know_operators() -> None:
    """ONNX makes its table of operators when it checks for the first time, which takes longer than to check."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }"""
    onnx.checker.check_model(onnx.parser.parse_model(text), full_check=True)


def _may_grow(graph: onnx.GraphProto) -> bool:
    """Whether a constant in it may make a vector long."""
    if not any(node.op_type == "Concat" for node in graph.node):
        return False
    tensors = {each.name: each for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    tensors[node.output[0]] = attribute.t
    return any(
        node.op_type in _GROWING and any(name in tensors and _is_large(tensors[name]) for name in node.input)
        for node in graph.node
    )


def _is_large(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) or math.prod(tensor.dims) > 64:
        return False
    try:
        return bool((onnx.numpy_helper.to_array(tensor) >= _LARGE).any())
    except (ValueError, TypeError):  # it is not whole; the checker says so
        return False


def _has_long_vector(graph: onnx.GraphProto) -> bool:
    values = (*graph.value_info, *graph.output)
    shapes = [each.type.tensor_type.shape.dim for each in values if each.type.HasField("tensor_type")]
    return any(len(shape) == 1 and shape[0].dim_value > _LONG for shape in shapes)


def _check(arguments: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    file = Path(arguments["file"])
    if guard.is_worker():
        _limit_memory(LIMIT_BYTES + LIMIT_BYTES_PER_BYTE * file.stat().st_size)
    check_file(file, arguments["what"])
    light = Path(arguments["light"]).read_bytes()
    if light:
        inferred(onnx.load_model_from_string(light))
    return {}


def _limit_memory(more: int) -> None:
    """Of this process: what it has, and `more` bytes."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + more
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
