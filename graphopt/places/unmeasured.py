"""A machine that is not at hand and that nothing here stands in for: what is built for it is neither run nor timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graphopt.errors import TargetError
from graphopt.measure import Contender, Counts, PairedResult
from graphopt.places.base import Place
from graphopt.progress import Progress
from graphopt.verify import Feeds, Runner


class Unmeasured(Place):
    """`what`: the processor, for people."""

    kind = "unmeasured"
    unit = "nothing"
    runs = False

    def __init__(self, what: str):
        self.what = what

    @property
    def label(self) -> str:
        return f"{self.what}, which is not here"

    def warnings(self) -> list[str]:
        return [
            f"NOT MEASURED: there is no {self.what} here, so what was compiled has neither been run nor timed; "
            "`graphopt compare MODEL ARTIFACT` there does both, and `--remote HOST:PORT/KEY` measures there from here"
        ]

    @contextmanager
    def open(self, contender: Contender, threads: int | None) -> Iterator[Runner]:
        raise TargetError(f"{contender.path} cannot be run: it is for {self.label}")
        yield

    def race(
        self,
        contenders: Sequence[Contender],
        feeds: Sequence[Feeds],
        *,
        threads: int,
        seconds: float,
        seed: int,
        progress: Progress,
    ) -> PairedResult | Counts:
        raise TargetError(f"nothing can be compared on {self.label}")
