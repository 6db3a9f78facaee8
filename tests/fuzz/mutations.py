"""Changes to a model, each where the format has meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.fuzz.vocabulary import ATTRIBUTES, FLOATS, INTEGERS, LOCATIONS, NAMES, OPERATORS

Mutation = Callable[[ModelProto, Random], None]


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _graph(model: ModelProto, rng: Random) -> GraphProto:
    return rng.choice(list(_graphs(model.graph)))


def _node(model: ModelProto, rng: Random) -> NodeProto | None:
    nodes = [n for graph in _graphs(model.graph) for n in graph.node]
    nodes += [n for function in model.functions for n in function.node]
    return rng.choice(nodes) if nodes else None


def _tensor(model: ModelProto, rng: Random) -> TensorProto | None:
    found = [t for graph in _graphs(model.graph) for t in graph.initializer]
    found += [a.t for graph in _graphs(model.graph) for n in graph.node for a in n.attribute if a.HasField("t")]
    return rng.choice(found) if found else None


def _names(graph: GraphProto) -> list[str]:
    found = [name for n in graph.node for name in (*n.input, *n.output)]
    return [*found, *(v.name for v in (*graph.input, *graph.output, *graph.initializer)), *NAMES]


def attribute_value(model: ModelProto, rng: Random) -> None:
    """Another value of the same type."""
    node = _node(model, rng)
    if node is None or not node.attribute:
        return
    a = rng.choice(node.attribute)
    if a.type == AttributeProto.INT:
        a.i = rng.choice(INTEGERS)
    elif a.type == AttributeProto.FLOAT:
        a.f = rng.choice(FLOATS)
    elif a.type == AttributeProto.INTS:
        values = list(a.ints)
        how = rng.randrange(4)
        if how == 0 and values:
            values[rng.randrange(len(values))] = rng.choice(INTEGERS)
        elif how == 1:
            values = values[:-1]
        elif how == 2:
            values.append(rng.choice(INTEGERS))
        else:
            values = [rng.choice(INTEGERS) for _ in range(rng.choice((0, 1, 2, 4, 100)))]
        a.ints[:] = values
    elif a.type == AttributeProto.STRING:
        a.s = rng.choice(
            (b"", b"SAME_UPPER", b"VALID", b"NOTSET", b"\xff\xfe", b"linear", b"i,i,i->ii", b"x" * 3000, b"...ij->")
        )
    elif a.type == AttributeProto.FLOATS:
        a.floats[:] = [rng.choice(FLOATS) for _ in range(rng.randrange(5))]


def attribute_type(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None and node.attribute:
        rng.choice(node.attribute).type = rng.randrange(0, 15)  # pyright: ignore[reportAttributeAccessIssue]


def attribute_added(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is None:
        return
    name = rng.choice(ATTRIBUTES)
    value = rng.choice(
        (rng.choice(INTEGERS), rng.choice(FLOATS), "text", [rng.choice(INTEGERS)] * rng.randrange(1, 6), b"")
    )
    node.attribute.append(helper.make_attribute(name, value))


def attribute_removed(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def operator(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.op_type = rng.choice(OPERATORS)


def domain(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.domain = rng.choice(("", "ai.onnx", "com.microsoft", "ai.onnx.ml", "local", "com.example", *NAMES[:3]))


def rewired(model: ModelProto, rng: Random) -> None:
    """An input or output of a node gets another name: of anything, its own result (a cycle), or of nothing."""
    graph = _graph(model, rng)
    if not graph.node:
        return
    node = rng.choice(graph.node)
    ends = node.input if rng.random() < 0.7 else node.output
    if ends:
        ends[rng.randrange(len(ends))] = rng.choice(_names(graph))


def arity(model: ModelProto, rng: Random) -> None:
    node = _node(model, rng)
    if node is None:
        return
    ends = node.input if rng.random() < 0.6 else node.output
    if ends and rng.random() < 0.6:
        del ends[rng.randrange(len(ends))]
    else:
        ends.extend([rng.choice(("", "x", "extra"))] * rng.choice((1, 2, 40)))


def node_order(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    if len(graph.node) < 2:
        return
    i, j = rng.randrange(len(graph.node)), rng.randrange(len(graph.node))
    if rng.random() < 0.5:
        copy = NodeProto()
        copy.CopyFrom(graph.node[i])
        graph.node[i].CopyFrom(graph.node[j])
        graph.node[j].CopyFrom(copy)
    elif rng.random() < 0.5:
        graph.node.append(graph.node[i])
    else:
        del graph.node[i]


def renamed(model: ModelProto, rng: Random) -> None:
    """A declared name, or a node's, becomes another: twice the same, empty, odd."""
    graph = _graph(model, rng)
    named = [*graph.node, *graph.input, *graph.output, *graph.initializer]
    if named:
        rng.choice(named).name = rng.choice(_names(graph))


def renamed_everywhere(model: ModelProto, rng: Random) -> None:
    graph = model.graph
    names = [n for n in _names(graph) if n]
    old, new = rng.choice(names), rng.choice(NAMES)
    for node in graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        if value.name == old:
            value.name = new


def tensor_dims(model: ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    how = rng.randrange(5)
    if how == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif how == 1:
        tensor.dims.append(rng.choice(INTEGERS))
    elif how == 2 and tensor.dims:
        tensor.dims.pop()
    elif how == 3:
        tensor.dims[:] = [1 << 40, 1 << 20]
    else:
        tensor.dims[:] = list(reversed(tensor.dims))


def tensor_shape_and_content(model: ModelProto, rng: Random) -> None:
    """A tensor that is whole, of another shape: of weights, axes, scales, zero points."""
    tensor = _tensor(model, rng)
    if tensor is None or tensor.data_type in (0, TensorProto.STRING, TensorProto.BFLOAT16):
        return
    shape = [rng.choice((0, 1, 1, 2, 3, 4, 5, 8)) for _ in range(rng.randrange(0, 5))]
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        array = np.array(rng.choices((0, 1, 2, 3, -1, 7, 100), k=int(np.prod(shape)))).reshape(shape).astype(dtype)
    except (KeyError, TypeError):
        return
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def tensor_dtype(model: ModelProto, rng: Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is not None:
        tensor.data_type = rng.choice((*range(27), -1, 1 << 20))


def tensor_values(model: ModelProto, rng: Random) -> None:
    """NaN, infinity, extreme integers, zeros."""
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    try:
        array = numpy_helper.to_array(tensor).copy()
    except (ValueError, TypeError, KeyError):  # the last: an unknown type
        return
    if not array.size or array.dtype.kind not in "fiu":
        return
    flat = array.reshape(-1)
    at = rng.randrange(len(flat)) if rng.random() < 0.7 else slice(None)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # of float16
            flat[at] = rng.choice(FLOATS)
    else:
        info = np.iinfo(array.dtype)
        flat[at] = min(max(rng.choice(INTEGERS), int(info.min)), int(info.max))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def tensor_data(model: ModelProto, rng: Random) -> None:
    """Too little, too much, in the wrong field."""
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    how = rng.randrange(5)
    if how == 0:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif how == 1:
        tensor.raw_data = tensor.raw_data + b"\x00" * rng.choice((1, 3, 4, 1000))
    elif how == 2:
        tensor.float_data.append(1.0)
    elif how == 3:
        tensor.int64_data.append(1 << 40)
    else:
        tensor.string_data.append(b"\xff")


def initializer_dropped(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    if not graph.initializer:
        return
    at = rng.randrange(len(graph.initializer))
    if rng.random() < 0.4:
        graph.initializer.append(graph.initializer[at])
    elif rng.random() < 0.5:
        tensor = graph.initializer[at]
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    else:
        del graph.initializer[at]


def declared_type(model: ModelProto, rng: Random) -> None:
    graph = _graph(model, rng)
    values = [*graph.input, *graph.output, *graph.value_info]
    if not values:
        return
    value = rng.choice(values)
    how = rng.randrange(6)
    dims = value.type.tensor_type.shape.dim
    if how == 0:
        value.type.tensor_type.elem_type = rng.randrange(0, 27)
    elif how == 1 and dims:
        rng.choice(dims).dim_value = rng.choice(INTEGERS)
    elif how == 2 and dims:
        rng.choice(dims).dim_param = rng.choice((*NAMES, "N"))
    elif how == 3:
        dims.add().dim_value = rng.choice(INTEGERS)
    elif how == 4 and dims:
        del dims[rng.randrange(len(dims))]
    else:
        value.ClearField("type")
        if rng.random() < 0.6:
            value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def declared_value_info(model: ModelProto, rng: Random) -> None:
    name = rng.choice(_names(model.graph))
    shape = [rng.choice(INTEGERS) for _ in range(rng.randrange(4))]
    model.graph.value_info.append(helper.make_tensor_value_info(name, rng.choice((1, 7, 10, 11)), shape))


def ends(model: ModelProto, rng: Random) -> None:
    """The list of inputs or outputs of a graph grows, shrinks, or repeats itself."""
    graph = _graph(model, rng)
    values = graph.input if rng.random() < 0.5 else graph.output
    if values and rng.random() < 0.5:
        del values[rng.randrange(len(values))]
    elif values and rng.random() < 0.5:
        values.append(rng.choice(values))
    else:
        values.append(helper.make_tensor_value_info(rng.choice(_names(graph)), 1, [1]))


def versions(model: ModelProto, rng: Random) -> None:
    how = rng.randrange(4)
    if how == 0 and model.opset_import:
        rng.choice(model.opset_import).version = rng.choice((0, 1, 6, 7, 9, 11, 12, 13, 15, 18, 21, 22, 99, *INTEGERS))
    elif how == 1:
        model.ir_version = rng.choice((0, 1, 3, 4, 10, 13, 99, *INTEGERS))
    elif how == 2:
        model.opset_import.append(
            helper.make_opsetid(rng.choice(("", "com.microsoft", "local", "x")), rng.choice((1, 17, 99)))
        )
    else:
        del model.opset_import[:]


def subgraph(model: ModelProto, rng: Random) -> None:
    """A graph as an attribute, perhaps many in each other: a whole copy of the model, or of nothing."""
    node = _node(model, rng)
    if node is None:
        return
    inner = GraphProto()
    if rng.random() < 0.3:
        inner.CopyFrom(model.graph)
        if inner.ByteSize() > 10_000:
            inner.Clear()
    for _ in range(rng.choice((0, 1, 3, 12, 25))):  # a reader of protobuf refuses more than 100 levels
        outer = GraphProto(name="deep")
        deep = outer.node.add(op_type="If", input=["c"], output=["o"])
        deep.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g.CopyFrom(inner)
        inner = outer
    node.attribute.append(helper.make_attribute(rng.choice(("then_branch", "else_branch", "body", "g")), inner))


def function(model: ModelProto, rng: Random) -> None:
    """A local function that calls itself, is there twice, or takes the name of an operator."""
    if model.functions and rng.random() < 0.5:
        one = rng.choice(model.functions)
        how = rng.randrange(4)
        if how == 0:
            one.node.add(op_type=one.name, domain=one.domain, input=list(one.input), output=list(one.output))
        elif how == 1:
            model.functions.append(one)
        elif how == 2:
            del one.output[:]
        else:
            one.name = rng.choice(NAMES)
        return
    body = [helper.make_node(rng.choice(("Relu", "Mine")), ["a"], ["b"], domain=rng.choice(("", "mine")))]
    name = rng.choice(("Relu", "Mine", "Conv"))
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function(rng.choice(("", "mine")), name, ["a"], ["b"], body, opsets))


def long_chain(model: ModelProto, rng: Random) -> None:
    """Thousands of nodes after each other, or names that grow."""
    if not model.graph.output:
        return
    first = model.graph.output[0].name
    last = first
    for number in range(rng.choice((10, 300, 2000))):
        model.graph.node.add(op_type=rng.choice(("Identity", "Neg", "Relu")), input=[last], output=[f"chain{number}"])
        last = f"chain{number}"
    model.graph.output[0].name = last


def fields_cleared(model: ModelProto, rng: Random) -> None:
    holder = rng.choice(
        (model, model.graph, *model.graph.node[:5], *model.graph.initializer[:3], *model.graph.input[:2])
    )
    present = [field.name for field, _ in holder.ListFields()]
    if present:
        holder.ClearField(rng.choice(present))


def external(model: ModelProto, rng: Random) -> None:
    """Data in another file: outside, through links, too short, of odd offsets."""
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    for name in ("raw_data", "float_data", "int32_data", "int64_data"):
        if rng.random() < 0.9:
            tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": rng.choice(LOCATIONS)}
    if rng.random() < 0.5:
        entries["offset"] = rng.choice(("0", "4096", "-4", "abc", str(1 << 62), "1e3", ""))
    if rng.random() < 0.5:
        entries["length"] = rng.choice(("0", "8", "-8", "abc", str(1 << 62), "4096"))
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


MUTATIONS: tuple[Mutation, ...] = (
    attribute_value, attribute_value, attribute_type, attribute_added, attribute_removed, operator, operator,
    domain, rewired, rewired, arity, node_order, renamed, renamed_everywhere, tensor_dims, tensor_shape_and_content,
    tensor_shape_and_content, tensor_dtype, tensor_values, tensor_values, tensor_values, tensor_data,
    initializer_dropped, declared_type, declared_type, declared_value_info, ends, versions, subgraph, function,
    long_chain, fields_cleared, external,
)  # fmt: skip
