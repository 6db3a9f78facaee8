"""How channels pass through each operator: a table from ONNX operator types to rules."""

from graphopt.passes.channels.dependency import Rule
from graphopt.passes.channels.rules.elementwise import ELEMENTWISE, elementwise
from graphopt.passes.channels.rules.gathering import GATHERING
from graphopt.passes.channels.rules.layout import LAYOUT
from graphopt.passes.channels.rules.linear import LINEAR
from graphopt.passes.channels.rules.windows import WINDOWS

RULES: dict[str, Rule] = {**dict.fromkeys(ELEMENTWISE, elementwise), **LINEAR, **WINDOWS, **LAYOUT, **GATHERING}
