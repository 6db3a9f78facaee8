"""NEW against BASE by all that can be measured: the time, if it is asked for, and the figures beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graphopt.benchmarking import Shapes, compare_paths, sample_feeds
from graphopt.ci.figures import KINDS, Bounds, Row, figures_of, judge_accuracy, judge_figures
from graphopt.errors import EXIT_DONE, EXIT_FAILURE, EXIT_INCONCLUSIVE, EXIT_REGRESSION
from graphopt.measure import Comparison, Leniency
from graphopt.measure.saved import STRICT
from graphopt.progress import SILENT, Progress
from graphopt.report.formats import instructions, size

_GRAVITY = (EXIT_REGRESSION, EXIT_FAILURE, EXIT_INCONCLUSIVE, EXIT_DONE)


@dataclass(frozen=True)
class Judged:
    """What was found of one pair. `comparison` is None where no time was taken."""

    base: str
    new: str
    comparison: Comparison | None
    rows: tuple[Row, ...] = ()

    @property
    def exit_code(self) -> int:
        """4 where anything is over its bound, else 5 where anything that has one could not be judged, else 0."""
        return gravest(
            [*(row.exit_code for row in self.rows), *([self.comparison.exit_code] if self.comparison else [])]
        )

    @property
    def over(self) -> list[str]:
        """What is over its bound, in words."""
        found = [row.title for row in self.rows if row.state == "over"]
        return ["time", *found] if self.comparison and self.comparison.verdict.value == "slower" else found

    def to_dict(self) -> dict[str, Any]:
        """Of a comparison all that it tells, and `figures` and `exit_code`."""
        timed = self.comparison.to_dict() if self.comparison is not None else _untimed(self.base, self.new)
        return {**timed, "figures": [row.to_dict() for row in self.rows], "exit_code": self.exit_code}


def judge(
    base: str,
    new: str,
    bounds: Bounds,
    *,
    timed: bool = True,
    show: bool = False,
    data: str | None = None,
    preprocess: str | None = None,
    threads: int | None = None,
    seconds: float = 60.0,
    shapes: Shapes | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
    leniency: Leniency = STRICT,
    trust: bool = False,
) -> Judged:
    """Judge what `bounds` demand; `show`: the figures without a bound too, but for instructions, which take a while.
    `trust` as in `graphopt.load`.

    Figures come first: they are cheap, and do not disturb the timing. Raises what reading, running and timing raise.
    """
    shapes = shapes or {}
    saved = base.endswith(".json") or new.endswith(".json")
    wanted = {kind.name for kind in KINDS if show and kind.name != "instructions"} | set(bounds.figures)
    rows: list[Row] = []
    if wanted and not saved:
        feeds = sample_feeds([base, new], None, shapes, seed)
        found = [figures_of(path, feeds, wanted, trust) for path in (base, new)]
        rows += judge_figures(found[0], found[1], bounds)

    if data is not None and not saved:
        rows.append(judge_accuracy(base, new, data, preprocess, bounds, progress, trust))
    comparison = None
    if timed:
        comparison = compare_paths(
            base, new, bounds.max_regression, threads, seconds, shapes, seed, progress, leniency, trust
        )
    return Judged(base, new, comparison, tuple(rows))


def gravest(codes: Iterable[int]) -> int:
    """The exit code of several: 4 a regression, before 1 a failure, before 5 inconclusive, before 0."""
    given = set(codes)
    return next((code for code in _GRAVITY if code in given), max(given, default=EXIT_DONE))


def _untimed(base: str, new: str) -> dict[str, Any]:
    return {"schema": 1, "kind": "graphopt.comparison", "verdict": None, "base": base, "new": new}


def cell(row: Row, value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return "-"
    if row.unit == "B":
        return size(value)
    if row.name == "instructions":
        return instructions(int(value))
    return f"{value:.2f} {row.unit}" if row.unit else f"{value:.0f}"


def change(row: Row) -> str:
    """`+1.3 %`, or the difference of percentages in points."""
    if row.change is not None:
        return "=" if row.change == 0 else f"{100 * row.change:+.2f} %"
    if row.name == "accuracy" and row.base is not None and row.new is not None:
        return f"{row.new - row.base:+.2f} points"
    return ""
