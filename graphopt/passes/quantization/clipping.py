"""Weight scales smaller than the largest weight asks for: a few weights saturate, all others are rounded finer.

Of the scales p * max|w| / limit, p from 1 down to `LEAST_SHARE`, each channel takes the one with the least squared
error of its weights after rounding to nearest; p = 1 is among them, so no channel gets worse.

Reference: Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1 (MSE range setting); Banner
et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", NeurIPS 2019.
"""

from __future__ import annotations

import numpy as np

LEAST_SHARE = 0.4
CANDIDATES = 61


def clip_by_mse(rows: np.ndarray, scales: np.ndarray, least: np.ndarray, limit: int) -> np.ndarray:
    """Scales float32 (channels,), at most `scales` and at least `least`, for weights `rows` (channels, taps).

    `scales` and `least`: float32 (channels,); where `least` forbids a candidate it stands in for it.
    """
    wide = rows.astype(np.float64)
    best, found = weight_error(wide, scales, limit), scales
    for share in np.linspace(1.0, LEAST_SHARE, CANDIDATES)[1:]:
        tried = np.minimum(scales, np.maximum(scales * np.float32(share), least)).astype(np.float32)
        error = weight_error(wide, tried, limit)
        found = np.where(error < best, tried, found)
        best = np.minimum(error, best)
    return found


def weight_error(rows: np.ndarray, scales: np.ndarray, limit: int) -> np.ndarray:
    """float64 (channels,): squared error of `rows` (channels, taps) rounded to nearest."""
    wide = scales.astype(np.float64)[:, None]
    return np.square(np.rint(rows / wide).clip(-limit, limit) * wide - rows).sum(axis=1)
