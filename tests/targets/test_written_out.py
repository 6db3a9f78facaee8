"""Models that `fuse-operators` fused, compiled: within rounding of the original in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.passes.fuse_operators import FuseOperators
from graphopt.passes.simplify import Simplify
from graphopt.targets.relax import written_out
from tests.passes.fusing import Writing, operators
from tests.passes.test_fusion_attention import Wiring, attention, rotated
from tests.passes.test_fusion_normalization import Style, written
from tests.targets.oracle import compiled, reference


def same(model, feeds, tolerance: float, rewrite: FuseOperators | None = None) -> set[str]:
    """The operators of the fused model, which gives the original's numbers compiled."""
    fused = (rewrite or FuseOperators()).run(model.clone(), Context()).model
    found = compiled(fused, feeds)
    for name, wanted in reference(model, feeds).items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))
    return set(operators(fused))


def _normal(shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(dims).astype(np.float32) for name, dims in shapes.items()}


TOLERANCE = 32 * 2.0**-23
"""Sums of up to 64 products of numbers about 1, twice: sqrt(64) * 4 units in the last place of float32."""


@pytest.mark.parametrize("centred", [True, False])
def test_normalization_of_rows(centred):
    shape = (2, 3, 16)
    w = written(Style(centred=centred), shape, [2], np.linspace(0.5, 2, 16), np.linspace(-1, 1, 16), 1e-5)
    w.inputs["x"] = shape
    found = same(w.model(w.nodes[-1].output[0]), _normal({"x": shape}), TOLERANCE)
    assert ("LayerNormalization" if centred else "RMSNormalization") in found


@pytest.mark.parametrize("opset", [13, 20])
def test_normalization_of_images(opset):
    shape = (2, 16, 6, 5)
    weight, bias = np.linspace(0.5, 2, 16).reshape(16, 1, 1), np.linspace(-1, 1, 16).reshape(16, 1, 1)
    w = written(Style(), shape, [2, 3], weight, bias, 1e-5, opset)
    w.inputs["x"] = shape
    assert "InstanceNormalization" in same(w.model(w.nodes[-1].output[0]), _normal({"x": shape}), TOLERANCE)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding(first, interleaved):
    shapes: dict = {"x": (2, 5, 3, 8) if first else (2, 3, 5, 8)}
    shapes |= dict.fromkeys("cs", (1, 5, 1, 4) if first else (1, 1, 5, 4))
    w = Writing(shapes, 17)
    y = w.call("Neg", rotated(w, w.call("Relu", "x"), 3, 4, first, interleaved, "gather", ("c", "s")))
    assert "RotaryEmbedding" in same(w.model(y), _normal(shapes), TOLERANCE)


@pytest.mark.parametrize("wiring", [
    Wiring(), Wiring(groups=2), Wiring(groups=4, mask="none"), Wiring(mask="row", rows_first=False),
    Wiring(groups=2, mask="heads", joined=False, scale="none"),
])  # fmt: skip
def test_attention(wiring):
    w, y = attention(wiring, 2, 3, 5)
    assert "Attention" in same(w.model(y), _normal(w.inputs), TOLERANCE)


def test_swish():
    w = Writing({"x": (2, 16, 5, 4)}, 20)
    y = w.call("Mul", "x", w.call("Sigmoid", w.call("Mul", "x", 1.5)))
    model = w.model(w.call("Neg", y))
    assert "Swish" in same(model, _normal(w.inputs), TOLERANCE, FuseOperators(max_opset=24))


def test_other_forms_are_not_written_out():
    """Causal attention and caches are no fusion's result: the importer decides."""
    w = Writing(dict.fromkeys("qkv", (1, 2, 4, 8)), 23)
    model = w.model(w.call("Attention", "q", "k", "v", is_causal=1))
    written_out.rewrite(model)
    assert operators(model) == ["Attention"]


@pytest.mark.parametrize("name", ["stories260k", "style_transfer", "super_resolution", "magika", "mnist_cnn"])
@pytest.mark.long
def test_shared_models(shared_model, name):
    shapes = {
        "stories260k": {"input_ids": (1, 16)}, "style_transfer": {"input": (1, 3, 64, 64)},
        "super_resolution": {"input": (1, 1, 224, 224)}, "magika": {"bytes": (1, 2048)}, "mnist_cnn": {},
    }[name]  # fmt: skip
    model = models.fix_inputs(models.load(shared_model(name)), shapes)
    model = Simplify(use_onnxsim=False).run(model, Context()).model
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in models.signature(model).inputs:
        dims = [int(d) for d in spec.shape if isinstance(d, int)]
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.random(dims, np.float32) * (255 if name in ("style_transfer", "mnist_cnn") else 1)
        else:
            feeds[spec.name] = rng.integers(0, 256, dims).astype(spec.dtype)
    same(model, feeds, 2.0**-14)
