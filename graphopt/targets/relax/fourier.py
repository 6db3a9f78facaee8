"""DFT and STFT as products with constant matrices of cosines and sines.

    forward    Y[k] = sum over n < L of x[n] e^(-2 pi i k n / L), for k < L, onesided k <= L / 2
    inverse    y[n] = sum over k < L of X[k] e^(2 pi i k n / L) / L; onesided X[L - k] is the conjugate of X[k], y real

L is `dft_length`: what the signal lacks of it is zeros, what it has more is left out. STFT does this for frames of the
signal, times the window. A matrix has L rows at most and is refused above 2**22 elements (ValueError): from there on
the fast transformation would be worth its name.

Source: ONNX, DFT and STFT; Cooley and Tukey (1965) for the definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.targets.relax.emitters import Inputs, Node, emits
from graphopt.targets.relax.values import Builder, Value, known

_LARGEST = 1 << 22


@emits("DFT")
def dft(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    data, length, place = [*inputs, None, None][:3]
    if data is None or not data.shape or data.dtype not in ("float32", "float64") or _unknown(length, place):
        return None
    rank = len(data.shape)
    axis = int(node.get("axis", 1)) if node.opset < 20 else -2 if place is None else _number(place)
    axis, inverse, onesided = axis % rank, bool(node.get("inverse", 0)), bool(node.get("onesided", 0))
    if axis == rank - 1 or (onesided and (data.shape[-1] == 1) == inverse):
        raise ValueError("error: the last axis holds real and imaginary part; only of one part is there one side")
    count = data.shape[axis]
    size = _number(length) if length is not None else 2 * (count - 1) if inverse and onesided else count
    order = [i for i in range(rank - 1) if i != axis] + [axis]
    real, imaginary = _parts(builder, builder.plain(data), data.shape, order)
    parts = _transformed(builder, real, imaginary, data.dtype, min(count, size), size, inverse, onesided)
    back = [order.index(i) for i in range(rank - 1)]
    return [_joined(builder, parts, back, data.dtype)]


@emits("STFT")
def stft(builder: Builder, node: Node, inputs: Inputs) -> list[Value] | None:
    from tvm import relax

    signal, step, window, length = [*inputs, None, None][:4]
    if signal is None or signal.shape is None or step is None or signal.dtype not in ("float32", "float64"):
        return None
    if _unknown(step, length) or len(signal.shape) != 3 or (window is not None and window.shape is None):
        return None
    size = _number(length) if length is not None else int(window.shape[0]) if window is not None else signal.shape[1]  # type: ignore[index]
    hop, onesided = _number(step), bool(node.get("onesided", 1))
    if onesided and signal.shape[2] != 1:
        raise ValueError("error: one side of a complex signal says nothing of the other")
    if size > signal.shape[1]:
        raise ValueError("error: a frame is longer than the signal")
    frames = 1 + (signal.shape[1] - size) // hop
    parts = [
        None if part is None else builder.call(_frames, part, frames=frames, size=size, hop=hop, name="frames")
        for part in _parts(builder, builder.plain(signal), signal.shape, [0, 1])
    ]
    if window is not None:
        factor = builder.plain(window)
        parts = [None if part is None else builder.emit(relax.op.multiply(part, factor)) for part in parts]
    done = _transformed(builder, parts[0], parts[1], signal.dtype, size, size, False, onesided)
    return [_joined(builder, done, [0, 1, 2], signal.dtype)]


def _transformed(
    builder: Builder, real: Any, imaginary: Any, dtype: str, count: int, size: int, inverse: bool, onesided: bool
) -> list[Any]:
    """Real and imaginary part of the transformation along the last axis, of its first `count` elements; of an inverse
    one of one side, the real part alone."""
    from tvm import relax

    outs = size // 2 + 1 if onesided and not inverse else size
    if size < 1 or count * outs > _LARGEST:
        raise ValueError(f"error: a transformation of {size} elements")
    turns = (np.arange(count)[:, None] * np.arange(outs)[None, :]) % size  # whole turns cancel exactly
    angle = 2 * np.pi * turns / size
    cosine, sine = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    if inverse:
        twice = np.full((count, 1), 1 / size)
        if onesided:  # every bin but the first and, of an even length, the middle one stands for two
            alone = (np.arange(count) == 0) | (2 * np.arange(count) == size)
            twice = np.where(alone, 1, np.where(2 * np.arange(count) > size, 0, 2))[:, None] / size
        cosine, sine = cosine * twice, sine * twice
    c, s = (builder.constant(each.astype(dtype)) for each in (cosine, sine))

    def product(part: Any, matrix: Any) -> Any:
        shape = [int(n) for n in part.ty.shape.values]
        if shape[-1] != count:
            part = builder.emit(relax.op.strided_slice(part, [len(shape) - 1], [0], [count]))  # type: ignore[arg-type]
        return builder.emit(relax.op.matmul(part, matrix))

    if imaginary is None:
        return [product(real, c), product(real, s)]
    first = builder.emit(relax.op.subtract(product(real, c), product(imaginary, s)))
    if inverse and onesided:
        return [first]
    return [first, builder.emit(relax.op.add(product(real, s), product(imaginary, c)))]


def _parts(builder: Builder, data: Any, shape: tuple[int, ...], order: list[int]) -> list[Any]:
    """Real and imaginary part, each without the last axis and with the others in this order; None for none."""
    from tvm import relax

    found: list[Any] = []
    for part in range(2):
        if part >= shape[-1]:
            found.append(None)
            continue
        one = builder.emit(relax.op.strided_slice(data, [len(shape) - 1], [part], [part + 1]))  # type: ignore[arg-type]
        whole = builder.reshape(one, shape[:-1])
        found.append(whole if order == sorted(order) else builder.emit(relax.op.permute_dims(whole, order)))
    return found


def _joined(builder: Builder, parts: list[Any], back: list[int], dtype: str) -> Value:
    """The parts with their axes back in place and a last axis to tell them apart."""
    from tvm import relax

    found = []
    for part in parts:
        moved = part if back == sorted(back) else builder.emit(relax.op.permute_dims(part, back))
        shape = tuple(int(n) for n in moved.ty.shape.values)
        found.append(builder.reshape(moved, (*shape, 1)))
    whole = found[0] if len(found) == 1 else builder.emit(relax.op.concat(found, axis=-1))
    return Value(tuple(int(n) for n in whole.ty.shape.values), dtype, plain=whole)


def _frames(signal: Any, *, frames: int, size: int, hop: int) -> Any:
    """(N, length) -> (N, frames, size), neighbours `hop` apart."""
    from tvm import te

    return te.compute((signal.shape[0], frames, size), lambda n, f, k: signal(n, f * hop + k), name="frames")


def _unknown(*values: Value | None) -> bool:
    return any(value is not None and value.const is None for value in values)


def _number(value: Value) -> int:
    array = known(value)
    assert array is not None
    return int(array.reshape(-1)[0])
