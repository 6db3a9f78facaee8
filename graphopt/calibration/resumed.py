"""Running a model over the data again and again while its later layers change: each run begins where the last ended.

What a run has computed for the values it was asked for is final, and what the rest of the model reads of it is held in
memory; the next run starts from there. Where that is more than `HELD_BYTES`, what was held before stays, or the data
itself, and the next run starts there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration.dataset import Dataset
from graphopt.calibration.observe import BATCH, open_session, run_batch, up_to, watch
from graphopt.errors import DataError, ModelError
from graphopt.graph import holds_subgraphs
from graphopt.progress import SILENT, Progress

HELD_BYTES = 256 << 20
"""Most that one series of runs holds."""
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_HELD_TYPES = frozenset(f"tensor({each})" for each in ("float", "double", "float16", "bool", *_INTEGERS))
Batch = dict[str, np.ndarray]


class ResumedRuns:
    """Runs of one model over `dataset`. Between them it may change, but for what earlier values were computed from.

    Nodes are told by the names of their outputs: new nodes write values of new names.
    """

    def __init__(self, dataset: Dataset, most_bytes: int = HELD_BYTES):
        self._dataset = dataset
        self._most_bytes = most_bytes
        self._steps = -(-len(dataset) // (dataset.fixed_batch or BATCH))
        self._held: list[Batch] | None = None
        self._known: set[str] = set()
        """Values that no later run computes, unless it has to start from the data again."""

    def watch(
        self, model: ir.Model, names: Iterable[str], *, label: str, progress: Progress = SILENT
    ) -> Iterator[Batch]:
        """As `graphopt.calibration.observe.watch`, which see, for values that are not to change any more.

        The next call must come when this one's batches have all been taken; else it starts from the data.
        """
        wanted = list(dict.fromkeys(names))
        if not wanted:
            return
        if len(self._dataset) == 0:
            raise DataError(f"no calibration samples in {self._dataset.source}")
        if any(holds_subgraphs(node) for node in model.graph):
            yield from watch(up_to(model, wanted), wanted, self._dataset, label=label, progress=progress)
            return
        proto = ir.to_proto(model)
        given, nodes = self._begin(proto.graph, wanted)
        made = {name for node in nodes if node.input for name in node.output if name}
        known = self._known | made
        later = [node for node in proto.graph.node if not known.issuperset(filter(None, node.output))]
        border = sorted({name for node in later for name in node.input} & (given.keys() | made))
        computed = [name for name in dict.fromkeys((*wanted, *border)) if name not in given]
        session = open_session(_part(proto, nodes, given, computed)) if nodes else None
        fed = [each.name for each in session.get_inputs()] if session is not None else []
        types = {each.name: each.type for each in session.get_outputs()} if session is not None else {}
        holding = all(types[name] in _HELD_TYPES for name in computed)
        batches = self._dataset.batches(BATCH) if self._held is None else list(self._held)
        fresh: list[Batch] = []
        total, done = len(self._dataset), 0
        with progress.task(label, total) as advance:
            for index, feeds in enumerate(batches):
                fetched = [name for name in computed if holding or name in wanted]
                inputs = {name: feeds[name] for name in fed}
                results = run_batch(session, fetched, inputs, self._dataset.source) if session is not None else {}
                results |= {name: np.asarray(feeds[name]) for name in (*wanted, *border) if name in given}
                if holding:
                    held = {name: np.asarray(results[name]) for name in border}
                    if index == 0:
                        holding = sum(each.nbytes for each in held.values()) * self._steps <= self._most_bytes
                    fresh.append(held)
                if holding and isinstance(batches, list):
                    batches[index] = {}  # not needed any more
                if holding and index + 1 == self._steps:
                    self._held, self._known = fresh, known
                elif holding:
                    self._held, self._known = None, set()
                yield {name: np.asarray(results[name]) for name in wanted}
                step = min(self._dataset.fixed_batch or BATCH, total - done)
                done += step
                advance(step)

    def _begin(
        self, graph: onnx.GraphProto, wanted: Sequence[str]
    ) -> tuple[dict[str, onnx.ValueInfoProto], list[onnx.NodeProto]]:
        """The values that this run is given, and the nodes that it has to compute."""
        if self._held is not None:
            given = {name: _described(name, [batch[name] for batch in self._held]) for name in self._held[0]}
            nodes = _behind(graph, wanted, given)
            if nodes is not None:
                return given, nodes
        self._held, self._known = None, set()
        stored = {each.name for each in graph.initializer}
        given = {each.name: each for each in graph.input if each.name not in stored}
        nodes = _behind(graph, wanted, given)
        if nodes is None:
            produced = {name for node in graph.node for name in node.output} | given.keys()
            missing = next((name for name in wanted if name not in produced), wanted[0])
            raise ModelError(f"there is no value {missing!r} in the model to observe")
        return given, nodes


def _behind(graph: onnx.GraphProto, wanted: Sequence[str], given: Iterable[str]) -> list[onnx.NodeProto] | None:
    """The nodes that compute `wanted` from `given`; None where these do not suffice."""
    start = set(given)
    needed = set(wanted) - start
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(name for name in node.input if name and name not in start)
    found = {name for node in nodes for name in node.output} | {each.name for each in graph.initializer}
    return nodes[::-1] if needed <= found else None


def _part(
    proto: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    given: dict[str, onnx.ValueInfoProto],
    computed: Sequence[str],
) -> bytes:
    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    part = onnx.ModelProto(ir_version=proto.ir_version)
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    part.graph.name = proto.graph.name or "part"
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(each for each in proto.graph.initializer if each.name in read)
    part.graph.value_info.extend(each for each in proto.graph.value_info if each.name in made)
    part.graph.input.extend(info for name, info in given.items() if name in read)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    return part.SerializeToString()


def _described(name: str, arrays: Sequence[np.ndarray]) -> onnx.ValueInfoProto:
    """The type of a held value; dimensions that vary from batch to batch are left open."""
    sizes = [set(each) for each in zip(*(array.shape for array in arrays), strict=True)]
    shape = [each.pop() if len(each) == 1 else None for each in sizes]
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype), shape)
