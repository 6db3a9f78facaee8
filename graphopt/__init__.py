"""graphopt: ONNX models through rewrite passes and Apache TVM; passes propose, measurement on the target disposes.

import graphopt

result = graphopt.optimize("model.onnx", "OUT", preset="int8", calib="calib.npz", max_drop=1.0)
artifact = graphopt.load("OUT", threads=1)
outputs = artifact.run({"x": array})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.capabilities import Capabilities
    from graphopt.driver import Result, optimize
    from graphopt.errors import GraphoptError
    from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
    from graphopt.pipeline import Pipeline
    from graphopt.runtime.artifact import Artifact, load
    from graphopt.targets.base import Target

__version__ = "0.1.0"

_WHERE = {
    "Artifact": "graphopt.runtime.artifact",
    "Capabilities": "graphopt.capabilities",
    "Context": "graphopt.passes.base",
    "Fidelity": "graphopt.passes.base",
    "GraphoptError": "graphopt.errors",
    "Pass": "graphopt.passes.base",
    "PassResult": "graphopt.passes.base",
    "Pipeline": "graphopt.pipeline",
    "Result": "graphopt.driver",
    "Skip": "graphopt.passes.base",
    "Target": "graphopt.targets.base",
    "load": "graphopt.runtime.artifact",
    "optimize": "graphopt.driver",
}
__all__ = [
    "Artifact",
    "Capabilities",
    "Context",
    "Fidelity",
    "GraphoptError",
    "Pass",
    "PassResult",
    "Pipeline",
    "Result",
    "Skip",
    "Target",
    "__version__",
    "load",
    "optimize",
]


def __getattr__(name: str) -> Any:
    # Names load on first use: opening an artifact must not pay for the optimizer, nor `import graphopt` for either.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
