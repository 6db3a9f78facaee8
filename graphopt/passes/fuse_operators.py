"""Find operators that an exporter wrote out in parts, and write the one that ONNX has for them.

    x / 2 * (1 + Erf(x / sqrt(2)))  =  Gelu(x)         and so on: a file for each in passes/fusion

1. DepthToSpace: Reshape, Transpose, Reshape.
2. Conv, ConvTranspose or MatMul and a constant bias: their own bias, Gemm.
3. InstanceNormalization (opset 6), LayerNormalization (17), RMSNormalization (23).
4. Gelu, exact and by tanh (20).
5. RotaryEmbedding (23): pairs of numbers turned by an angle a position.
6. Attention (23): softmax(s q k^T + mask) v, over heads, grouped or not.
7. Swish (24): x * Sigmoid(x).

Operators of a newer set than the model's raise its opset, at most to `max_opset`, where all its other operators mean
the same there. The default is 23: ONNX Runtime 1.31 has kernels for everything above that needs no newer one. Swish is
expanded there and slower than what it stands for, so it has to be asked for (max_opset=24).

Applies when: the parts are there with exactly these constants (each file states its conditions), in float32, and nobody
else reads a value in between: what is an output of the model, or read in a subgraph, stays.
Refuses when (reported): the opset cannot be raised.
Fidelity: ROUNDING.
Reference: in each pattern's file.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.fusion import attention, bias, depth_to_space, gelu, normalization, rotary_embedding, swish
from graphopt.passes.fusion.opset import raise_opset, refusal
from graphopt.passes.fusion.pattern import Fusion, View, is_closed, replace
from graphopt.passes.simplify import Simplify
from graphopt.shapes.inference import infer_facts

PATTERNS = (depth_to_space, bias, normalization, gelu, rotary_embedding, attention, swish)
"""In the order they are tried. The last one only where its opset is asked for, whatever the model's is."""
_OPSETS = (24, 23, 20, 17, 11)
"""Those that brought an operator a pattern makes, or a form of it."""


class FuseOperators(Pass):
    """Write normalizations, GELU, rotary embeddings, attention and pixel shuffles as the operators ONNX has for them.

    `max_opset`: the newest operator set that the model may be raised to (one that is newer stays as it is).
    """

    fidelity = Fidelity.ROUNDING

    max_opset: int = 23

    def __post_init__(self) -> None:
        if not 1 <= self.max_opset <= 24:
            raise ValueError(f"max_opset={self.max_opset} must be from 1 to 24")

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Fuse what can be fused; `applied` is the number of operators written anew."""
        declared = [(v.shape, v.type) for v in model.graph.outputs]
        facts = infer_facts(model)
        for value, (shape, type_) in zip(model.graph.outputs, declared, strict=True):
            value.shape, value.type = shape, type_
        limit, reasons = self._limit(model)
        before, applied, needed = len(model.graph), 0, g.opset_of(model)
        shared: dict = {}
        with g.remembering_names(model.graph), g.collection_paused():
            for pattern in PATTERNS if self.max_opset >= swish.OPSET else PATTERNS[:-1]:
                found = _apply(pattern, View(model, facts, limit, shared))
                if found:
                    facts.update(model)
                applied += len(found)
                needed = max([needed, *(fusion.opset for fusion in found)])
        if not applied:
            return PassResult(model, 0, reasons)
        notes = [f"{before} nodes became {len(model.graph)}"]
        if needed > g.opset_of(model):
            notes.append(f"opset {g.opset_of(model)} raised to {needed}")
            with g.remembering_names(model.graph):
                raise_opset(model, needed)
        g.remove_unused_initializers(model.graph)
        result = Simplify(use_onnxsim=False, keep_overridable=True).run(model, context)  # reshapes around them meet
        return PassResult(result.model, applied, reasons, tuple(notes))

    def _limit(self, model: ir.Model) -> tuple[int, tuple[Skip, ...]]:
        """The newest opset that may be used, and why none newer."""
        current = g.opset_of(model)
        reasons = []
        for version in _OPSETS:
            if current < version <= self.max_opset:
                reason = refusal(model, version)
                if reason is None:
                    return version, ()
                reasons.append(Skip("opset", reason))
        return current, tuple(reasons[:1])


def _apply(pattern, view: View) -> list[Fusion]:
    done = []
    for node in list(view.model.graph):
        if node.graph is None or not g.is_onnx(node, *pattern.ANCHORS):
            continue
        fusion = pattern.match(node, view)
        if fusion is not None and fusion.opset <= view.limit and is_closed(fusion):
            replace(view.model, fusion)
            done.append(fusion)
    return done
