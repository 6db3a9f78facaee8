"""refit-layers, layer by layer: what it gathers and stores, against windows taken one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt import model as models
from graphopt.calibration import Dataset
from graphopt.graph import label
from graphopt.passes import refit_layers
from graphopt.passes.ridge import regress
from graphopt.verify import LAMBDA
from tests.passes.low_rank import array_of, build, nodes, random_data
from tests.passes.refitting import UNIT, damage, effective, inner, read_by, refit, run_in_batches, samples, windows

SEEDS = st.integers(0, 2**30)


@pytest.fixture(autouse=True, scope="module")
def inputs_are_not_rounded():
    """What is compared with here reckons with no rounding to 8 bits behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit_layers, "LEVELS", float("inf"))
        yield


@st.composite
def convolutions(draw) -> ir.Model:
    """Mul, Add, then one Conv whose output has at most 32 places."""
    group = draw(st.sampled_from([1, 1, 2, 3]))
    per, outs = draw(st.integers(1, 3)), draw(st.integers(1, 3)) * group
    kernel, strides, dilations = ([draw(st.integers(1, m)) for _ in range(2)] for m in (3, 2, 2))
    pads = [draw(st.integers(0, 1)) for _ in range(4)]
    size = [d * (k - 1) + draw(st.integers(1, 5)) for k, d in zip(kernel, dilations, strict=True)]
    ends = [n + a + b for n, a, b in zip(size, pads[:2], pads[2:], strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    assume(np.prod([(n - r) // s + 1 for n, r, s in zip(ends, reach, strides, strict=True)]) <= 32)
    shapes: dict[str, Any] = {"m": (per * group, 1, 1), "a": (per * group, 1, 1), "w": (outs, per, *kernel)}
    bias = ""
    if draw(st.booleans()):
        bias, shapes["b"] = ", b", (outs,)
    batch = draw(st.sampled_from(["N", "2", "1"]))
    return build(
        f"(float[{batch},{per * group},{size[0]},{size[1]}] x) => (float[{batch},{outs},H,W] y) {{"
        f" s = Mul(x, m) t = Tanh(s) z = Add(t, a)"
        f" y = Conv<group={group}, strides={strides}, dilations={dilations}, pads={pads}>(z, w{bias}) }}",
        seed=draw(SEEDS), **shapes,
    )  # fmt: skip


PRODUCTS = {
    "gemm": ("[N,6] x", "[N,4] y", "y = Gemm(z, w)", {"w": (6, 4)}),
    "gemm_bias": ("[N,6] x", "[N,4] y", "y = Gemm(z, w, b)", {"w": (6, 4), "b": (4,)}),
    "gemm_row": ("[N,6] x", "[N,4] y", "y = Gemm<beta=0.5>(z, w, b)", {"w": (6, 4), "b": (1, 4)}),
    "gemm_one": ("[N,6] x", "[N,4] y", "y = Gemm<beta=2.0>(z, w, b)", {"w": (6, 4), "b": (1,)}),
    "gemm_transposed": (
        "[N,6] x", "[N,4] y", "y = Gemm<transB=1, alpha=0.5, beta=3.0>(z, w, b)", {"w": (4, 6), "b": (4,)}
    ),
    "gemm_alpha": ("[N,6] x", "[N,4] y", "y = Gemm<alpha=-2.0>(z, w)", {"w": (6, 4)}),
    "matmul": ("[N,6] x", "[N,4] y", "y = MatMul(z, w)", {"w": (6, 4)}),
    "matmul_sequence": ("[N,5,6] x", "[N,5,4] y", "y = MatMul(z, w)", {"w": (6, 4)}),
    "matmul_bias": ("[N,5,6] x", "[N,5,4] y", "p = MatMul(z, w) y = Add(p, b)", {"w": (6, 4), "b": (4,)}),
    "matmul_bias_first": ("[N,6] x", "[N,4] y", "p = MatMul(z, w) y = Add(b, p)", {"w": (6, 4), "b": (1, 4)}),
}  # fmt: skip


def check_layer(model: ir.Model, damaged: ir.Model, data: Dataset, x: np.ndarray, monkeypatch) -> None:
    """The moments that are solved with are those of all rows, and what is stored is what comes of it."""
    layer = next(node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul"))
    bias_at = (
        nodes(model, "Add").popitem()[1] if layer.op_type == "MatMul" and "b" in model.graph.initializers else layer
    )
    now = nodes(damaged)[label(layer)]
    y, z = inner(model, str(layer.outputs[0].name), x), inner(damaged, read_by(layer), x)
    rows = windows(z, now) if layer.op_type == "Conv" else z.reshape(1, -1, z.shape[-1])
    rows = rows.astype(np.float64)
    flat = np.moveaxis(y, 1, -1) if layer.op_type == "Conv" else y
    flat = flat.reshape(-1, flat.shape[-1]).astype(np.float64)
    wanted = flat.reshape(len(flat), len(rows), -1).transpose(1, 0, 2)
    old, old_bias = effective(damaged, now, len(rows), flat.shape[1])
    lack = wanted - rows @ old.transpose(0, 2, 1) - old_bias.reshape(len(rows), 1, -1)
    seen = []

    def recording(covariance, crossed, energy, count):
        seen.append((covariance, crossed, energy, count))
        return regress(covariance, crossed, energy, count)

    with monkeypatch.context() as patched:
        patched.setattr(refit_layers, "regress", recording)
        result = refit(damaged, model, data)
    centred = layer.op_type != "MatMul" or bias_at is not layer
    if not lack.any():
        assert not seen and result.applied == 0
        return
    assert len(seen) == len(rows)
    count = rows.shape[1]
    # The values are off by as much as their layers round; sums of float32 products by rows^(1/2) roundings and what
    # those are of: products of the values themselves, not of their deviations.
    reach = LAMBDA * UNIT * (count + rows.shape[2] + 8) ** 0.5
    large = np.abs(wanted).max() + np.abs(rows @ old.transpose(0, 2, 1)).max() + np.abs(old_bias).max()
    most = np.abs(rows).max()
    for group, (covariance, crossed, energy, number) in enumerate(seen):
        u, r = rows[group], lack[group]
        if centred:
            u, r = u - u.mean(axis=0), r - r.mean(axis=0)
        assert number == count
        assert np.abs(covariance - u.T @ u / count).max() <= 4 * reach * most**2
        assert np.abs(crossed - r.T @ u / count).max() <= 4 * reach * large * most
        assert abs(energy - np.square(r).sum() / count) <= 4 * reach * r.shape[1] * large**2
    gained = np.stack([regress(*each).weights for each in seen])
    node = nodes(result.model)[label(layer)]
    new, bias = effective(result.model, node, len(rows), flat.shape[1])
    assert np.abs(new - (old + gained)).max() <= 2 * UNIT * np.abs(old + gained).max()
    if centred:
        shift = lack.mean(axis=1) - np.einsum("got,gt->go", gained, rows.mean(axis=1))
        if layer.op_type == "MatMul":
            added, before = (array_of(m.graph.initializers["b"]).reshape(-1) for m in (result.model, damaged))
            bias, old_bias = added, before
        off = 4 * reach * (large + np.abs(gained).sum(axis=2).max() * most)
        assert np.abs(bias.reshape(-1) - (old_bias.reshape(-1) + shift.reshape(-1))).max() <= off
    feeds = {"x": x}
    assert np.isfinite(run_in_batches(result.model, feeds)).all()


@given(convolutions(), SEEDS)
@settings(max_examples=60)
def test_a_convolution_is_solved_on_all_rows(model, seed):
    data = random_data(model, 12, seed)
    with pytest.MonkeyPatch.context() as patch:
        check_layer(model, damage(model, seed, "m", "a", "w"), data, samples(data), patch)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("seed", range(4))
def test_a_matrix_product_is_solved_on_all_rows(kind, seed, monkeypatch):
    given_, out, text, shapes = PRODUCTS[kind]
    model = build(f"(float{given_}) => (float{out}) {{ s = Mul(x, m) t = Tanh(s) z = Add(t, a) {text} }}",
                  seed=seed, m=(6,), a=(6,), **shapes)  # fmt: skip
    data = random_data(model, 30, seed)
    check_layer(model, damage(model, seed, "m", "a", "w"), data, samples(data), monkeypatch)


@given(convolutions(), SEEDS)
@settings(max_examples=10)
def test_the_same_input_gives_the_same_bytes(model, seed):
    damaged = damage(model, seed, "m", "a", "w")
    first, second = (models.to_bytes(refit(damaged, model, random_data(model, 6, seed)).model) for _ in range(2))
    assert first == second
