"""The onnx-simplifier package, run where neither a crash nor a bad result of it can reach the model.

It runs in a process of its own (it is C++ and has crashed on odd models), without its rewrites that change
rounding (folding BatchNormalization and biases, MatMul + Add to Gemm), and it never sees

* initializers that are also inputs, which a caller may override but it takes for constants: they are handed over
  as plain inputs and put back afterwards;
* QuantizeLinear and DequantizeLinear: it would fold the latter's int8 weights back to float. Such models,
  models with local functions, and models over protobuf's limit are left to graphopt's own clean-ups.

Its result is refused when the signature, the opset or the IR version differs, when no node goes or parameter bytes
grow, when ONNX's checker finds fault with it, and when one random input does not give the same bits as before in
ONNX Runtime without optimisations: it also reassociates ((x * a) * b becomes x * (a * b)), which cannot be
switched off.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt.errors import ModelError
from graphopt.model import PROTOBUF_LIMIT_BYTES, check, parameter_bytes, signature, to_bytes
from graphopt.shapes.constants import ort_refusals

SKIPPED_REWRITES = (
    "fuse_bn_into_conv",
    "fuse_add_bias_into_conv",
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "replace_einsum_with_matmul",
)
"""Rewrites that leave another order of floating-point operations: not exact."""

_TIMEOUT_S = 300.0
_SIZES_TRIED = (1, 8, 32, 64, 224)
"""For dynamic dimensions, when a random input is made."""
_SCRIPT = """\
import sys, onnx, onnxsim
model = onnx.load(sys.argv[1])
simplified, _ = onnxsim.simplify(model, skip_fuse_bn=True, skipped_optimizers=sys.argv[4:],
                                 tensor_size_threshold=sys.argv[3])
with open(sys.argv[2], "wb") as out:
    out.write(simplified.SerializeToString(deterministic=True))
"""


def simplify_with_onnxsim(model: ir.Model, max_folded_bytes: int) -> tuple[ir.Model, str | None]:
    """What onnxsim makes of `model` and None, or `model` as it was and the reason."""
    reason = _unfit(model)
    if reason is not None:
        return model, f"onnxsim not used: {reason}"
    overridable = {name: v for name, v in model.graph.initializers.items() if v.is_graph_input()}
    found = _run(model, tuple(overridable), max_folded_bytes)
    if isinstance(found, str):
        return model, f"onnxsim not used: {found}"
    for name, value in overridable.items():
        _restore(found, name, value)
    reason = _worse(model, found)
    return (found, None) if reason is None else (model, f"onnxsim's result refused: {reason}")


def _unfit(model: ir.Model) -> str | None:
    if g.count_nodes(model.graph) <= 1:
        return "there is no node that could go"
    if model.functions:
        return "the model has local functions"
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return "it would fold the model's quantized weights back to float"
    if parameter_bytes(model) > PROTOBUF_LIMIT_BYTES // 2:
        return "the model is over protobuf's size limit"
    return None


def _run(model: ir.Model, overridable: tuple[str, ...], max_folded_bytes: int) -> ir.Model | str:
    bare = model
    if overridable:
        bare = model.clone()
        for name in overridable:
            del bare.graph.initializers[name]
    with tempfile.TemporaryDirectory(prefix="graphopt-onnxsim-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(to_bytes(bare))
        command = [sys.executable, "-c", _SCRIPT, str(before), str(after), f"{max_folded_bytes}B", *SKIPPED_REWRITES]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return f"it took over {_TIMEOUT_S:.0f} s"
        except OSError as error:
            return f"it could not be started: {error}"
        if done.returncode != 0 or not after.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            return f"it failed with {ended}" + (f": {lines[-1].strip()[:200]}" if lines else "")
        try:
            return ir.from_proto(_parse(after.read_bytes()))
        except (google.protobuf.message.DecodeError, ValueError, TypeError, ir.serde.SerdeError) as error:
            return f"its result cannot be read: {error}"


def _parse(content: bytes):
    import onnx

    return onnx.load_model_from_string(content)


def _restore(model: ir.Model, name: str, value: ir.Value) -> None:
    for given in model.graph.inputs:
        if given.name == name:
            given.const_value = value.const_value
            model.graph.register_initializer(given)


def _worse(old: ir.Model, new: ir.Model) -> str | None:
    if signature(new) != signature(old) or len(new.graph.inputs) != len(old.graph.inputs):
        return "it changes the model's signature"
    if dict(new.opset_imports) != dict(old.opset_imports) or new.ir_version != old.ir_version:
        return "it changes the opset or IR version"
    before, after = g.count_nodes(old.graph), g.count_nodes(new.graph)
    if after >= before:
        return f"{before} nodes become {after}" if after > before else "it removes no node"
    bytes_before, bytes_after = parameter_bytes(old), parameter_bytes(new)
    if bytes_after > bytes_before + max(4096, bytes_before // 100):
        return f"{bytes_before} parameter bytes become {bytes_after}"
    try:
        check(new, "the model that onnxsim returned")
    except ModelError as error:
        return str(error)
    return _differs(old, new)


def _differs(old: ir.Model, new: ir.Model) -> str | None:
    for size in _SIZES_TRIED:
        expected = _run_once(old, size)
        if expected is not None:
            found = _run_once(new, size)
            if found is None:
                return "ONNX Runtime cannot run it"
            same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, found, strict=True))
            return None if same else "it does not compute the same bits"
    return "it could not be checked: no sizes found at which the model runs"


def _run_once(model: ir.Model, dynamic_size: int) -> list[np.ndarray] | None:
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    feeds = {}
    for spec in signature(model).inputs:
        shape = tuple(d if isinstance(d, int) else dynamic_size for d in spec.shape)
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.dtype.kind in "iub":
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
        else:
            return None
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])
        found = session.run(None, feeds)
    except ort_refusals():
        return None
    arrays = [y for y in found if isinstance(y, np.ndarray)]
    return arrays if len(arrays) == len(found) else None
