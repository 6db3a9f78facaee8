"""Softmax, layer normalization, erf and GELU against ONNX Runtime and float64."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import capabilities
from graphopt.targets.cpu import Cpu
from graphopt.targets.relax import elementwise, normal_share, pipeline
from tests.targets.oracle import EPSILON, TARGET, agree, compiled, model, node, sum_tolerance, uniform

CASES = settings(max_examples=12, deadline=None, derandomize=True)
LEADS = st.sampled_from([(), (1,), (3,), (2, 5), (1, 3, 4)])
COLUMNS = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 64, 65, 100, 197])
AVX2 = Cpu(mcpu="x86-64-v3", threads=1)


@CASES
@given(lead=LEADS, columns=COLUMNS, scale=st.sampled_from([1.0, 40.0]))
def test_softmax(lead, columns, scale):
    x = uniform(1, *lead, columns) * np.float32(scale)
    made = model([node("Softmax", ["x"], ["y"], axis=-1)], {"x": x}, ["y"])
    agree(made, {"x": x}, sum_tolerance(columns) + 4 * scale * EPSILON)


def test_softmax_of_two_axes_before_opset_13():
    x = uniform(1, 2, 3, 5)
    agree(model([node("Softmax", ["x"], ["y"], axis=1)], {"x": x}, ["y"], opset=11), {"x": x}, sum_tolerance(15))


def test_softmax_along_another_axis():
    x = uniform(1, 2, 6, 5)
    agree(model([node("Softmax", ["x"], ["y"], axis=1)], {"x": x}, ["y"]), {"x": x}, sum_tolerance(6))


def test_softmax_of_masked_scores():
    x = uniform(1, 4, 37)
    x[:, 20:] = -1e9
    x[3, 1:] = np.float32(-np.inf)
    made = model([node("Softmax", ["x"], ["y"])], {"x": x}, ["y"])
    agree(made, {"x": x}, sum_tolerance(37))


@CASES
@given(lead=LEADS, columns=COLUMNS, has_bias=st.booleans())
def test_layer_norm(lead, columns, has_bias):
    if columns < 7:
        columns += 7  # the variance of one or two numbers amplifies rounding without bound
    x = uniform(1, *lead, columns) + np.float32(0.5)
    constants = {"s": uniform(2, columns), **({"b": uniform(3, columns)} if has_bias else {})}
    made = model([node("LayerNormalization", ["x", *constants], ["y"], epsilon=1e-5)], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, 4 * sum_tolerance(columns))


def test_layer_norm_over_two_axes_on_two_threads():
    x = uniform(1, 700, 6, 13)
    constants = {"s": uniform(2, 6, 13), "b": uniform(3, 6, 13)}
    made = model([node("LayerNormalization", ["x", "s", "b"], ["y"], axis=1)], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, 4 * sum_tolerance(78), Cpu(threads=2))


@pytest.mark.skipif(not capabilities.host_features() >= AVX2.features, reason="this processor lacks AVX2")
@pytest.mark.parametrize("columns", [5, 8, 37, 197])
def test_eight_lanes(columns):
    x = uniform(1, 3, columns)
    constants = {"s": uniform(2, columns), "b": uniform(3, columns)}
    nodes = [node("LayerNormalization", ["x", "s", "b"], ["n"]), node("Softmax", ["n"], ["y"])]
    agree(model(nodes, {"x": x}, ["y", "n"], constants), {"x": x}, 4 * sum_tolerance(columns), AVX2)


@pytest.mark.parametrize("kind", ["softmax", "layer_norm"])
def test_whole_rows_have_a_template(kind):
    x = uniform(1, 40, 100)
    if kind == "softmax":
        made = model([node("Softmax", ["x"], ["y"])], {"x": x}, ["y"])
    else:
        constants = {"s": uniform(2, 100)}
        made = model([node("LayerNormalization", ["x", "s"], ["y"])], {"x": x}, ["y"], constants)
    (kernel,) = pipeline.prim_funcs(TARGET.scheduled(TARGET.lower(made))).values()
    assert "row_sum" not in kernel.script()
    assert "vectorized" in kernel.script()


def _applied(function, x: np.ndarray) -> np.ndarray:
    import tvm
    from tvm import te

    data = te.placeholder(x.shape, "float32", name="x")
    func = te.create_prim_func([data, elementwise.mapped(function, "f")(data)])
    built = tvm.compile(func, target=TARGET.tvm_target())
    found = tvm.runtime.empty(x.shape, "float32")
    built(tvm.runtime.tensor(x), found)
    return found.numpy()


def test_erf_is_within_its_bound():
    """2e-7 everywhere (the docstring's claim), and a few units in the last place."""
    x = np.concatenate([np.linspace(-6, 6, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    exact = np.array([math.erf(float(v)) for v in x])
    found = _applied(elementwise.erf_of, x)
    assert np.abs(found - exact).max() <= 2e-7
    ulp = np.spacing(np.maximum(np.abs(exact), 1e-30).astype(np.float32)).astype(np.float64)
    assert (np.abs(found - exact) / ulp).max() <= 5
    np.testing.assert_array_equal(
        _applied(elementwise.erf_of, np.array([np.inf, -np.inf, 0.0], np.float32)), [1, -1, 0]
    )


@pytest.mark.skipif(normal_share.FEATURE not in capabilities.host_features(), reason="this processor lacks AVX-512")
def test_normal_share():
    x = np.concatenate([np.linspace(-7, 7, 40001), [0.0, 1e-30, -1e-30, 5.6, -5.6, 1e30]]).astype(np.float32)
    exact = np.array([math.erf(float(v) * math.sqrt(0.5)) / 2 for v in x])
    assert np.abs(_applied(normal_share.normal_share, x) - exact).max() <= 2.3e-7
    ends = np.array([np.inf, -np.inf], np.float32)
    np.testing.assert_allclose(_applied(normal_share.normal_share, ends), [0.5, -0.5], rtol=1e-6)
    assert np.isnan(_applied(partial(elementwise.gelu_of, table=True), np.array([np.nan], np.float32))).all()


@pytest.mark.skipif(normal_share.FEATURE not in capabilities.host_features(), reason="this processor lacks AVX-512")
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 40, 100])
def test_gelu_by_table_in_any_number_of_lanes(columns):
    x = 6 * uniform(1, 3, columns)
    made = model([node("Gelu", ["x"], ["y"])], {"x": x}, ["y"], opset=20)
    exact = np.array([v / 2 * (1 + math.erf(v * math.sqrt(0.5))) for v in x.reshape(-1).astype(float)])
    assert np.abs(compiled(made, {"x": x})["y"].reshape(-1) - exact).max() <= 6 * 2.5e-7 + 6 * EPSILON


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu(form):
    x = 6 * uniform(1, 5, 33)
    made = model([node("Gelu", ["x"], ["y"], approximate=form)], {"x": x}, ["y"], opset=20)
    agree(made, {"x": x}, 16 * EPSILON)


def test_gelu_as_exporters_write_it():
    """Div, Erf, Add, Mul, Mul; the division by a constant is a multiplication here."""
    x = 4 * uniform(1, 7, 40)
    constants = {k: np.asarray(v, np.float32) for k, v in (("r", math.sqrt(2)), ("one", 1), ("half", 0.5))}
    nodes = [
        node("Div", ["x", "r"], ["a"]),
        node("Erf", ["a"], ["e"]),
        node("Add", ["e", "one"], ["f"]),
        node("Mul", ["x", "f"], ["g"]),
        node("Mul", ["g", "half"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    agree(made, {"x": x}, 16 * EPSILON)
    assert len(pipeline.prim_funcs(TARGET.lower(made).module)) == 1


def test_division_by_a_constant_keeps_zero_and_infinity():
    x = np.array([[0.0, -0.0, np.inf, 1e-38, 3.0]], np.float32)
    made = model([node("Div", ["x", "c"], ["y"])], {"x": x}, ["y"], {"c": np.asarray(3, np.float32)})
    np.testing.assert_allclose(compiled(made, {"x": x})["y"], x / np.float32(3), rtol=2 * EPSILON)


def test_softmax_of_masked_scores_has_no_denormal_numbers():
    """Weights of masked positions are exactly zero: the next product would slow down a hundredfold on denormals."""
    x = uniform(1, 4, 37)
    x[:, 20:] = -1e9
    x[:, 19] = -88.5
    made = model([node("Softmax", ["x"], ["y"])], {"x": x}, ["y"])
    found = compiled(made, {"x": x})["y"]
    assert not found[:, 20:].any()
    assert not np.any((found != 0) & (np.abs(found) < np.finfo(np.float32).tiny))
