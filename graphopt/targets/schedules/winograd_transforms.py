"""The arithmetic of Winograd's minimal filtering: transforms of data, weights and results.

F(m, 3) computes m neighbouring outputs of a 3-tap correlation from m + 2 inputs with m + 2 products:

    y = A^T [ (G g) * (B^T d) ]

Rows of B^T are the Lagrange basis polynomials of the interpolation points (without their denominators, which go into
G), rows of A are powers of the points, and the last row belongs to the point at infinity. In two dimensions each
transform is applied to columns, then to rows.

Points: F(2) uses 0, 1, -1 and infinity. F(4) uses 0, +-sqrt(1/2), +-sqrt(2) and infinity: the two squares multiply to 1
and everything else is a power of two but their sum, so it costs no more than the usual 0, +-1, +-2, and in float32 its
largest error is a third (root mean square: half) of theirs.

The functions below use + - * only: they take numpy arrays, and as well the symbolic vectors that code is made of.

Sources: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4; Barabasz, Anderson,
Soodhalter, Gregg, Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks, ACM TOMS
46(4), 2020, section 5 (choice of points).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TAPS = 3
ROOT = 2.0**0.5

POINTS: dict[int, tuple[float, ...]] = {2: (0.0, 1.0, -1.0), 4: (0.0, ROOT / 2, -ROOT / 2, ROOT, -ROOT)}
"""Finite interpolation points by the number of outputs of a tile."""

Line = Sequence[Any]
Transform = Callable[[Line], list[Any]]


def data_transform(outputs: int) -> Transform:
    """B^T of one dimension: from `outputs` + 2 values to as many."""
    return {2: _data_2, 4: _data_4}[outputs]


def result_transform(outputs: int) -> Transform:
    """A^T of one dimension: from `outputs` + 2 values to `outputs`."""
    return {2: _result_2, 4: _result_4}[outputs]


def _data_2(d: Line) -> list[Any]:
    return [d[2] - d[0], d[1] + d[2], d[2] - d[1], d[3] - d[1]]


def _result_2(m: Line) -> list[Any]:
    total = m[1] + m[2]
    return [m[0] + total, m[1] - m[2] + m[3]]


def _data_4(d: Line) -> list[Any]:
    even_a, odd_a = d[4] - d[2] * 2.0, d[3] - d[1] * 2.0
    even_b, odd_b = d[4] - d[2] * 0.5, d[3] - d[1] * 0.5
    return [
        d[0] + d[4] - d[2] * 2.5,
        even_a + odd_a * (ROOT / 2),
        even_a - odd_a * (ROOT / 2),
        even_b + odd_b * ROOT,
        even_b - odd_b * ROOT,
        d[1] + d[5] - d[3] * 2.5,
    ]


def _result_4(m: Line) -> list[Any]:
    sum_a, sum_b = m[1] + m[2], m[3] + m[4]
    odd_a, odd_b = m[1] - m[2], m[3] - m[4]
    return [
        m[0] + sum_a + sum_b,
        odd_a * (ROOT / 2) + odd_b * ROOT,
        sum_a * 0.5 + sum_b * 2.0,
        m[5] + odd_a * (ROOT / 4) + odd_b * (ROOT * 2),
    ]


def weight_matrix(outputs: int) -> np.ndarray:
    """G, float64 of shape (`outputs` + 2, 3)."""
    points = POINTS[outputs]
    rows = [[p**k / np.prod([p - q for q in points if q != p]) for k in range(TAPS)] for p in points]
    return np.array([*rows, [0.0, 0.0, 1.0]])


def transformed_weight(packed: np.ndarray, outputs: int) -> np.ndarray:
    """(O, I, 3, 3, icb, ocb) -> (points, points, O, I, icb, ocb), computed in float64 and rounded to float32 once."""
    matrix = weight_matrix(outputs)
    columns = np.tensordot(matrix, packed.astype(np.float64), (1, 2))  # (p, O, I, kw, icb, ocb)
    whole = np.tensordot(matrix, columns, (1, 3))  # (q, p, O, I, icb, ocb)
    return whole.swapaxes(0, 1).astype(np.float32)


def two_dimensional(transform: Transform, square: Sequence[Line]) -> list[list[Any]]:
    """Apply a transform to the columns, then to the rows, of a square of values."""
    columns = [transform([row[j] for row in square]) for j in range(len(square[0]))]
    return [transform([column[i] for column in columns]) for i in range(len(columns[0]))]
