"""Which rows of a layer's input are drawn: told by the layer's name, whatever else is observed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import Dataset, collect_statistics, random_dataset
from graphopt.graph import constant_of, label
from graphopt.passes.base import Context
from graphopt.passes.paired_inputs import observe_pairs
from graphopt.passes.quantization.moments import collect_moments
from graphopt.passes.quantization.placement import LAYERS, place
from graphopt.passes.quantize_int4 import QuantizeInt4
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.progress import SILENT
from graphopt.verify import LAMBDA, total_reduction_length
from tests.passes.residual_models import Residual, networks


def chain() -> ir.Model:
    """Five convolutions and a Gemm, with a Relu between any two, so that engines fuse them all alike."""
    made = Residual(3, 4)
    for index in range(5):
        made.value = made.conv(made.value, 4, 4, 3 if index % 2 else 1, name=f"conv{index}")
        made.relu()
    return made.model()


def data_of(model: ir.Model) -> Dataset:
    return random_dataset(models.signature(model), 12, 1)


def layer_names(model: ir.Model) -> list[str]:
    return [label(node) for node in model.graph if node.op_type in LAYERS]


def run(each: QuantizeInt8 | QuantizeInt4, model: ir.Model, data: Dataset) -> ir.Model:
    context = Context(statistics=collect_statistics(model, each.observes(model), data), data=data)
    return each.run(model.clone(), context).model


def weights_of(model: ir.Model) -> dict[str, bytes]:
    """What each layer's weights are made of."""
    found = {}
    for node in model.graph:
        value = node.inputs[1] if node.op_type in LAYERS else None
        while value is not None and constant_of(value) is None and value.producer() is not None:
            value = value.producer().inputs[0]  # pyright: ignore[reportOptionalMemberAccess]
        array = constant_of(value)
        if array is not None:
            found[label(node)] = array.tobytes()
    return found


@pytest.mark.parametrize(
    "each", [QuantizeInt8(), QuantizeInt8(rounding="learned"), QuantizeInt8(rounding="nearest"), QuantizeInt4(block=16)]
)
@pytest.mark.parametrize("excluded", ["conv0", "conv2", "last"])
def test_quantizing_without_a_layer_is_the_same_alone_as_after_quantizing_all(each, excluded):
    model, data = chain(), data_of(chain())
    every = run(each, model, data)
    without = replace(each, exclude=(excluded,))
    after, alone = run(without, model, data), run(without, model, data_of(model))
    assert models.to_bytes(after) == models.to_bytes(alone)
    first, second = weights_of(every), weights_of(alone)
    assert first.keys() == second.keys() == set(layer_names(model))
    changed = {name for name, stored in first.items() if stored != second[name]}
    assert changed <= {excluded}


@given(networks(), st.integers(0, 2**30), st.data())
@settings(max_examples=25)
def test_moments_do_not_depend_on_what_else_is_observed(model, seed, draw):
    """But for rounding (see `graphopt/verify.py`): engines may fuse otherwise where other values are watched."""
    layers = place(model.graph).layers
    some = draw.draw(st.lists(st.sampled_from(layers), min_size=1, unique_by=lambda layer: layer.node))
    data = data_of(model)

    def alike(first: np.ndarray, second: np.ndarray) -> bool:
        off = LAMBDA * float(np.finfo(np.float32).eps) / 2 * total_reduction_length(model) ** 0.5
        return bool(np.abs(first - second).max() <= off * np.abs(second).max())

    everything = collect_moments(model, layers, data, seed, SILENT)
    for layer, moments in collect_moments(model, some, data, seed, SILENT).items():
        assert alike(moments.mean, everything[layer].mean)
    context = Context(data=data, seed=seed)
    second = model.clone()
    for initializer in second.graph.initializers.values():
        array = constant_of(initializer)
        assert array is not None
        initializer.const_value = ir.Tensor((array * 1.5).astype(array.dtype), name=initializer.name)
    known = dict(observe_pairs(model, second, layers, context))
    for layer, moments in observe_pairs(model, second, some, context):
        assert alike(moments.first_mean, known[layer].first_mean)
        assert alike(moments.mean, known[layer].mean)


def test_layers_of_other_names_draw_other_rows():
    model = chain()
    first = place(model.graph).layers[1]
    known = collect_moments(model, [first], data_of(model), 0, SILENT)[first].mean
    first.node.name = "another"
    assert not np.array_equal(collect_moments(model, [first], data_of(model), 0, SILENT)[first].mean, known)
