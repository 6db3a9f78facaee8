"""What the layers that read channels are fed, gathered once for each model and data set.

The covariance of t inputs, measured on n rows, is noisy by about sqrt(t/n) of its mean eigenvalue, and what is solved
with it takes the noise for redundancy (a classifier's last layer sees one row a sample). So it is drawn towards its
diagonal, by t/(n + t): the best weight for a true covariance whose eigenvalues vary by as much as their mean.

Reference: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate
Analysis 88, 2004, theorem 2.1 with Gaussian rows, which draws towards a multiple of the identity.
"""

from __future__ import annotations

import weakref

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.graph import label
from graphopt.model import digest
from graphopt.passes.base import Context
from graphopt.passes.channels.dependency import ChannelGraph
from graphopt.passes.quantization.moments import POSITIONS, Moments, collect_moments
from graphopt.passes.quantization.placement import Layer

MEASURED = ("Conv", "Gemm", "MatMul")
_latest: weakref.WeakKeyDictionary[Dataset, tuple[str, int, dict[str, Moments]]] = weakref.WeakKeyDictionary()


def input_moments(channels: ChannelGraph, context: Context) -> dict[ir.Node, Moments]:
    """Moments of the input of every node that reads channels, ConvTranspose left out; remembered for the latest model.

    `context.data` must be there. Raises ModelError and DataError as `collect_statistics` does.
    """
    data = context.data
    assert data is not None
    identity = digest(channels.model)
    known: dict[str, Moments] = {}
    if data in _latest and _latest[data][:2] == (identity, context.seed):
        known = _latest[data][2]
    nodes = list(dict.fromkeys(site.node for site in channels.reads if site.node.op_type in MEASURED))
    missing = [Layer(node, 1, 0, node.outputs[0]) for node in nodes if label(node) not in known]
    if missing:
        found = collect_moments(channels.model, missing, data, context.seed, context.progress)
        for layer, moments in found.items():
            rows, covariance = len(data) * _places(channels, layer.node), moments.covariance
            drawn = None if covariance is None else shrunk(covariance, rows)
            known[label(layer.node)] = Moments(moments.mean, drawn, rows)
        _latest[data] = (identity, context.seed, known)
    return {node: known[label(node)] for node in nodes}


def _places(channels: ChannelGraph, node: ir.Node) -> int:
    """Rows that a sample gives: places of the output, as many as are drawn at most."""
    shape = channels.shape(node.outputs[0])
    if shape is None:
        return POSITIONS
    places = 1
    for size in shape[2:] if node.op_type == "Conv" else shape[1:-1]:
        places *= size if isinstance(size, int) else POSITIONS
    return min(POSITIONS, places)


def shrunk(matrix: np.ndarray, rows: int) -> np.ndarray:
    """A covariance (groups, taps, taps) measured on so many rows, drawn towards its diagonal."""
    taps = matrix.shape[1]
    off = 1.0 - taps / (rows + taps)
    return matrix * (off + (1.0 - off) * np.eye(taps))
