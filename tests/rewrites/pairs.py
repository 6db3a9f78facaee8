"""Before and Expected on one page: models as ONNX text, compared up to the names of inner values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt import graph as g
from graphopt import model as models
from graphopt.passes.base import Context, Pass, PassResult
from tests.passes.oracle import random_feeds, run


def parse(body: str, opset: int = 17, ir_version: int = 8) -> ir.Model:
    """`body` is a graph in ONNX's text format, without the header."""
    model = ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{body}')
    models.check(model, "the model under test")
    return model


def rewrites(
    rewrite: Pass,
    before: str,
    expected: str,
    *,
    opset: int = 17,
    shapes: dict[str, tuple[int, ...]] | None = None,
    tolerance: float = 0.0,
) -> PassResult:
    """Assert that `rewrite` turns `before` into `expected`, and that the two give the same numbers.

    `tolerance` is absolute; 0 means equal bit for bit.
    """
    original, wanted = parse(before, opset), parse(expected, opset)
    result = rewrite.run(original.clone(), Context())
    assert describe(result.model) == describe(wanted)
    models.check(result.model, "the rewritten model")
    assert models.signature(result.model) == models.signature(original)
    feeds = random_feeds(original, shapes or {})
    for a, b in zip(run(original, feeds), run(result.model, feeds), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if tolerance:
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(b, a)
    return result


def stays(rewrite: Pass, body: str, *, opset: int = 17) -> PassResult:
    """Assert that `rewrite` leaves the model alone."""
    model = parse(body, opset)
    result = rewrite.run(model.clone(), Context())
    assert describe(result.model) == describe(model)
    return result


def describe(model: ir.Model) -> list[str]:
    """The main graph in lines: computed values numbered in order, constants spelled out."""
    names: dict[ir.Value, str] = {v: str(v.name) for v in model.graph.inputs}
    lines = [", ".join(str(v.name) for v in model.graph.inputs)]

    def name(value: ir.Value | None) -> str:
        if value is None:
            return "_"
        array = g.constant_of(value)
        if array is not None:
            return f"{array.dtype}{list(array.shape)}{np.round(array.astype(np.float64), 5).reshape(-1).tolist()}"
        return names[value]

    for node in model.graph:
        if node.op_type == "Constant":
            continue
        for value in node.outputs:
            names[value] = str(value.name) if value.is_graph_output() else f"v{len(names)}"
        attributes = [f"{k}={_plain(a.value)}" for k, a in sorted(node.attributes.items())]
        lines.append(
            f"{', '.join(names[v] for v in node.outputs)} = {node.op_type}"
            f"({', '.join(name(v) for v in node.inputs)}) {' '.join(attributes)}".rstrip()
        )
    lines.append(", ".join(str(v.name) for v in model.graph.outputs))
    return lines


def _plain(value: object) -> object:
    return list(value) if isinstance(value, (tuple, list)) else value
