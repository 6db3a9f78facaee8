"""Options such as `exclude` name nodes; a name that is none is a mistake worth a word."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphopt.errors import PassError, nearest
from graphopt.graph import label


def require_nodes(model: ir.Model, names: Collection[str], who: str, option: str = "exclude") -> None:
    """Raises PassError for the first of `names` that is no node of the main graph; `who`: the pass asked."""
    known = [label(node) for node in model.graph]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise PassError(
                f"{who}: {option} names {name!r}, which is no node of the model",
                hint=f"did you mean {near!r}?" if near else "`graphopt inspect` lists the nodes",
            )
