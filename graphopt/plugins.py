"""Which passes and targets exist: the built-in ones below, and any package's by entry point.

A package adds its own with, in its pyproject.toml,

    [project.entry-points."graphopt.passes"]
    my-pass = "my_package.my_module:MyPass"

and the same with the group `graphopt.targets` for targets.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TypeVar

from graphopt import spec
from graphopt.errors import SpecError, nearest
from graphopt.passes.base import Pass
from graphopt.targets.base import Target

BUILTIN_PASSES = {
    "simplify": "graphopt.passes.simplify:Simplify",
    "fold-batch-norm": "graphopt.passes.fold_batch_norm:FoldBatchNorm",
    "standard-operators": "graphopt.passes.standard_operators:StandardOperators",
    "fuse-operators": "graphopt.passes.fuse_operators:FuseOperators",
    "remove-dead-channels": "graphopt.passes.remove_dead_channels:RemoveDeadChannels",
    "prune-channels": "graphopt.passes.prune_channels:PruneChannels",
    "merge-blocks": "graphopt.passes.merge_blocks:MergeBlocks",
    "low-rank-split": "graphopt.passes.low_rank_split:LowRankSplit",
    "refit-layers": "graphopt.passes.refit_layers:RefitLayers",
    "equalize-layers": "graphopt.passes.equalize_layers:EqualizeLayers",
    "smooth-activations": "graphopt.passes.smooth_activations:SmoothActivations",
    "prune-weights": "graphopt.passes.prune_weights:PruneWeights",
    "quantize-int8": "graphopt.passes.quantize_int8:QuantizeInt8",
    "quantize-int4": "graphopt.passes.quantize_int4:QuantizeInt4",
    "convert-float16": "graphopt.passes.convert_float16:ConvertFloat16",
}
BUILTIN_TARGETS = {
    "cpu": "graphopt.targets.cpu:Cpu",
    "arm": "graphopt.targets.arm:Arm",
    "cuda": "graphopt.targets.cuda:Cuda",
}
PASS_GROUP = "graphopt.passes"
TARGET_GROUP = "graphopt.targets"

Base = TypeVar("Base", Pass, Target)


def pass_names() -> tuple[str, ...]:
    """Names of all passes: built-in ones in the order a pipeline wants them, then plugins by name."""
    return _names(BUILTIN_PASSES, PASS_GROUP)


def target_names() -> tuple[str, ...]:
    """Names of all targets."""
    return _names(BUILTIN_TARGETS, TARGET_GROUP)


def pass_class(name: str) -> type[Pass]:
    """The pass of this name. Raises SpecError (with the nearest name) when there is none or it cannot load."""
    return _load(name, BUILTIN_PASSES, PASS_GROUP, Pass, "pass")


def target_class(name: str) -> type[Target]:
    """The target of this name. Raises SpecError as `pass_class` does."""
    return _load(name, BUILTIN_TARGETS, TARGET_GROUP, Target, "target")


def offering_passes() -> tuple[Pass, ...]:
    """Passes that make offers, in the order of `pass_names`, with default options.

    Raises SpecError: one cannot load.
    """
    classes = (pass_class(name) for name in pass_names())
    return tuple(each() for each in classes if each.takes)


def parse_target(text: str | Target) -> Target:
    """`cpu{mcpu=cascadelake}` -> Cpu(mcpu="cascadelake"). Raises SpecError."""
    if isinstance(text, Target):
        return text
    parsed = spec.parse(text)
    return spec.bind(parsed, target_class(parsed.name), "target")


def parse_pass(parsed: spec.Spec) -> Pass:
    """Bind a parsed spec to its pass. Raises SpecError."""
    return spec.bind(parsed, pass_class(parsed.name), "pass")


def _names(builtin: dict[str, str], group: str) -> tuple[str, ...]:
    plugged = {point.name for point in importlib.metadata.entry_points(group=group)}
    return tuple(builtin) + tuple(sorted(plugged - set(builtin)))


def _load(name: str, builtin: dict[str, str], group: str, base: type[Base], kind: str) -> type[Base]:
    if name in builtin:
        module, _, attribute = builtin[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in importlib.metadata.entry_points(group=group):
        if point.name == name:
            try:
                found = point.load()
            except (ImportError, AttributeError) as error:
                raise SpecError(f"{kind} {name!r} of plugin {point.value} cannot be loaded: {error}") from error
            if not (isinstance(found, type) and issubclass(found, base)):
                raise SpecError(f"{kind} {name!r} of plugin {point.value} is not a graphopt.{base.__name__}")
            return found
    known = _names(builtin, group)
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    raise SpecError(f"unknown {kind} {name!r}", hint=hint)
