"""Real trained models: each compiles and agrees with ONNX Runtime, or is refused with its operators named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import model as models
from graphopt.errors import TargetError
from tests.targets.oracle import EPSILON, TARGET, close, compiled, reference

pytestmark = pytest.mark.shared

IMAGE = (1, 3, 224, 224)
QUICK = {
    "mnist_cnn": {},
    "resnet20_cifar10": {"input": (1, 3, 32, 32)},
    "squeezenet1_1": {"data": IMAGE},
    "stories260k": {"input_ids": (1, 64)},
}
SLOW = {
    "mobilenetv2": {"input": IMAGE},
    "mobilenetv1_075": {"input_1": IMAGE},
    "tiny_darknet": {"image": IMAGE},
    "resnet56_cifar10": {"input": (1, 3, 32, 32)},
    "facenet": {"input": (1, 3, 160, 160)},
    "deeplabv3_mnv2": {},
    "ultraface_rfb320": {},
    "yolox_nano": {},
    "nanodet_m": {"data": (1, 3, 320, 320)},
    "super_resolution": {"input": (1, 1, 224, 224)},
    "style_transfer": {"input": (1, 3, 256, 256)},
    "magika": {"bytes": (1, 2048)},
}
RECURRENT = {"nsnet2": {"features": (1, 20, 161)}, "gtcrn": {}}


def _feeds(made: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in made.graph.inputs:
        if value.is_initializer():
            continue
        assert value.shape is not None and value.dtype is not None
        shape, dtype = [int(str(d)) for d in value.shape], value.dtype.numpy()
        array = rng.standard_normal(shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 200, shape)
        feeds[str(value.name)] = array.astype(dtype)
    return feeds


def _depth(made: ir.Model) -> int:
    """Nodes with arithmetic that rounds: each adds an error of its own to what comes in."""
    return sum(n.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Sigmoid", "Div", "Pow") for n in made.graph)


def _check(path, shapes) -> None:
    made = models.fix_inputs(models.load(path), shapes)
    feeds = _feeds(made)
    # a sum of a thousand terms errs by about 8 sqrt(1000) eps; the errors of layers add up as a random walk
    tolerance = 8 * (1000 * max(_depth(made), 1)) ** 0.5 * EPSILON
    close(compiled(made, feeds), reference(made, feeds), tolerance)


@pytest.mark.parametrize("name", QUICK)
def test_agrees(shared_model, name):
    _check(shared_model(name), QUICK[name])


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_agrees_too(shared_model, name):
    _check(shared_model(name), SLOW[name])


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_agree(shared_model, name):
    """A product of each step goes into the next, so that rounding adds up over them."""
    _check(shared_model(name), RECURRENT[name])


def test_more_steps_than_are_unrolled_are_refused_by_name(shared_model):
    made = models.fix_inputs(models.load(shared_model("nsnet2")), {"features": (1, 200, 161)})
    with pytest.raises(TargetError, match="cannot import GRU: 200 steps"):
        TARGET.lower(made)
