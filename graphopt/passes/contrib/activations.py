"""Gelu, BiasGelu, FastGelu, QuickGelu, and the activations that FusedConv, FusedGemm and the like end with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from graphopt import graph as g
from graphopt.passes.contrib.writing import Site, Unwritable

_PARAMETERS = {
    "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Softplus": (), "Softsign": (), "Elu": ("alpha",), "ThresholdedRelu": ("alpha",),
}  # fmt: skip


def activation(site: Site, value: ir.Value, name: str, numbers: Sequence[float]) -> ir.Value:
    """`value`, activated as an attribute says; an empty name is none."""
    if not name:
        return value
    if name == "Clip" and len(numbers) == 2 and site.opset >= 11:
        return site.call("Clip", value, numbers[0], numbers[1])
    known = _PARAMETERS.get(name)
    if known is None or len(numbers) not in (0, len(known)):
        raise Unwritable(f"its activation {name!r} is unknown, or has other parameters")
    return site.call(name, value, **dict(zip(known, map(float, numbers), strict=False)))


def exact(site: Site, value: ir.Value) -> ir.Value:
    """x / 2 * (1 + Erf(x / sqrt(2)))."""
    inner = site.call("Add", site.call("Erf", site.call("Div", value, math.sqrt(2))), 1.0)
    return site.call("Mul", site.call("Mul", value, inner), 0.5)


def by_tanh(site: Site, value: ir.Value) -> ir.Value:
    """x / 2 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    cube = site.call("Mul", site.call("Mul", site.call("Mul", value, value), value), 0.044715)
    inner = site.call("Tanh", site.call("Mul", site.call("Add", value, cube), math.sqrt(2 / math.pi)))
    return site.call("Mul", site.call("Mul", value, site.call("Add", inner, 1.0)), 0.5)


def gelu(site: Site) -> list[ir.Value | None]:
    return [exact(site, site.needed(0))]


def bias_gelu(site: Site) -> list[ir.Value | None]:
    return [exact(site, site.call("Add", site.needed(0), site.needed(1)))]


def fast_gelu(site: Site) -> list[ir.Value | None]:
    value, bias = site.needed(0), site.input(1)
    return [by_tanh(site, value if bias is None else site.call("Add", value, bias))]


def quick_gelu(site: Site) -> list[ir.Value | None]:
    value = site.needed(0)
    alpha = float(g.attribute(site.node, "alpha", 1.702))
    return [site.call("Mul", value, site.call("Sigmoid", site.call("Mul", value, alpha)))]
