"""Elementwise operators whose definition goes beyond TVM's: against NumPy, which ONNX defines them by."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.oracle import compiled, model, node

SIGNED, UNSIGNED = ("int8", "int16", "int32", "int64"), ("uint8", "uint16", "uint32", "uint64")


def _integers(seed: int, dtype: str, *shape: int, bits: int | None = None) -> np.ndarray:
    info = np.iinfo(dtype)
    low, high = (info.min, info.max) if bits is None else (max(info.min, -(1 << bits)), min(info.max, 1 << bits))
    return np.random.default_rng(seed).integers(low, high, shape, dtype=dtype, endpoint=True)


def _run(op: str, feeds: dict[str, np.ndarray], opset: int = 21, **attributes) -> np.ndarray:
    made = model([node(op, list(feeds), ["z"], **attributes)], feeds, ["z"], opset=opset)
    return compiled(made, feeds)["z"]


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
def test_shifts_by_any_amount(dtype, direction):
    """Amounts of the whole range of the type, half of them within its width."""
    x, width = _integers(1, dtype, 5, 40), np.iinfo(dtype).bits
    y = np.where(np.arange(40) % 2, _integers(2, dtype, 40), _integers(3, dtype, 40) % width).astype(dtype)
    outside = (y < 0) | (y >= width)
    possible = np.where(outside, 0, y).astype(dtype)
    beyond = np.where((x < 0) & (direction == "RIGHT"), -1, 0).astype(dtype)
    shifted = x << possible if direction == "LEFT" else x >> possible
    opset = 28 if dtype.startswith("int") else 21
    np.testing.assert_array_equal(
        _run("BitShift", {"x": x, "y": y}, opset, direction=direction), np.where(outside, beyond, shifted)
    )


@pytest.mark.parametrize("fmod", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_remainders_to_the_bit(dtype, fmod):
    """Also of infinities and zeros, and where the quotient has more digits than the type."""
    rng = np.random.default_rng(4)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -1.5, 3e4, -3e4], dtype)
    x = np.concatenate([rng.uniform(-9, 9, 30).astype(dtype), special])[:, None]
    y = np.concatenate([rng.uniform(-2, 2, 30).astype(dtype), special])[None, :]
    found = _run("Mod", {"x": x, "y": y}, 28, fmod=fmod)
    with np.errstate(invalid="ignore"):
        wanted = (np.fmod if fmod else np.mod)(x, y)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted)
    if not fmod:  # with fmod either zero may be returned
        both = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[both]), np.signbit(wanted[both]))


@pytest.mark.parametrize("exponent", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("base", ["int32", "int64"])
def test_powers_of_integers_are_exact_and_wrap(base, exponent):
    x = np.concatenate([_integers(5, base, 20, bits=5), np.array([0, 1, -1, 2, 7], base)])[:, None]
    e = np.arange(64).astype(exponent)[None, :]
    with np.errstate(over="ignore"):
        wanted = np.power(x, e.astype(base))
    np.testing.assert_array_equal(_run("Pow", {"x": x, "e": e}, 21 if exponent != "uint8" else 15), wanted)


def test_negative_powers_of_integers_are_cut_to_whole_numbers():
    x, e = np.array([1, -1, 2, -7], np.int64)[:, None], np.array([-1, -2, -5], np.int64)[None, :]
    wanted = np.trunc(np.power(x.astype(float), e)).astype(np.int64)
    np.testing.assert_array_equal(_run("Pow", {"x": x, "e": e}), wanted)


@pytest.mark.parametrize(
    ("base", "exponent"), [("float32", "int64"), ("float32", "float64"), ("int32", "float32"), ("float64", "int32")]
)
def test_a_power_has_the_type_of_its_base(base, exponent):
    """Both operands are exact in float64; a unit in the last place for the power function, half of one for the cast."""
    rng = np.random.default_rng(6)
    x = rng.integers(1, 9, (6, 1)).astype(base)
    e = rng.integers(0, 6, (1, 5)).astype(exponent)
    found, wanted = _run("Pow", {"x": x, "e": e}), np.power(x.astype(float), e.astype(float))
    assert found.dtype == base
    if base.startswith("int"):
        np.testing.assert_array_equal(found, wanted.astype(base))
    else:
        assert np.all(np.abs(found - wanted) <= 2 * np.finfo(base).eps * wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("signs", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_infinities_of_one_sign(dtype, signs):
    x = np.array([np.inf, -np.inf, np.nan, 0, 60000, -60000], dtype)
    found = _run("IsInf", {"x": x}, 20, detect_positive=signs[0], detect_negative=signs[1])
    np.testing.assert_array_equal(found, (np.isposinf(x) & bool(signs[0])) | (np.isneginf(x) & bool(signs[1])))


@pytest.mark.parametrize(
    ("source", "to", "number"),
    [("float32", "int32", 6), ("uint64", "float64", 11), ("int16", "float16", 10), ("int8", "uint8", 2),
     ("uint32", "int32", 6)],
)  # fmt: skip
def test_the_same_bits_of_another_type(source, to, number):
    bits = _integers(7, f"uint{8 * np.dtype(source).itemsize}", 3, 5).view(source)
    found = _run("BitCast", {"x": bits}, 26, to=number)
    assert found.dtype == to
    assert found.tobytes() == bits.view(to).tobytes()


def test_booleans_are_bytes():
    x = np.array([True, False, True])
    np.testing.assert_array_equal(_run("BitCast", {"x": x}, 26, to=2), np.array([1, 0, 1], np.uint8))
