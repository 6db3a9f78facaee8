"""Loading, saving and identifying ONNX models. In memory a model is an `onnx_ir.Model`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir

from graphopt.checking import check_apart, check_file, first_line
from graphopt.errors import ModelError, nearest
from graphopt.external_data import bring_inside, check_tensors
from graphopt.graph import collection_paused, tensor_of
from graphopt.opsets import for_onnxruntime
from graphopt.shapes.inferred import inferred_shapes
from graphopt.shapes.onnx_inference import as_inferred, infer_shapes, without_large

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
PROTOBUF_LIMIT_BYTES = 2_147_483_647
CHECKED_WITH_WEIGHTS_BYTES = 256 << 20
"""A model in memory with more is checked by the types of its weights."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a graph input or output; a dynamic dimension is its name or None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    def __str__(self) -> str:
        dims = ",".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


@dataclass(frozen=True)
class Signature:
    """What a caller sees of a model; no pass may change it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def is_static(self) -> bool:
        return all(spec.is_static for spec in self.inputs)


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read and check an ONNX file; of a version that ONNX Runtime does not know, convert it where that is exact.

    Raises ModelError: missing, not ONNX, truncated, invalid, unknown domain.
    """
    model = _opened(path, checked=False)
    _check_domains(model, str(path))
    light = _light(model)
    check_apart(Path(path).absolute(), light, str(path))
    if light is None:
        raise ModelError(f"{path} is not a valid ONNX model: it has attributes or tensors of no type")
    return for_onnxruntime(model)


def read(path: str | os.PathLike[str]) -> ir.Model:
    """`load` without the checks, of a file that was checked before, or is graphopt's own. Raises ModelError."""
    return for_onnxruntime(_opened(path, checked=True))


def from_proto(proto: onnx.ModelProto, what: str = "the model") -> ir.Model:
    """A model that is in memory already, as `load` gives it. Raises ModelError as that does."""
    try:
        model = _with_sparse(ir.from_proto(proto), proto)
    except (ValueError, TypeError, ir.serde.SerdeError) as error:
        raise ModelError(f"cannot read {what}: {first_line(error)}") from error
    check(model, what)
    return for_onnxruntime(model)


def _light(model: ir.Model) -> bytes | None:
    """What shape inference will see; None where there is what onnx_ir cannot write, which the checker should name."""
    try:
        return as_inferred(model).SerializeToString()
    except (TypeError, ValueError, ir.serde.SerdeError):
        return None


def _opened(path: str | os.PathLike[str], checked: bool) -> ir.Model:
    """`checked`: its text was. Raises ModelError: missing, not ONNX, truncated, external data that is refused."""
    file = Path(path).absolute()  # a relative path would skip the containment check of external data
    if not file.exists():
        raise ModelError(f"no such file: {path}")
    if file.is_dir():
        raise ModelError(f"{path} is a folder, not an ONNX file")
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if file.stat().st_size == 0:
        raise ModelError(f"{path} is empty, not an ONNX file")
    try:
        with collection_paused():
            model = _read(file, str(path), checked)
    except google.protobuf.message.DecodeError:
        raise ModelError(f"{path} is not an ONNX file, or it is truncated") from None
    except (ValueError, TypeError, OSError, ir.serde.SerdeError) as error:
        raise ModelError(f"cannot read {path}: {first_line(error)}") from error
    if len(model.graph) == 0 and not model.graph.outputs:
        raise ModelError(f"{path} is not an ONNX file, or it is truncated: it holds no graph")
    return model


def _read(file: Path, what: str, checked: bool) -> ir.Model:
    """The model as it is; tensors in other files are read where all of them fit into one protobuf message."""
    proto = onnx.load(file, load_external_data=False)
    if not checked:
        _check_text(proto, what)
    outside = check_tensors(proto, file.parent, what)
    if outside:
        small = outside + file.stat().st_size < PROTOBUF_LIMIT_BYTES // 2
        bring_inside(proto, file.parent, with_initializers=small)
    model = _with_sparse(ir.from_proto(proto), proto)
    if outside:
        ir.external_data.set_base_dir(model.graph, file.parent)
    return model


def _check_text(message: google.protobuf.message.Message, what: str) -> None:
    """Names are UTF-8: protobuf reads others, as bytes, and refuses to write them. Raises ModelError."""
    if isinstance(message, onnx.NodeProto):
        if _is_text(message):
            return
    elif isinstance(message, onnx.TensorProto) and _is_plain_tensor(message):
        return
    for field, content in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for each in (content,) if isinstance(content, (str, bytes, google.protobuf.message.Message)) else content:
            if isinstance(each, bytes):
                raise ModelError(f"{what} is not a valid ONNX model: a {field.name} in it is no UTF-8: {each[:40]!r}")
            if not isinstance(each, str):
                _check_text(each, what)


def _is_text(node: onnx.NodeProto) -> bool:
    """Whether all text of a node is known to be; most nodes are settled by this, without going through their fields."""
    if node.metadata_props:
        return False
    texts = [node.name, node.op_type, node.domain, node.overload, node.doc_string, *node.input, *node.output]
    for attribute in node.attribute:
        if attribute.type not in _HOLD_NO_TEXT and not (
            attribute.type == onnx.AttributeProto.TENSOR and _is_plain_tensor(attribute.t)
        ):
            return False
        texts += attribute.name, attribute.ref_attr_name, attribute.doc_string
    return set(map(type, texts)) == {str}


def _is_plain_tensor(tensor: onnx.TensorProto) -> bool:
    """Whether all text of a tensor is known to be: its name."""
    return (
        type(tensor.name) is str
        and not tensor.external_data
        and not tensor.metadata_props
        and type(tensor.doc_string) is str
    )


_HOLD_NO_TEXT = frozenset({onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.FLOAT})


def _with_sparse(model: ir.Model, proto: onnx.ModelProto) -> ir.Model:
    """The model with its sparse initializers, which `onnx_ir` leaves out, as dense ones."""
    graph = model.graph
    if not proto.graph.sparse_initializer:
        return model
    unknown = {v.name: v for node in graph for v in node.inputs if v is not None and v.producer() is None}
    for sparse in proto.graph.sparse_initializer:
        name = sparse.values.name
        values = onnx.numpy_helper.to_array(sparse.values)
        places = onnx.numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        if places.ndim == 1:
            dense.reshape(-1)[places] = values
        else:
            dense[tuple(places.T)] = values
        value = unknown.get(name) or ir.Value(name=name)
        value.const_value = ir.tensor(dense, name=name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(dense.shape)
        graph.register_initializer(value)
    return model


def check(model: ir.Model, what: str) -> None:
    """ONNX's checker with full shape inference. Raises ModelError naming `what`."""
    _check_domains(model, what)
    large = parameter_bytes(model) > CHECKED_WITH_WEIGHTS_BYTES  # they would be copied, or be too much for protobuf
    check_file(without_large(model) if large else ir.to_proto(model), what)


def _check_domains(model: ir.Model, what: str) -> None:
    for opset in model.opset_imports:
        if opset not in KNOWN_DOMAINS:
            users = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain == opset]
            if users and not any(key[0] == opset for key in model.functions):
                raise ModelError(
                    f"{what} uses operator {users[0].op_type!r} of unknown domain {opset!r}",
                    node=users[0].name or users[0].outputs[0].name,
                    hint=f"known domains: {', '.join(sorted(d or 'ai.onnx' for d in KNOWN_DOMAINS if d != 'ai.onnx'))}",
                )


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write `path` whole or not at all; tensors go to `<name>.data` beside it when over protobuf's limit."""
    file = Path(path).absolute()
    large = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as folder:
        staged = Path(folder) / file.name
        if large > PROTOBUF_LIMIT_BYTES // 2:
            data = f"{file.name}.data"
            ir.save(model, staged, external_data=data)
            os.replace(Path(folder) / data, file.parent / data)
        else:
            staged.write_bytes(to_bytes(model))
        os.replace(staged, file)


def to_bytes(model: ir.Model) -> bytes:
    """The model serialised deterministically: the same model gives the same bytes."""
    with collection_paused():
        return ir.to_proto(model).SerializeToString(deterministic=True)


def digest(model: ir.Model) -> str:
    """sha256 of the serialised model."""
    return hashlib.sha256(to_bytes(model)).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while chunk := handle.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def signature(model: ir.Model) -> Signature:
    """The inputs that a caller must feed (initializers that are also inputs left out) and the outputs."""
    initial = model.graph.initializers
    feeds = [v for v in model.graph.inputs if v.name not in initial]
    return Signature(tuple(_spec(v) for v in feeds), tuple(_spec(v) for v in model.graph.outputs))


def parameter_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and constants."""
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    for node in model.graph:
        if node.op_type == "Constant":
            tensor = tensor_of(node.outputs[0])
            total += tensor.nbytes if tensor is not None else 0
    return total


def fix_inputs(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy whose named inputs have these static shapes. Raises ModelError: unknown input, rank, conflict."""
    if not shapes:
        return model
    fixed = model.clone()
    by_name = {v.name: v for v in fixed.graph.inputs}
    named: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in by_name:
            near = nearest(name, [n for n in by_name if n])
            hint = f"did you mean {near!r}?" if near else f"its inputs are: {', '.join(map(str, by_name))}"
            raise ModelError(f"the model has no input {name!r}", hint=hint)
        value = by_name[name]
        old = value.shape
        if old is not None and len(old) != len(shape):
            raise ModelError(
                f"input {name!r} has rank {len(old)}, --input gives {len(shape)} dimensions",
                hint=f"it is {_spec(value)}",
            )
        for axis, want in enumerate(shape):
            if want < 1:
                raise ModelError(f"input {name!r}: dimension {axis} is {want}, it must be positive")
        for axis, (want, have) in enumerate(zip(shape, old if old is not None else (), strict=False)):
            if isinstance(have, int) and have != want:
                raise ModelError(f"input {name!r}: dimension {axis} is fixed to {have}, --input gives {want}")
            label = None if isinstance(have, int) else have.value
            if label is not None and named.setdefault(label, want) != want:
                raise ModelError(f"dimension {label!r} cannot be both {named[label]} and {want}")
        value.shape = ir.Shape(shape)
    for value in fixed.graph.inputs:  # a named dimension fixed on one input is fixed on all
        if value.shape is not None and any(not isinstance(d, int) and d.value in named for d in value.shape):
            value.shape = ir.Shape([d if isinstance(d, int) else named.get(str(d.value), d) for d in value.shape])
    for node in fixed.graph:  # recorded shapes of inner values and outputs may be stale now
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in fixed.graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else named.get(str(d.value), d) for d in value.shape])
    _record_shapes(fixed)
    return fixed


def _record_shapes(model: ir.Model) -> None:
    """Write down every shape that can be inferred; a name on an output stays where its size remains unknown."""
    infer_shapes(scratch := model.clone())
    types = {v.name: v.type for node in scratch.graph for v in node.outputs}
    shapes = inferred_shapes(model)
    for node in model.graph:
        for value in node.outputs:
            if value.type is None:
                value.type = types.get(value.name)
            found = shapes.get(str(value.name))
            if found is not None:
                names = value.shape if value.shape is not None and len(value.shape) == len(found) else found
                value.shape = ir.Shape([n if f is None else f for f, n in zip(found, names, strict=True)])


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise ModelError(f"{value.name!r} is not a tensor: sequence, map and optional inputs are not supported")
    try:
        dtype = np.dtype(value.dtype.numpy())
    except TypeError as error:
        raise ModelError(f"{value.name!r} has no type of elements that is known: {value.dtype}") from error
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorSpec(str(value.name), dtype, dims)
