"""A pipeline is a list of passes that prints as text and parses back; running it leaves a record of each pass."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt import model as models
from graphopt import plugins, spec
from graphopt.errors import DataError, GraphoptError, PassError
from graphopt.passes.base import Context, Fidelity, Pass, Skip
from graphopt.verify import OutputError, Reference, check_structure

PRESETS: Mapping[str, str] = {
    "exact": "standard-operators,simplify,fold-batch-norm,fuse-operators",
    "int8": "standard-operators,simplify,fold-batch-norm,fuse-operators,quantize-int8",
    "int4": "standard-operators,simplify,fold-batch-norm,fuse-operators,quantize-int4{exclude_types=[Conv]}",
    "auto": "standard-operators,simplify,fold-batch-norm,fuse-operators,quantize-int8",
}
"""Named pipelines. `exact` computes the same function; `int8` adds post-training quantization, `int4` weights of
matrix products in 4 bits; from the former `auto` searches for the settings of all layers."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to the model, and what that changed in numbers."""

    spec: str
    fidelity: Fidelity
    applied: int
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    nodes_before: int
    nodes_after: int
    operators_before: Mapping[str, int]
    operators_after: Mapping[str, int]
    parameter_bytes_before: int
    parameter_bytes_after: int
    seconds: float
    errors: tuple[OutputError, ...] = ()
    """Against the original model; empty when the pass changed nothing."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `Pipeline.parse(str(pipeline)) == pipeline`."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """`simplify,quantize-int8{calibration=mse}`; raises SpecError."""
        return cls(tuple(plugins.parse_pass(s) for s in spec.parse_list(text)))

    @classmethod
    def of(cls, passes: str | Pipeline | Iterable[Pass]) -> Pipeline:
        """From text, a pipeline, or passes."""
        if isinstance(passes, str):
            return cls.parse(passes)
        return passes if isinstance(passes, Pipeline) else cls(tuple(passes))

    def __str__(self) -> str:
        return ",".join(str(p) for p in self.passes)

    def split(self) -> tuple[Pipeline, Pipeline]:
        """The passes before the first LOSSY one, and the rest."""
        for index, each in enumerate(self.passes):
            if each.fidelity is Fidelity.LOSSY:
                return Pipeline(self.passes[:index]), Pipeline(self.passes[index:])
        return self, Pipeline()

    def excluding(self, nodes: tuple[str, ...]) -> Pipeline:
        """The same pipeline with `nodes` left float by every pass that quantizes."""

        def leave_out(each: Pass) -> Pass:
            if not each.quantizes or not nodes:
                return each
            together = dict.fromkeys((*getattr(each, "exclude"), *nodes))  # noqa: B009 - an option of these passes
            return dataclasses.replace(each, exclude=tuple(together))  # pyright: ignore[reportCallIssue,reportArgumentType]

        return Pipeline(tuple(leave_out(p) for p in self.passes))

    def run(
        self,
        model: ir.Model,
        context: Context,
        reference: Reference | None = None,
        on_pass: Callable[[PassRecord], None] | None = None,
        observations: Observations | None = None,
    ) -> tuple[ir.Model, tuple[PassRecord, ...]]:
        """Run every pass on a copy of `model`, checking structure and, with a `reference`, numbers after each.

        Raises PassError, VerificationError; DataError when a pass needs calibration data and there is none.
        """
        observations = observations or Observations()
        expected = models.signature(model)
        model = model.clone()
        records: list[PassRecord] = []
        exact_so_far = Fidelity.EXACT
        for each in self.passes:
            exact_so_far = max(exact_so_far, each.fidelity)
            before = model.clone() if exact_so_far is Fidelity.LOSSY and context.original is None else None
            model, record = _run_pass(each, model, context, expected, reference, exact_so_far, observations)
            if before is not None:
                context = dataclasses.replace(context, original=before)
            records.append(record)
            if on_pass is not None:
                on_pass(record)
        return model, tuple(records)


def _run_pass(
    each: Pass,
    model: ir.Model,
    context: Context,
    expected: models.Signature,
    reference: Reference | None,
    fidelity: Fidelity,
    observations: Observations,
) -> tuple[ir.Model, PassRecord]:
    started = time.perf_counter()
    nodes, operators, size = count_nodes(model), count_operators(model), models.parameter_bytes(model)
    context = dataclasses.replace(context, statistics=observations.observe(each, model, context))
    try:
        result = each.run(model, context)
    except GraphoptError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise PassError(f"pass {each.name} failed: {type(error).__name__}: {error}") from error
    check_structure(result.model, expected, f"pass {each.name}")
    errors = ()
    if reference is not None and result.applied:
        errors = reference.judge_model(result.model, fidelity, f"pass {each.name}")
    return result.model, PassRecord(
        spec=str(each),
        fidelity=each.fidelity,
        applied=result.applied,
        skipped=result.skipped,
        notes=result.notes,
        nodes_before=nodes,
        nodes_after=count_nodes(result.model),
        operators_before=operators,
        operators_after=count_operators(result.model),
        parameter_bytes_before=size,
        parameter_bytes_after=models.parameter_bytes(result.model),
        seconds=time.perf_counter() - started,
        errors=errors,
    )


class Observations:
    """Calibration statistics, collected once for each model however often a pipeline runs on it."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def observe(self, each: Pass, model: ir.Model, context: Context) -> Mapping[str, Any]:
        """Statistics of the values that a pass observes. Raises DataError: there is no calibration data."""
        names = each.observes(model)
        if not names:
            return {}
        if context.data is None:
            raise DataError(
                f"pass {each.name} needs calibration data",
                hint="give --calib DATA (an .npz, or a folder of pictures with --preprocess), "
                "or --calib random to try it without (accuracy then means nothing)",
            )
        from graphopt.calibration import collect_statistics

        known = self._known.setdefault(models.digest(model), {})
        missing = tuple(name for name in names if name not in known)
        if missing:
            known.update(collect_statistics(model, missing, context.data, progress=context.progress))
        return known


def count_nodes(model: ir.Model) -> int:
    """Nodes of the main graph and its subgraphs, Constant nodes not counted."""
    return sum(count_operators(model).values())


def count_operators(model: ir.Model) -> dict[str, int]:
    """Nodes by operator type, most frequent first, Constant left out."""
    counts = Counter(n.op_type for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type != "Constant")
    return dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))
