"""Everything but convolutions: elementwise, pooling, reductions, shapes, matrix products; and what is refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.errors import TargetError, UnsupportedOperatorError
from graphopt.targets.relax import elementwise, pipeline
from tests.targets.oracle import EPSILON, TARGET, agree, compiled, model, node, sum_tolerance, uniform

CASES = settings(max_examples=15, deadline=None, derandomize=True)


@CASES
@given(
    kind=st.sampled_from(["MaxPool", "AveragePool"]),
    channels=st.sampled_from([3, 16, 21]),
    size=st.tuples(st.integers(4, 13), st.integers(4, 13)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    ceil=st.booleans(),
    include=st.booleans(),
)
def test_pooling(kind, channels, size, kernel, strides, pads, ceil, include):
    assume(all(max(pads[a], pads[a + 2]) < kernel[a] for a in range(2)))
    assume(not (ceil and kind == "AveragePool"))  # ONNX Runtime and the standard disagree about the last window
    x = uniform(1, 1, channels, *size) - 2
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": int(ceil)}
    if kind == "AveragePool":
        attributes["count_include_pad"] = int(include)
    agree(model([node(kind, ["x"], ["y"], **attributes)], {"x": x}, ["y"]), {"x": x}, sum_tolerance(16))


@pytest.mark.parametrize(
    ("op", "noop"),
    [(op, noop) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd") for noop in (0, 1)]
    + [(op, 0) for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare")],  # with noop ONNX Runtime drops the abs or square
)
def test_axes_that_are_empty_mean_what_no_axes_mean(op, noop):
    x, axes = uniform(1, 2, 3, 4), {"axes": np.zeros(0, np.int64)}
    made = model([node(op, ["x", "axes"], ["y"], noop_with_empty_axes=noop)], {"x": x}, ["y"], axes, opset=18)
    agree(made, {"x": x}, sum_tolerance(24))


UNARY = {
    "Relu": {},
    "LeakyRelu": {"alpha": 0.2},
    "Sigmoid": {},
    "Tanh": {},
    "Exp": {},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4},
    "HardSwish": {},
    "Elu": {},
    "Softplus": {},
    "Erf": {},
    "Abs": {},
    "Neg": {},
}


@pytest.mark.parametrize("op", UNARY)
def test_unary(op):
    x = 8 * uniform(1, 2, 5, 7)
    agree(model([node(op, ["x"], ["y"], **UNARY[op])], {"x": x}, ["y"]), {"x": x}, 16 * EPSILON)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("function", "exact", "ulps"),
    [
        (elementwise.exp_of, np.exp, 1),
        (elementwise.tanh_of, np.tanh, 2),
        (partial(elementwise.tanh_of, divide=True), np.tanh, 2),
        (elementwise.sigmoid_of, _sigmoid, 4),
        (partial(elementwise.sigmoid_of, divide=True), _sigmoid, 4),
    ],
)
def test_own_functions_to_the_last_places(function, exact, ulps):
    """Within a few units in the last place of float64's answer, over the whole range and near zero."""
    wide = np.linspace(-87, 88.7, 200_001)
    x = np.concatenate([wide, wide * 1e-1, wide * 1e-2, wide * 1e-4]).astype(np.float32)
    wanted = exact(x.astype(np.float64))
    ulp = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(_applied(function, x) - wanted) / ulp) <= ulps


def _applied(function, x: np.ndarray) -> np.ndarray:
    import tvm
    from tvm import te

    data = te.placeholder(x.shape, "float32", name="x")
    built = tvm.compile(
        te.create_prim_func([data, elementwise.mapped(function, "f")(data)]), target=TARGET.tvm_target()
    )
    found = tvm.runtime.empty(x.shape, "float32")
    built(tvm.runtime.tensor(x), found)
    return found.numpy()


def test_reciprocal_over_its_range():
    x = np.concatenate([np.linspace(1, 4, 100_001), np.exp2(np.linspace(0, 126, 10_001))]).astype(np.float32)
    wanted = 1 / x.astype(np.float64)
    found = _applied(elementwise.reciprocal_of, x)
    assert np.max(np.abs(found - wanted) / np.spacing(wanted.astype(np.float32))) <= 2


@pytest.mark.parametrize("function", [elementwise.exp_of, elementwise.tanh_of, elementwise.sigmoid_of])
def test_not_a_number_stays_one(function):
    x = np.full(40, np.nan, np.float32)
    assert np.isnan(_applied(function, x)).all()


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Exp"])
def test_an_activation_between_a_convolution_and_readers(op):
    """Its value is read three times."""
    x = uniform(1, 1, 16, 6, 6)
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node(op, ["a"], ["b"]),
        node("Mul", ["a", "b"], ["c"]),
        node("Add", ["c", "b"], ["y"]),
    ]
    agree(model(nodes, {"x": x}, ["y", "b"], {"w": uniform(2, 16, 16, 1, 1)}), {"x": x}, sum_tolerance(16))


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh"])
def test_activations_in_a_chain_compile_in_a_moment(op):
    """In one kernel, three of them would take minutes to compile."""
    x = uniform(1, 1, 16, 6, 6)
    nodes = [node("Conv", ["x", "w"], ["a0"])]
    for i in range(3):
        nodes += [node(op, [f"a{i}"], [f"b{i}"]), node("Mul", [f"a{i}", f"b{i}"], [f"a{i + 1}"])]
    made = model(nodes, {"x": x}, ["a3"], {"w": uniform(2, 16, 16, 1, 1)})
    kernels = pipeline.prim_funcs(TARGET.lower(made).module)
    assert max(name.count(op.lower()) for name in kernels) == 1
    assert any("conv2d" in name and op.lower() in name for name in kernels)
    agree(made, {"x": x}, sum_tolerance(16))


def test_exp_at_its_ends():
    x = np.array([-np.inf, -104.0, -90.0, 0.0, 88.7, 89.0, np.inf], np.float32)
    found = compiled(model([node("Exp", ["x"], ["y"])], {"x": x}, ["y"]), {"x": x})["y"]
    assert found[3] == 1
    assert np.isinf(found[5])
    assert np.isinf(found[6])
    assert np.all(found[:3] <= 2e-38)


@CASES
@given(
    op=st.sampled_from(["Add", "Sub", "Mul", "Div", "Max", "Min"]),
    channels=st.sampled_from([3, 16, 20]),
    other=st.sampled_from(["same", "channel", "pixel", "scalar", "one", "row"]),
    constant=st.booleans(),
    swap=st.booleans(),
)
def test_binary_on_blocked_activations(op, channels, other, constant, swap):
    shapes = {
        "same": (1, channels, 6, 5), "channel": (1, channels, 1, 1), "pixel": (1, 1, 6, 5), "scalar": (1, 1),
        "one": (1,), "row": (5,),
    }  # fmt: skip
    x, z = uniform(1, 1, 4, 6, 5), uniform(2, *shapes[other]) + 3
    constants = {"w": uniform(3, channels, 4, 1, 1)} | ({"z": z} if constant else {})
    feeds = {"x": x} | ({} if constant else {"z": z})
    operands = ["z", "a"] if swap and op != "Div" else ["a", "z"]
    nodes = [node("Conv", ["x", "w"], ["a"]), node(op, operands, ["b"]), node("Conv", ["b", "v"], ["y"])]
    constants["v"] = uniform(4, 5, channels, 1, 1)
    agree(model(nodes, feeds, ["y"], constants), feeds, sum_tolerance(channels * 4))


@CASES
@given(
    rows=st.sampled_from([1, 2, 5, 12]),
    depth=st.integers(1, 70),
    columns=st.sampled_from([1, 3, 8, 10, 16, 24, 33, 64, 100, 257]),
    lead=st.sampled_from([(), (2,), (1, 3)]),
    activation=st.booleans(),
)
def test_matmul_with_packed_weight(rows, depth, columns, lead, activation):
    x = uniform(1, *lead, rows, depth)
    constants = {"w": uniform(2, depth, columns), "b": uniform(3, columns)}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])]
    if activation:
        nodes[1] = node("Add", ["a", "b"], ["c"])
        nodes.append(node("Relu", ["c"], ["y"]))
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(depth))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [(), (1,), (10,), (4, 10), (4, 1)])
def test_gemm(transposed, bias):
    x, w = uniform(1, 4, 30), uniform(2, 30, 10)
    constants = {"w": w.T if transposed else w, "b": uniform(3, *bias)}
    made = model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=transposed, alpha=0.5, beta=2.0)], {"x": x}, ["y"], constants
    )
    agree(made, {"x": x}, sum_tolerance(30))


def test_matmul_of_two_activations():
    a, b = uniform(1, 2, 3, 5, 17), uniform(2, 2, 3, 17, 9)
    agree(model([node("MatMul", ["a", "b"], ["y"])], {"a": a, "b": b}, ["y"]), {"a": a, "b": b}, sum_tolerance(17))


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("channels", [3, 16, 40])
def test_global_pooling(op, channels):
    x = uniform(1, 1, channels, 7, 6)
    nodes = [node(op, ["x"], ["a"]), node("Flatten", ["a"], ["y"])]
    agree(model(nodes, {"x": x}, ["y"]), {"x": x}, sum_tolerance(42))


@pytest.mark.parametrize("sizes", [(16, 32), (3, 5), (16, 20), (48, 16, 16)])
def test_concatenation_of_blocked_activations(sizes):
    x = uniform(1, 1, 8, 5, 5)
    constants = {f"w{i}": uniform(i, c, 8, 1, 1) for i, c in enumerate(sizes)}
    constants["v"] = uniform(9, 4, sum(sizes), 1, 1)
    nodes = [node("Conv", ["x", f"w{i}"], [f"a{i}"]) for i in range(len(sizes))]
    nodes += [node("Concat", [f"a{i}" for i in range(len(sizes))], ["c"], axis=1), node("Conv", ["c", "v"], ["y"])]
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, sum_tolerance(8 * sum(sizes)))


def test_squeeze_and_excite_scales_in_a_kernel_of_its_own():
    """Fused into the small convolution, the scaling would compute that convolution again for every tile."""
    x = uniform(1, 1, 32, 9, 9)
    constants = {"d": uniform(2, 32, 1, 3, 3), "s": uniform(3, 8, 32, 1, 1), "e": uniform(4, 32, 8, 1, 1)}
    nodes = [
        node("Conv", ["x", "d"], ["a"], group=32, pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["a"], ["p"]),
        node("Conv", ["p", "s"], ["q"]),
        node("Relu", ["q"], ["r"]),
        node("Conv", ["r", "e"], ["t"]),
        node("HardSigmoid", ["t"], ["u"]),
        node("Mul", ["a", "u"], ["y"]),
    ]
    made = model(nodes, {"x": x}, ["y"], constants)
    kernels = pipeline.prim_funcs(TARGET.lower(made).module)
    assert not any("conv2d" in name and "multiply" in name for name in kernels)
    agree(made, {"x": x}, sum_tolerance(9 * 32))


def test_batch_norm():
    x = uniform(1, 1, 5, 4, 4)
    constants = {n: uniform(i, 5) + 2 for i, n in enumerate("gbmv")}
    made = model([node("BatchNormalization", ["x", *"gbmv"], ["y"])], {"x": x}, ["y"], constants)
    agree(made, {"x": x}, 16 * EPSILON)


@pytest.mark.parametrize("opset", [9, 13])
def test_slices(opset):
    x = uniform(1, 1, 6, 9, 8)
    bounds = {"starts": [1, -6], "ends": [2**62, -1], "axes": [1, 2]}
    constants = {}
    if opset < 10:
        sliced = node("Slice", ["x"], ["y"], **bounds)
    else:
        constants = {k: np.array(v, np.int64) for k, v in bounds.items()} | {"steps": np.array([2, 1], np.int64)}
        sliced = node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])
    agree(model([sliced], {"x": x}, ["y"], constants, opset), {"x": x}, 0)


def test_softmax_and_layer_norm():
    x = 5 * uniform(1, 3, 10, 48)
    constants = {"s": uniform(2, 48), "b": uniform(3, 48)}
    nodes = [node("LayerNormalization", ["x", "s", "b"], ["a"], axis=-1), node("Softmax", ["a"], ["y"], axis=-1)]
    agree(model(nodes, {"x": x}, ["y", "a"], constants), {"x": x}, sum_tolerance(48))


def test_shape_arithmetic_vanishes():
    x = uniform(1, 2, 3, 4, 5)
    constants = {"one": np.array([1], np.int64), "rest": np.array([-1], np.int64), "zero": np.array(0, np.int64)}
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "zero_axis"], ["m"]),
        node("Concat", ["m", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["y"]),
    ]
    constants["zero_axis"] = np.array([0], np.int64)
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, 0)


def test_outputs_that_are_inputs_or_constants_or_shared():
    x = uniform(1, 2, 3)
    nodes = [
        node("Identity", ["x"], ["same"]),
        node("Identity", ["c"], ["constant"]),
        node("Relu", ["x"], ["r"]),
        node("Identity", ["r"], ["r2"]),
    ]
    made = model(nodes, {"x": x}, ["same", "constant", "r", "r2"], {"c": uniform(2, 4)})
    agree(made, {"x": x}, 0)


def test_integer_inputs():
    x = np.array([[1, 5, 2]], np.int64)
    made = model([node("Gather", ["table", "x"], ["y"])], {"x": x}, ["y"], {"table": uniform(1, 7, 4)})
    agree(made, {"x": x}, 0)


def test_unsupported_operators_are_all_named():
    x = uniform(1, 1, 4)
    nodes = [
        onnx.helper.make_node("Nonsense", ["x"], ["a"], name="first", domain="com.example"),
        onnx.helper.make_node("Det", ["a", "a", "a"], ["b"], name="second"),
        onnx.helper.make_node("Det", ["b", "b", "b"], ["y"], name="third"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, x.shape)],
        [onnx.helper.make_empty_tensor_value_info("y")],
    )
    made = ir.from_proto(onnx.helper.make_model(graph))
    with pytest.raises(UnsupportedOperatorError) as caught:
        TARGET.lower(made)
    assert "com.example.Nonsense (node 'first')" in str(caught.value)
    assert "Det (node 'second')" in str(caught.value)
    assert "third" not in str(caught.value)


def test_data_dependent_shape_is_refused_by_node():
    x = uniform(1, 4)
    made = model([node("NonZero", ["x"], ["y"])], {"x": x}, ["y"])
    with pytest.raises(TargetError, match=r"NonZero.*node 'NonZero_y'") as caught:
        TARGET.lower(made)
    assert "\n" not in str(caught.value)


def test_dynamic_input_is_refused_with_its_remedy():
    graph = onnx.helper.make_graph(
        [node("Relu", ["x"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["batch", 3])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", 3])],
    )
    with pytest.raises(TargetError, match="--input 'x:"):
        TARGET.lower(ir.from_proto(onnx.helper.make_model(graph)))


def test_parts_of_no_elements():
    """What a rotary embedding of whole heads splits off."""
    x = uniform(1, 2, 3, 8)
    constants = {"sizes": np.array([8, 0], np.int64), "some": np.array([3, 0, 5], np.int64)}
    nodes = [
        node("Split", ["x", "sizes"], ["a", "none"], axis=-1),
        node("Neg", ["a"], ["b"]),
        node("Concat", ["none", "b"], ["c"], axis=-1),
        node("Split", ["c", "some"], ["d", "nothing", "e"], axis=-1),
        node("Concat", ["e", "nothing", "d"], ["y"], axis=-1),
    ]
    agree(model(nodes, {"x": x}, ["y"], constants), {"x": x}, 0)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("keep", [0, 1])
def test_the_largest_of_booleans(op, keep):
    x = np.random.default_rng(1).random((4, 3, 5)) < 0.3
    made = model(
        [node(op, ["x", "axes"], ["y"], keepdims=keep)], {"x": x}, ["y"], {"axes": np.array([0, 2], np.int64)}, 20
    )
    agree(made, {"x": x}, 0)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_slopes_one_a_channel(shape):
    x, slope = uniform(1, *shape), uniform(2, 3)
    made = model([node("PRelu", ["x", "s"], ["y"])], {"x": x, "s": slope}, ["y"], opset=6)
    wanted = np.where(x < 0, x * slope.reshape(3, *[1] * (len(shape) - 2)), x)
    np.testing.assert_array_equal(compiled(made, {"x": x, "s": slope})["y"], wanted)


def test_definitions_with_operands_left_out():
    """Attention with a cache and no mask, causal: nothing is assumed of what is not there."""
    shapes = {"q": (1, 2, 3, 8), "k": (1, 2, 3, 8), "v": (1, 2, 3, 8), "past_k": (1, 2, 4, 8), "past_v": (1, 2, 4, 8)}
    feeds = {name: uniform(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    made = model(
        [node("Attention", ["q", "k", "v", "", "past_k", "past_v"], ["y", "pk", "pv"], is_causal=1)],
        feeds,
        ["y", "pk", "pv"],
        opset=23,
    )
    agree(made, feeds, sum_tolerance(16))
