from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import VerificationError
from graphopt.passes.base import Fidelity
from graphopt.verify import LAMBDA, Reference, output_error, total_reduction_length
from tests.models import small_cnn
from tests.rewrites.pairs import parse


def judge(want: np.ndarray, have: np.ndarray, fidelity: Fidelity = Fidelity.EXACT, length: float = 1.0):
    return output_error("y", [want], [have], length, fidelity, "somebody")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4096), st.integers(0, 2**31))
def test_summing_in_another_order_stays_within_tolerance(length, seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((16, length)).astype(np.float32)
    b = rng.standard_normal((length, 16)).astype(np.float32)
    order = rng.permutation(length)
    one = np.add.reduce(a[:, :, None] * b[None], axis=1, dtype=np.float32)
    other = np.add.reduce(a[:, order, None] * b[None, order], axis=1, dtype=np.float32)
    assert judge(one, other, length=float(length)).within


def test_a_change_far_above_rounding_does_not():
    y = np.random.default_rng(0).standard_normal((4, 100)).astype(np.float32)
    assert not judge(y, y * np.float32(1.001), length=1000).within
    assert not judge(y, np.roll(y, 1), length=1000).within


def test_tolerance_follows_the_dtype():
    y = np.ones(3)
    wide, narrow = judge(y, y), judge(y.astype(np.float16), y.astype(np.float16))
    assert wide.tolerance == pytest.approx(LAMBDA * 2.0**-53)
    assert narrow.tolerance == pytest.approx(LAMBDA * 2.0**-11)


def test_integers_must_be_equal():
    y = np.arange(4)
    assert judge(y, y).within
    assert not judge(y, y + 1).within


def test_lossy_is_judged_by_signal_to_noise():
    y = np.ones(1000, np.float32)
    error = judge(y, y + np.float32(0.1), Fidelity.LOSSY)
    assert error.within
    assert error.snr_db == pytest.approx(20, abs=0.01)
    assert judge(y, y, Fidelity.LOSSY).snr_db == math.inf


@pytest.mark.parametrize("fidelity", Fidelity)
def test_new_nan_and_changed_shapes_are_refused_whatever_the_fidelity(fidelity):
    y = np.ones((2, 3), np.float32)
    with pytest.raises(VerificationError, match="NaN"):
        judge(y, np.where(np.arange(6).reshape(2, 3) == 4, np.nan, y).astype(np.float32), fidelity)
    with pytest.raises(VerificationError, match=r"\[3, 2\]"):
        judge(y, y.reshape(3, 2), fidelity)
    with pytest.raises(VerificationError, match="float64"):
        judge(y, y.astype(np.float64), fidelity)


def test_nan_where_the_original_has_nan_is_no_error():
    y = np.array([1, np.nan, np.inf], np.float32)
    assert judge(y, y).within


def test_reduction_lengths_add_up():
    model = ir.from_proto(onnx.shape_inference.infer_shapes(small_cnn(channels=8)))
    #   conv1     conv2     gemm   BatchNorm, 2 Relu, Identity, Flatten: 1 each; pool over 4x4
    assert total_reduction_length(model) == 27 + 72 + 16 + 5 + 16


def _variance(form: str, factor: float = 1.0) -> ir.Model:
    spread = "q = Mul(x, x) e = ReduceMean <axes = [1]> (q) n = Mul(m, m) v = Sub(e, n)"
    if form == "differences":
        spread = "d = Sub(x, m) q = Mul(d, d) v = ReduceMean <axes = [1]> (q)"
    return parse(f"""g (float[B, 512] x) => (float[B, 1] y) <float factor = {{{factor}}}> {{
        m = ReduceMean <axes = [1]> (x) {spread} y = Mul(v, factor) }}""")


def test_a_variance_that_lives_on_the_last_digits_of_a_sum(tmp_path):
    """mean(x^2) - mean(x)^2 of numbers that are nearly alike: what it loses is rounding; a wrong factor is not."""
    x = (1 + np.random.default_rng(0).standard_normal((4, 512)) / 16).astype(np.float32)
    reference = Reference(_variance("moments"), [{"x": x}], tmp_path)
    reference.judge_model(_variance("differences"), Fidelity.ROUNDING, "somebody")
    with pytest.raises(VerificationError, match="changed output"):
        reference.judge_model(_variance("differences", 1.5), Fidelity.ROUNDING, "somebody")
