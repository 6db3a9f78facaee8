"""SkipLayerNormalization, SkipSimplifiedLayerNormalization, EmbedLayerNormalization."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.contrib.writing import Site, Unwritable


def centred(site: Site, value: ir.Value, scale: ir.Value, bias: ir.Value | None) -> ir.Value:
    """LayerNormalization over the last axis."""
    apart = site.call("Sub", value, site.mean(value))
    variance = site.mean(site.call("Mul", apart, apart))
    spread = site.call("Sqrt", site.call("Add", variance, _epsilon(site)))
    whole = site.call("Mul", site.call("Div", apart, spread), scale)
    return whole if bias is None else site.call("Add", whole, bias)


def uncentred(site: Site, value: ir.Value, scale: ir.Value) -> ir.Value:
    """RMSNormalization over the last axis."""
    spread = site.call("Sqrt", site.call("Add", site.mean(site.call("Mul", value, value)), _epsilon(site)))
    return site.call("Mul", site.call("Div", value, spread), scale)


def _epsilon(site: Site) -> float:
    return float(g.attribute(site.node, "epsilon", 1e-12))


def skip_layer(site: Site) -> list[ir.Value | None]:
    total = _summed(site, site.input(4))
    return [centred(site, total, site.needed(2), site.input(3)), None, None, total]


def skip_simplified(site: Site) -> list[ir.Value | None]:
    total = _summed(site, site.input(3))
    return [uncentred(site, total, site.needed(2)), None, None, total]


def _summed(site: Site, bias: ir.Value | None) -> ir.Value:
    total = site.call("Add", site.needed(0), site.needed(1))
    return total if bias is None else site.call("Add", total, bias)


def embeddings(site: Site) -> list[ir.Value | None]:
    """Words, positions and segments, added and normalized. The count of the mask, output 1, is not written."""
    if site.wants(1):
        raise Unwritable("what it says of the mask is read")
    words, segments, positions = site.needed(0), site.input(1), site.input(8)
    total = site.call("Gather", site.needed(2), words)
    if positions is None:
        positions = _counted(site, words)
    total = site.call("Add", total, site.call("Gather", site.needed(3), positions))
    if segments is not None:
        total = site.call("Add", total, site.call("Gather", site.needed(4), segments))
    return [centred(site, total, site.needed(5), site.needed(6)), None, total]


def _counted(site: Site, words: ir.Value) -> ir.Value:
    """0, 1, 2, ... as many as there are words in a row."""
    import numpy as np

    shape = site.call("Shape", words)
    shape.type = ir.TensorType(ir.DataType.INT64)
    count = site.call("Gather", shape, np.array(1, np.int64))
    return site.call("Range", np.array(0, np.int64), count, np.array(1, np.int64))
