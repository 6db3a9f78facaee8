"""Models written node by node, fused, and held to what rounding explains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from graphopt import model as models
from graphopt.passes.base import Context, Fidelity, PassResult
from graphopt.passes.fuse_operators import FuseOperators
from graphopt.verify import Reference


class Writing:
    """A graph being written: `call` adds a node, `constant` an initializer; both return a name."""

    def __init__(self, inputs: Mapping[str, tuple[int | str, ...]], opset: int = 17):
        self.inputs = dict(inputs)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def call(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"v{len(self.nodes)}" + (f"_{k}" if k else "") for k in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, array: Any) -> str:
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def reduce(self, op: str, value: str, axes: list[int], keepdims: int = 1) -> str:
        if self.opset < (13 if op == "ReduceSum" else 18):
            return self.call(op, value, axes=axes, keepdims=keepdims)
        return self.call(op, value, np.array(axes, np.int64), keepdims=keepdims)

    def model(self, *outputs: str) -> ir.Model:
        """The types of outputs are inferred."""
        infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in self.inputs.items()]
        empty = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "written", infos, empty, self.constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
        return ir.from_proto(proto)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def fuse(
    model: ir.Model, feeds: Mapping[str, np.ndarray] | None = None, rewrite: FuseOperators | None = None
) -> PassResult:
    """The result of fusing a copy; with `feeds`, held to the original's numbers within what rounding explains."""
    result = (rewrite or FuseOperators()).run(model.clone(), Context())
    models.check(result.model, "the fused model")
    assert models.signature(result.model) == models.signature(model)
    if feeds is not None:
        with tempfile.TemporaryDirectory() as folder:
            Reference(model, [feeds], Path(folder)).judge_model(result.model, Fidelity.ROUNDING, "fuse-operators")
    return result
