"""Remove everything from a graph that its result does not need.

    f(c1, c2, ...)                 =  c           constants are computed now
    Reshape(x, Concat(Shape(x)[0], 64))  =  Reshape(x, [0, 64])
    f(x), f(x)                     =  one f(x)

Cases, in the order they are tried; repeated until nothing changes:

1. Initializers that are also listed as inputs become constants, no longer listed. Up to IR version 3 the format
   demands the listing (ONNX Runtime reads them as constants too; the IR version becomes 4). From version 4 on they
   are defaults that a caller could override; old exporters list every weight, graphopt's signature leaves them out,
   and no weight could be folded or quantized otherwise. `keep_overridable=true` keeps them, and never folds them.
2. Constant nodes become initializers of the same name.
3. Shapes are inferred, also where dimensions are dynamic (as polynomials: H + 2 - 3 + 1 = H).
4. Integer vectors computed from known dimensions become constants; a Reshape whose target is known in all elements
   but one gets a constant target with -1 there, or one for what it is a reshaped form of; and a vector joined from
   parts of shapes is joined from numbers and from single dimensions that are there anyway, which Shape gives itself.
5. Nodes whose operands are all constant are computed with ONNX Runtime's own kernels. A result of more than
   `max_folded_bytes` bytes is stored only if it takes no more room than the initializers it replaces: a large
   ConstantOfShape, Expand, Tile or Range stays a node.
6. Nodes that change nothing go: Identity, Dropout in inference, Cast to the same type, Reshape, Expand, Flatten to
   the same shape, Transpose in order, Pad by nothing, Slice of everything, Tile by 1, Concat or Sum of one, x + 0,
   x - 0, x * 1, x / 1, x and true, x or false, Relu of Relu and of what is never negative, Abs of Abs, Floor of
   Floor ...; GatherND or Gather of all elements in the order in which they lie is a Reshape.
7. Neighbours are joined: Transpose of Transpose; Reshape, Flatten, Squeeze, Unsqueeze and a Transpose that moves
   dimensions of size 1 only, of each other; Slice of Slice on other axes; slices that cut a value into pieces become
   one Split; Concat of Concat on one axis; Clip from at least 0 of Relu.
8. Equal constants (up to 1 KiB; of INT64 up to 1 MiB), equal shape vectors (Shape(Relu(x)) is Shape(x)) and equal
   nodes are merged.
9. Nodes, initializers, optional outputs and functions nobody uses go.
10. With `use_onnxsim`, onnx-simplifier is asked as well, in a process of its own and without its rewrites that change
    rounding; its answer is taken if it has fewer nodes, no more bytes, and gives the same bits on a random input.

Applies when: always; the signature (names, types, shapes, order of inputs and outputs) stays as it is.
Refuses when: a node carries a subgraph (If, Loop, Scan), is random, belongs to a domain other than ONNX's, handles
sequences or optionals, or is a QuantizeLinear or DequantizeLinear: such nodes are left as they are, though what feeds
them may be simplified. A node whose result is an output of the model and would become an input or a constant stays.
Differences accepted: x + 0 turns -0.0 into +0.0, and Relu a NaN into 0, which their removal does not; a tensor with no
elements may be reshaped with -1 where the original spelled a size; and a runtime may choose another kernel for a weight
that has become a constant. onnxscript's optimizer also drops an epsilon of 1e-9 added to a variance; nothing here does:
that is not exact.
Fidelity: EXACT.
Reference: onnx-simplifier (github.com/daquexian/onnx-simplifier) for the idea of folding with the runtime's kernels.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt import graph as g
from graphopt.errors import PassError
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.cleanup.chains import fuse_chains
from graphopt.passes.cleanup.duplicates import ConstantKeys, merge_duplicates
from graphopt.passes.cleanup.guarded_onnxsim import simplify_with_onnxsim
from graphopt.passes.cleanup.index_grids import drop_index_grids
from graphopt.passes.cleanup.redundant import drop_redundant
from graphopt.passes.cleanup.shape_vectors import read_single_dimensions, spell_vectors
from graphopt.shapes.constants import fold_constants, lift_constants
from graphopt.shapes.facts import store_known_vectors
from graphopt.shapes.inference import infer_facts

_MOST_ROUNDS = 50


class Simplify(Pass):
    """Constant folding, shape arithmetic, common subexpressions, and nodes that do nothing.

    `use_onnxsim`: also ask onnx-simplifier, guarded (it found nothing on any shared model, and costs seconds).
    `max_folded_bytes`: the most that one folded result may add to the model. `keep_overridable`: initializers listed as
    inputs stay inputs (IR version 4 and later).
    """

    fidelity = Fidelity.EXACT

    use_onnxsim: bool = False
    max_folded_bytes: int = 262144
    keep_overridable: bool = False

    def __post_init__(self) -> None:
        if self.max_folded_bytes < 0:
            raise ValueError(f"max_folded_bytes={self.max_folded_bytes} must not be negative")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Simplify `model`; `applied` is the number of nodes and Constant nodes that are gone."""
        before = len(model.graph)
        notes: list[str] = []
        unlisted = 0 if self.keep_overridable and (model.ir_version or 4) >= 4 else constants_from_inputs(model)
        if unlisted:
            notes.append(f"{unlisted} initializers that were listed as inputs are constants now")
        overridable = sum(v.is_graph_input() for v in model.graph.initializers.values())
        if overridable:
            notes.append(f"{overridable} initializers are inputs that a caller may override: not folded")
        self._to_fixpoint(model)
        if self.use_onnxsim:
            own = g.count_nodes(model.graph)
            model, note = simplify_with_onnxsim(model, self.max_folded_bytes)
            if note is not None:
                notes.append(note)
            else:
                notes.append(f"onnxsim removed {own - g.count_nodes(model.graph)} more nodes")
                self._to_fixpoint(model)
        if (model.ir_version or 4) < 4 and any(not v.is_graph_input() for v in model.graph.initializers.values()):
            model.ir_version = 4  # before it, every initializer had to be an input
        skipped = tuple(
            Skip(g.label(node), "its subgraphs are left as they are") for node in model.graph if g.holds_subgraphs(node)
        )
        return PassResult(model, before - len(model.graph), skipped, tuple(notes))

    def _to_fixpoint(self, model: ir.Model) -> None:
        given = frozenset(model.graph.initializers)
        declared = [(v.shape, v.type) for v in model.graph.outputs]
        with g.remembering_names(model.graph), g.collection_paused():
            for attempt in range(_MOST_ROUNDS):
                if self._settled(model, given, partly=attempt == 0):
                    break
            else:
                raise PassError(f"simplify does not settle in {_MOST_ROUNDS} rounds", hint="please report the model")
        for value, (shape, type_) in zip(model.graph.outputs, declared, strict=True):
            value.shape, value.type = shape, type_

    def _settled(self, model: ir.Model, given: frozenset[str], partly: bool) -> bool:
        """Infer shapes, then do what follows from them until nothing changes.

        False where more may be inferred now: there are shapes yet to be learnt, and something changed, or they were
        inferred only `partly`, which is enough for many models and takes far less time.
        """
        changed = lift_constants(model, merge=True)
        facts, constants = infer_facts(model, partly), ConstantKeys()
        for _ in range(_MOST_ROUNDS):
            step = store_known_vectors(model, facts)
            step += fold_constants(model, self.max_folded_bytes, given)
            step += drop_redundant(model, facts)
            step += fuse_chains(model, facts)
            step += drop_index_grids(model, facts)
            step += merge_duplicates(model, facts, constants)
            step += spell_vectors(model, facts)
            step += read_single_dimensions(model, facts)
            step += _remove_unused(model)
            changed += step
            if not step:
                return facts.are_complete(model) or not (changed or partly)
            facts.update(model)
        return False


def constants_from_inputs(model: ir.Model) -> int:
    """Case 1: take initializers off the list of inputs; returns how many."""
    listed = [v for v in model.graph.inputs if v.name in model.graph.initializers]
    for value in listed:
        model.graph.inputs.remove(value)
    return len(listed)


def _remove_unused(model: ir.Model) -> int:
    before = len(model.graph)
    if _remove_dead(model.graph):
        common.RemoveUnusedNodesPass()(model)
    if model.functions:
        common.RemoveUnusedFunctionsPass()(model)
    g.remove_unused_initializers(model.graph)
    return before - len(model.graph)


def _remove_dead(graph: ir.Graph) -> bool:
    """Remove nodes of the main graph that nobody reads, and what only they read; whether there may be more to do:

    nodes in subgraphs, and outputs that are not read of nodes that stay.
    """
    more, found = False, []
    for node in graph:
        read = [bool(v.uses()) or v.is_graph_output() for v in node.outputs]
        if not any(read):
            found.append(node)
        elif not more:
            more = not all(read) or g.holds_subgraphs(node)
    while found:
        producers = {v.producer() for node in found for v in node.inputs if v is not None}
        graph.remove(found, safe=True)
        alive = [node for node in producers if node is not None and node.graph is graph]
        found = [node for node in alive if not any(v.uses() or v.is_graph_output() for v in node.outputs)]
        more = more or any(len(node.outputs) > 1 for node in alive)
    return more
