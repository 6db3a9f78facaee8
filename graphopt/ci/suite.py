"""`graphopt ci run`: every case of a plan built, judged against the base branch's, and put into one report."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from graphopt import driver
from graphopt import model as models
from graphopt.benchmarking import sample_feeds
from graphopt.ci.figures import Row, figures_of, judge_figures, runs_here
from graphopt.ci.history import Entry
from graphopt.ci.judged import Judged, gravest, judge
from graphopt.ci.plan import Case, Plan
from graphopt.errors import EXIT_ACCURACY, EXIT_DONE, EXIT_FAILURE, GraphoptError, VerificationError
from graphopt.measure import Contender, PairedResult, race
from graphopt.measure.comparison import NEW
from graphopt.progress import SILENT, Progress
from graphopt.runtime.artifact import is_artifact, read_manifest
from graphopt.settings import Settings

SCHEMA = 1
ALONE_S = 5.0
"""For the history, where there is nothing to compare with."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case. `state`: passed, faster, identical, no base, regressed, inconclusive or error."""

    case: Case
    state: str
    told: str
    judged: Judged | None = None
    entry: Entry | None = None
    notes: tuple[str, ...] = ()
    exit_code: int = EXIT_DONE

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "target": self.case.target,
            "base": str(self.case.base),
            "new": str(self.case.new),
            "state": self.state,
            "told": self.told,
            "notes": list(self.notes),
            "exit_code": self.exit_code,
            "median_s": self.entry.median_s if self.entry is not None else None,
            "comparison": self.judged.to_dict() if self.judged is not None else None,
        }


@dataclass(frozen=True)
class SuiteReport:
    """All cases of one commit."""

    commit: str
    outcomes: tuple[Outcome, ...]
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def exit_code(self) -> int:
        return gravest(outcome.exit_code for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "graphopt.ci",
            "commit": self.commit,
            "time": self.time,
            "exit_code": self.exit_code,
            "cases": [outcome.to_dict() for outcome in self.outcomes],
        }


def run_plan(
    plan: Plan,
    commit: str,
    *,
    build: bool = True,
    require_base: bool = False,
    progress: Progress = SILENT,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> SuiteReport:
    """Do every case; what one of them raises becomes its outcome, and the others go on.

    `build` False judges artifacts that are there already. `require_base`: a case without a base is an error.
    """
    outcomes = []
    for case in plan.cases:
        progress.note(f"{case.name}: {case.target}")
        try:
            outcome = _outcome(case, plan, commit, build, require_base, progress)
        except GraphoptError as error:
            outcome = Outcome(case, "error", str(error), exit_code=EXIT_FAILURE)
        outcomes.append(outcome)
        on_outcome(outcome)
    return SuiteReport(commit, tuple(outcomes))


def _outcome(case: Case, plan: Plan, commit: str, build: bool, require_base: bool, progress: Progress) -> Outcome:
    notes: list[str] = []
    if case.model is not None and build:
        notes += _build(case, progress)
    new, base = str(case.new), str(case.base)
    timed = runs_here(new) and (not case.base.exists() or runs_here(base))
    if not timed:
        notes.append("not timed: it was compiled for another processor")
    if not case.base.exists():
        if require_base:
            raise VerificationError(
                f"there is no base {case.base}", hint="build it on the base branch: `graphopt ci build`"
            )
        return _without_base(case, plan, commit, timed, tuple(notes), progress)
    if _identical(base, new):
        entry = _alone(case, plan, commit, timed, (), progress)
        return Outcome(case, "identical", "the same files as the base", entry=entry, notes=tuple(notes))
    judged = judge(
        base,
        new,
        case.bounds,
        timed=timed,
        show=True,
        data=None if case.data is None else str(case.data),
        preprocess=case.preprocess,
        threads=plan.threads,
        seconds=plan.seconds,
        seed=plan.seed,
        progress=progress,
        trust=plan.trust,
    )
    entry = None
    if judged.comparison is not None:
        entry = _entry(case, commit, judged.comparison.runs[-1], judged.rows)
    return Outcome(case, *_state(judged), judged, entry, tuple(notes), judged.exit_code)


def build_cases(plan: Plan, output: Path | None = None, progress: Progress = SILENT) -> list[Path]:
    """Make what would be judged, `output`/NAME: of models that are judged as they are, a copy. `output` None: where the
    plan has it. For the base branch. Raises what optimizing raises."""
    built = []
    for case in plan.cases:
        progress.note(f"{case.name}: {case.target}")
        place = case.new if output is None else output.absolute() / case.name
        if case.model is not None:
            _build(replace(case, new=place), progress)
        elif place != case.new:
            _copy(case.new, place)
        built.append(place)
    return built


def _copy(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True)
    else:
        models.save(models.load(source), place)  # with its external data


def _build(case: Case, progress: Progress) -> list[str]:
    """Optimize the model of `case`. Raises what that raises; notes where the accuracy bound of optimize was missed."""
    settings = Settings(
        model=str(case.model), output=str(case.new), target=case.target, overwrite=True, **dict(case.settings)
    )
    result = driver.run(settings, progress=progress)
    missed = f"optimize missed its accuracy bound (exit code {EXIT_ACCURACY} there)"
    return [] if result.report.accuracy_met else [missed]


def _identical(base: str, new: str) -> bool:
    """Artifacts of the same model and libraries, byte for byte, run by the same engine."""
    if not (is_artifact(base) and is_artifact(new)):
        return False
    ours, theirs = (read_manifest(Path(path)) for path in (base, new))
    return all(ours.get(key) == theirs.get(key) for key in ("files", "engine", "compiled_shapes", "libraries"))


def _without_base(
    case: Case, plan: Plan, commit: str, timed: bool, notes: tuple[str, ...], progress: Progress
) -> Outcome:
    """Only bounds that need no base can be judged; the history begins."""
    new = str(case.new)
    absolute = replace(case.bounds, figures={n: b for n, b in case.bounds.figures.items() if b.most is not None})
    feeds = sample_feeds([new], None, {}, plan.seed)
    wanted = {"nodes", "kernels", "parameter_bytes", "peak_activation_bytes", "size_bytes", *absolute.figures}
    judged = Judged("", new, None, tuple(judge_figures({}, figures_of(new, feeds, wanted), absolute)))
    entry = _alone(case, plan, commit, timed, judged.rows, progress)
    state, told = ("no base", f"nothing at {case.base}") if judged.exit_code == EXIT_DONE else _state(judged)
    return Outcome(case, state, told, judged, entry, notes, judged.exit_code)


def _alone(case: Case, plan: Plan, commit: str, timed: bool, rows: Sequence[Row], progress: Progress) -> Entry | None:
    """For the history, where there is one: timed with nothing beside it."""
    if not timed or plan.history is None:
        return None
    new = str(case.new)
    feeds = sample_feeds([new], None, {}, plan.seed)
    seconds = min(ALONE_S, plan.seconds)
    run = race([Contender.of(new, NEW, plan.trust)], feeds, threads=plan.threads, seconds=seconds, progress=progress)
    return _entry(case, commit, run, rows)


def _entry(case: Case, commit: str, run: PairedResult, rows: Sequence[Row]) -> Entry:
    return Entry(
        commit,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        case.name,
        run.environment.fingerprint,
        run.stats[NEW].median_s,
        {row.name: row.new for row in rows if row.new is not None and math.isfinite(row.new)},
    )


def _state(judged: Judged) -> tuple[str, str]:
    comparison = judged.comparison
    said = comparison.describe().splitlines()[0] if comparison is not None else "figures only"
    unknown = [row.title for row in judged.rows if row.state == "unknown"]
    if judged.over:
        return "regressed", f"over the bound: {', '.join(judged.over)}; {said}"
    if unknown:
        return "inconclusive", f"could not be judged: {', '.join(unknown)}; {said}"
    verdict = comparison.verdict.value if comparison is not None else "same"
    return {"inconclusive": "inconclusive", "faster": "faster"}.get(verdict, "passed"), said
