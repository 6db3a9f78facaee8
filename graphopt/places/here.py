"""This machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graphopt.measure import Contender, PairedResult, race_afresh
from graphopt.places.base import Place
from graphopt.progress import Progress
from graphopt.verify import Feeds, Runner


class Here(Place):
    """Engines run in this process, races in processes of their own."""

    kind = "here"

    @property
    def label(self) -> str:
        return "this machine"

    @contextmanager
    def open(self, contender: Contender, threads: int | None) -> Iterator[Runner]:
        if contender.engine == "tvm":
            from graphopt.runtime.compiled import open_compiled

            yield open_compiled(contender.path, threads).run
        elif contender.engine == "hybrid":
            from graphopt.runtime.hybrid_engine import HybridEngine

            yield HybridEngine(contender.path, threads).run
        else:
            from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine

            yield OnnxRuntimeEngine(contender.path, threads).run

    def race(
        self,
        contenders: Sequence[Contender],
        feeds: Sequence[Feeds],
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Progress,
    ) -> PairedResult:
        return race_afresh(contenders, feeds, threads=threads, seconds=seconds, seed=seed, progress=progress)
