"""Choosing the settings of all layers together: what to merge, to prune, to split.

    offers of the passes -> latency table, sensitivity table -> paths of recipes -> whole models, evaluated and timed

`explore.Search.run` reads like that line.
"""

from __future__ import annotations

import hashlib
import importlib.metadata

from graphopt.candidates import Compiler
from graphopt.errors import DataError
from graphopt.model import digest
from graphopt.passes.base import Context
from graphopt.report import SearchRecord
from graphopt.schedule_database import cache_folder
from graphopt.search.explore import Search
from graphopt.search.ledger import Ledger
from graphopt.variants import Judge, Source, Variant


def search(
    source: Source, exact: Variant, plain: Variant, judge: Judge, context: Context, compiler: Compiler
) -> tuple[list[Variant], SearchRecord]:
    """Variants within the bound that cost less than `plain`, the cheapest first, and what the search found out.

    `exact`: the variant before the first lossy pass. What is measured is noted beside the schedule database, so that
    the same search, started again, goes on where it ended. Raises DataError: there is no evaluation data.
    """
    if judge.dataset is None or context.data is None:
        raise DataError("a search for the best settings needs calibration and evaluation data")
    settings, folder = compiler.settings, cache_folder()
    return Search(
        source=source,
        exact=exact,
        plain=plain,
        data=compiler.data,
        judge=judge,
        context=context,
        reference=compiler.reference,
        compiler=compiler,
        work=compiler.work,
        ledger=Ledger(folder / "searches" / f"{_identity(exact, plain, compiler)}.jsonl"),
        times=Ledger(folder / "layer-times.jsonl"),
        objective=settings.objective or "latency",
        seconds=settings.search_seconds,
    ).run()


def _identity(exact: Variant, plain: Variant, compiler: Compiler) -> str:
    """A digest of all that the search's measurements depend on."""
    settings = compiler.settings
    parts = (
        digest(exact.model), plain.record.pipeline, settings.target, settings.threads, settings.calib,
        settings.calib_samples, settings.eval, settings.preprocess, settings.seed, settings.objective,
        *(importlib.metadata.version(name) for name in ("graphopt", "apache-tvm", "onnxruntime")),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
