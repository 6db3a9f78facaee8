"""Tensors that an ONNX file keeps in other files: only in the model's own folder, and only as large as they say.

A model is data from somebody else, and where its tensors lie is part of it. So before anything is read, every location
is checked: it is relative, has no `..`, leads through no link out of the folder, and is a regular file with one name (a
hard link may be another name of any file that its maker could not read). The bytes that a tensor declares must be
there: nothing is allocated on the word of a file.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from graphopt.errors import ModelError

_BITS = {
    "COMPLEX128": 128, "COMPLEX64": 64, "DOUBLE": 64, "INT64": 64, "UINT64": 64, "FLOAT": 32, "INT32": 32, "UINT32": 32,
    "FLOAT16": 16, "BFLOAT16": 16, "INT16": 16, "UINT16": 16, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6, "INT4": 4, "UINT4": 4,
    "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2,
}  # fmt: skip
"""Of an element; of any other type 8."""
_FIELDS = {
    "FLOAT": "float_data", "COMPLEX64": "float_data", "DOUBLE": "double_data", "COMPLEX128": "double_data",
    "INT64": "int64_data", "UINT64": "uint64_data", "UINT32": "uint64_data", "STRING": "string_data",
}  # fmt: skip
"""Where the entries of a type lie; of any other in int32_data."""
_NAMES = dict(zip(TensorProto.DataType.values(), TensorProto.DataType.keys(), strict=True))


def check_tensors(model: ModelProto, folder: Path, what: str) -> int:
    """Check every tensor of a model that lies in `folder`; returns the bytes that lie in other files.

    Raises ModelError naming the tensor: where it may not lie, or where fewer bytes are there than it declares.
    """
    total = 0
    for tensor in _tensors(model):
        wanted = declared_bytes(tensor, what)
        if tensor.data_location == TensorProto.EXTERNAL:
            _, _, size = _place(tensor, wanted, folder)
            total += size
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
            raise ModelError(
                f"{what} is not a valid ONNX model: tensor {tensor.name!r} of {list(tensor.dims)} has {wanted} bytes, "
                f"{len(tensor.raw_data)} are there"
            )
        elif not tensor.HasField("raw_data"):
            _check_entries(tensor, what)
    return total


def _check_entries(tensor: TensorProto, what: str) -> None:
    """The field for a tensor's type has as many entries as its shape says."""
    kind = _NAMES.get(tensor.data_type, "UNDEFINED")
    if kind == "UNDEFINED" or kind.startswith("FLOAT6"):
        return  # onnx's checker refuses the first, and packs the second in its own way
    wanted = math.prod(tensor.dims)
    if kind.startswith("COMPLEX"):
        wanted *= 2
    elif _BITS.get(kind, 8) < 8:
        wanted = -(-wanted * _BITS[kind] // 8)
    found = len(getattr(tensor, _FIELDS.get(kind, "int32_data")))
    if found != wanted:
        raise ModelError(
            f"{what} is not a valid ONNX model: tensor {tensor.name!r} of {list(tensor.dims)[:8]} has {wanted} "
            f"entries, {found} are there"
        )


def bring_inside(model: ModelProto, folder: Path, with_initializers: bool) -> None:
    """Read the data of checked tensors into the model: of attributes, and of the main graph's initializers if asked."""
    for tensor in _tensors(model, with_initializers):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        path, offset, size = _place(tensor, declared_bytes(tensor, str(folder)), folder)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(size)
        except OSError as error:
            raise ModelError(f"external data of {tensor.name!r} cannot be read: {error.strerror}") from error
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT


def declared_bytes(tensor: TensorProto, what: str) -> int:
    """What the shape and type of a tensor make. Raises ModelError for negative dimensions and strings elsewhere."""
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{what} is not a valid ONNX model: tensor {tensor.name!r} has shape {list(tensor.dims)[:8]}")
    return -(-math.prod(tensor.dims) * _BITS.get(_NAMES.get(tensor.data_type, ""), 8) // 8)


def _place(tensor: TensorProto, wanted: int, folder: Path) -> tuple[Path, int, int]:
    """File, offset and length of a tensor's data, checked."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries:
            raise _refused(tensor, f"its {entry.key} is given twice")
        entries[entry.key] = entry.value
    path = _file(tensor, entries.get("location", ""), folder)
    offset, length = (_number(tensor, entries, key) for key in ("offset", "length"))
    offset = offset or 0
    if length is not None and length != wanted:
        raise _refused(tensor, f"its shape {list(tensor.dims)[:8]} has {wanted} bytes, its length says {length}")
    size = path.stat().st_size
    if offset + wanted > size:
        raise _refused(tensor, f"it takes bytes {offset} to {offset + wanted} of {path.name}, which has {size}")
    return path, offset, wanted


def _file(tensor: TensorProto, location: str, folder: Path) -> Path:
    if not location or "\0" in location or not PurePosixPath(location).parts:
        raise _refused(tensor, f"{location!r} is no name of a file")
    pure, windows = PurePosixPath(location), PureWindowsPath(location)
    if pure.is_absolute() or windows.is_absolute() or windows.drive:
        raise _refused(tensor, f"{location!r} is an absolute path")
    if ".." in pure.parts or ".." in windows.parts:
        raise _refused(tensor, f"{location!r} leads out of the model's folder by '..'")
    try:
        path, home = (folder / pure).resolve(strict=True), folder.resolve(strict=True)
        found = path.stat()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link leads to itself"
        raise _refused(tensor, f"{location!r}: {reason}", "put it beside the model") from error
    if not path.is_relative_to(home):
        raise _refused(tensor, f"{location!r} leads out of the model's folder by a symbolic link")
    if not stat.S_ISREG(found.st_mode):
        raise _refused(tensor, f"{location!r} is no regular file")
    if found.st_nlink > 1:
        raise _refused(tensor, f"{location!r} is a hard link: it may be any file's other name", "make a copy of it")
    if not os.access(path, os.R_OK):
        raise _refused(tensor, f"{location!r} cannot be read: Permission denied")
    return path


def _number(tensor: TensorProto, entries: dict[str, str], key: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise _refused(tensor, f"its {key} {text[:40]!r} is no number of bytes")
    return int(text)


def _refused(tensor: TensorProto, reason: str, hint: str | None = None) -> ModelError:
    return ModelError(f"external data of {tensor.name!r} is refused: {reason}", hint=hint)


def _tensors(model: ModelProto, with_initializers: bool = True) -> Iterator[TensorProto]:
    """All; or all but the initializers of the main graph."""
    yield from _in_graph(model.graph) if with_initializers else _in_nodes(model.graph.node)
    for function in model.functions:
        yield from _in_nodes(function.node)
    for training in model.training_info:
        yield from _in_graph(training.initialization)
        yield from _in_graph(training.algorithm)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _in_attribute(attribute)


def _in_attribute(attribute: onnx.AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for sparse in (
        *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
        *attribute.sparse_tensors,
    ):
        yield from (sparse.values, sparse.indices)
    if attribute.HasField("g"):
        yield from _in_graph(attribute.g)
    for graph in attribute.graphs:
        yield from _in_graph(graph)
