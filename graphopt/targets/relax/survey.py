"""Which nodes of a model the importer refuses, and why: found by importing it, past every refusal.

The outputs of a refused node become placeholders of their shape, so that whatever reads them is tried as well, on the
very operands it would have. What is made on the way is thrown away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import TargetError
from graphopt.targets.base import Survey, TensorType
from graphopt.targets.relax import importer, nodes
from graphopt.targets.relax.form import Form
from graphopt.targets.relax.values import Value


def survey(model: ir.Model, form: Form, known: Mapping[str, TensorType]) -> Survey:
    """`model` has static input shapes and no functions; `known`: types of values where they are static. Raises
    TargetError where an input cannot be one of a compiled model."""
    named = {value.name for node in model.graph for value in node.outputs}
    return _Surveyor(importer.prepared(model, form), form, known, named).survey()


@dataclass
class _Found:
    refused: dict[str, str] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)


class _Surveyor(importer.Importer):
    def __init__(
        self, proto: onnx.ModelProto, form: Form, known: Mapping[str, TensorType], named: Collection[str | None]
    ):
        super().__init__(proto, form)
        self.known, self.named = known, named
        self.found = _Found()

    def survey(self) -> Survey:
        from tvm import relax

        given = self.parameters()
        bb = self.builder.bb
        with bb.function("main", given):
            with bb.dataflow():
                for node in self.proto.graph.node:
                    self._try(node)
                nothing = bb.emit_output(relax.Tuple([]))
            bb.emit_func_output(nothing)
        return Survey(self.found.refused, self.found.types, self.found.constants)

    def _try(self, node: onnx.NodeProto) -> None:
        unknown = next((name for name in node.input if name and name not in self.values), None)
        try:
            if not importer.has_importer(node):
                raise TargetError(f"TVM lacks {nodes.operator(node)}")
            if unknown is not None:
                raise TargetError(f"the shape of its input {unknown!r} is not known before a run")
            self.node(node)
        except TargetError as error:
            self.found.refused.setdefault(self._origin(node), error.what)
            self._stand_in(node)
            return
        for name in node.output:
            value = self.values.get(name)
            if value is None or value.shape is None:
                continue
            self.found.types[name] = TensorType(value.dtype, value.shape)
            if value.const is not None:
                self.found.constants[name] = value.const

    def _stand_in(self, node: onnx.NodeProto) -> None:
        from tvm import relax

        for name in node.output:
            kind = self.known.get(name)
            if kind is None or kind.dtype not in importer.DTYPES:
                continue
            static: Any = kind.shape
            made = self.builder.emit(relax.op.zeros(static, kind.dtype))
            self.values[name] = Value(kind.shape, kind.dtype, plain=made)
            self.found.types[name] = kind

    def _origin(self, node: onnx.NodeProto) -> str:
        """The first output of the model's node that `node` was made of: of several made of one, the last has it."""
        pending, seen = [node], set[int]()
        while pending:
            each = pending.pop(0)
            for name in each.output:
                if name and name in self.named:
                    return name
            readers = [r for name in each.output for r in self.consumers.get(name, ()) if r is not None]
            pending += [r for r in readers if id(r) not in seen]
            seen.update(map(id, readers))
        return next(name for name in node.output if name)
