"""What the tests of low-rank-split share: models of one layer, their splits, the error that rounding explains."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper, parser

from graphopt import model as models
from graphopt.calibration import Dataset, random_dataset
from graphopt.capabilities import x86_for_mcpu
from graphopt.graph import constant_of, label
from graphopt.passes.base import Context, PassResult
from graphopt.passes.low_rank_split import LowRankSplit
from graphopt.verify import LAMBDA
from tests.passes import oracle

AVX512 = x86_for_mcpu("cascadelake")


def build(text: str, *, seed: int = 0, opset: int = 17, **shapes: tuple[int, ...]) -> ir.Model:
    """A model from ONNX's text form; `shapes` are initializers filled with normal numbers."""
    rng = np.random.default_rng(seed)
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\nnet {text}')
    for name, shape in shapes.items():
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        array = (rng.standard_normal(shape) * scale).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type.lower()}_{index}"
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def split(model: ir.Model, data: Dataset | None = None, seed: int = 0, **options) -> PassResult:
    """The pass on a copy, checked to be valid and to have the same signature."""
    result = LowRankSplit(**options).run(model.clone(), Context(AVX512, data=data, seed=seed))
    models.check(result.model, "split")
    assert models.signature(result.model) == models.signature(model)
    return result


def random_data(model: ir.Model, count: int, seed: int = 0) -> Dataset:
    return random_dataset(models.signature(model), count, seed)


def array_of(value: ir.Value | None) -> np.ndarray:
    found = constant_of(value)
    assert found is not None
    return found


def outputs(model: ir.Model, data: Dataset) -> np.ndarray:
    """Of the whole data set at once, without optimisations, float64."""
    return np.concatenate([oracle.run(model, feeds)[0] for feeds in data.batches(64)]).astype(np.float64)


def nodes(model: ir.Model, *types: str) -> dict[str, ir.Node]:
    """By name."""
    return {label(node): node for node in model.graph if not types or node.op_type in types}


def tolerance(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray]) -> float:
    """The most by which rounding sets the two apart.

    |fl(a . b) - a . b| <= LAMBDA u sqrt(n) |a| . |b| (Higham and Mary 2019); layers behind one another add their
    lengths, and the factors, stored in float32, are off by u each: one more product a layer. |a| . |b| is what a
    model gives with all weights and inputs made positive. Both models round.
    """
    total = 0.0
    for model in (before, after):
        positive = model.clone()
        length = 0
        for value in positive.graph.initializers.values():
            array = array_of(value)
            value.const_value = ir.Tensor(np.abs(array), name=value.name)
        for node in positive.graph:
            if node.op_type in ("Conv", "Gemm", "MatMul"):
                weights = array_of(node.inputs[1])
                length += 2 + (int(np.prod(weights.shape[1:])) if node.op_type == "Conv" else max(weights.shape))
        (bound,) = oracle.run(positive, {name: np.abs(array) for name, array in feeds.items()})
        total += LAMBDA * float(np.finfo(np.float32).eps) / 2 * np.sqrt(length) * float(np.abs(bound).max())
    return total
