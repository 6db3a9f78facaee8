"""`graphopt ci` and `graphopt history`: many models in a CI, and what became of their latency."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from graphopt import errors
from graphopt.ci import history as histories
from graphopt.ci.change_points import change_points
from graphopt.ci.figures import fraction
from graphopt.ci.history_page import history_page, sparkline
from graphopt.ci.plan import FILE, read_plan
from graphopt.console import STDERR, STDOUT, ConsoleProgress
from graphopt.whole_files import write_whole

CONFIG = click.option("--config", type=click.Path(path_type=Path), default=FILE, show_default=True)
ONLY = click.option("--only", multiple=True, metavar="MODEL", help="This model alone; may be given again.")


@click.group()
def ci() -> None:
    """Gate several models and targets in a CI, as graphopt.toml says."""


@ci.command()
@CONFIG
@ONLY
@click.option("--no-build", is_flag=True, help="Judge the artifacts that are there; optimize nothing.")
@click.option("--require-base", is_flag=True, help="A model without a base is an error.")
@click.option("--allow-inconclusive", is_flag=True, help="Exit 0 instead of 5.")
@click.option("--trust", is_flag=True, help="Load a base that another machine compiled: docs/security.md.")
@click.option("--commit", help="Default: what the CI says, else what is checked out.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def run(config, only, no_build, require_base, allow_inconclusive, trust, commit, format_, quiet, verbose) -> int:
    """Build and judge every model of graphopt.toml; one report.

    Exit 0: within all bounds. 4: a regression. 1: a model could not be built or judged. 5: something could not be
    told. The report's folder gets report.json, report.md and junit.xml; on GitHub the job summary and annotations are
    written too.
    """
    from graphopt.ci.reports import github_annotations, headline, junit, markdown
    from graphopt.ci.suite import Outcome, run_plan

    plan = replace(read_plan(config, tuple(only)), trust=trust)
    progress = ConsoleProgress(quiet)

    def told(outcome: Outcome) -> None:
        progress.note("; ".join([f"{outcome.case.name}: {outcome.state}", outcome.told, *outcome.notes]))

    report = run_plan(
        plan,
        commit or histories.current_commit(config.absolute().parent),
        build=not no_build,
        require_base=require_base,
        progress=progress,
        on_outcome=told,
    )
    write_whole(plan.report / "report.json", json.dumps(report.to_dict(), indent=1) + "\n")
    write_whole(plan.report / "report.md", markdown(report))
    write_whole(plan.report / "junit.xml", junit(report))
    entries = [outcome.entry for outcome in report.outcomes if outcome.entry is not None]
    if plan.history is not None and entries:
        histories.append(plan.history, entries)
    if format_ == "json":
        click.echo(json.dumps(report.to_dict()))
    else:
        STDOUT.print(_outcomes(report))
        STDOUT.print(f"{headline(report)}. Report: {plan.report}", markup=False, soft_wrap=True)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(report):
            click.echo(line, err=format_ == "json")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown(report))
    if report.exit_code == errors.EXIT_INCONCLUSIVE and allow_inconclusive:
        return errors.EXIT_DONE
    return report.exit_code


def _outcomes(report) -> Table:
    table = Table()
    for heading in ("model", "verdict", "time, new over base [95 %]", "details"):
        table.add_column(heading, overflow="fold")
    styles = {"regressed": "red", "error": "red", "inconclusive": "yellow", "faster": "green", "passed": "green"}
    for outcome in report.outcomes:
        comparison = outcome.judged.comparison if outcome.judged is not None else None
        table.add_row(
            Text(outcome.case.name),
            Text(outcome.state, style=styles.get(outcome.state, "")),
            str(comparison.ratio) if comparison is not None else "-",
            Text("; ".join([outcome.told, *outcome.notes])),
        )
    return table


@ci.command()
@CONFIG
@ONLY
@click.option("--output", type=click.Path(path_type=Path), help="Folder for NAME; default: the plan's own.")
@click.option("-q", "--quiet", is_flag=True)
@click.option("-v", "--verbose", is_flag=True)
def build(config, only, output, quiet, verbose) -> int:
    """Make what `ci run` would judge, and judge nothing: for the base branch."""
    from graphopt.ci.suite import build_cases

    for place in build_cases(read_plan(config, tuple(only)), output, ConsoleProgress(quiet)):
        STDOUT.print(str(place), markup=False, soft_wrap=True)
    return errors.EXIT_DONE


@ci.command()
@click.argument("models", nargs=-1, type=click.Path())
@click.option("--gitlab", is_flag=True, help="For GitLab instead of GitHub Actions.")
@click.option("--branch", default="main", show_default=True, help="The branch that others are compared with.")
@click.option(
    "--install", default="pip install graphopt", show_default=True, help="The command that installs graphopt."
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
def init(models, gitlab, branch, install, force) -> int:
    """Write a CI workflow, and a graphopt.toml of MODELS where there is none, into the current folder."""
    from graphopt.ci.workflows import GITLAB, GITLAB_ROOT, planned_files, write_files

    folder = Path.cwd()
    files = planned_files(folder, models, gitlab, branch, install)
    write_files(files, force)
    for path in files:
        STDOUT.print(str(path.relative_to(folder)), markup=False)
    if gitlab and folder / GITLAB_ROOT not in files:
        STDERR.print(f"Add to {GITLAB_ROOT}, unless it is there: include: [{{local: {GITLAB}}}]", markup=False)
    return errors.EXIT_DONE


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default="latency.jsonl")
@click.option("--case", "cases", multiple=True, help="This case alone; may be given again.")
@click.option("--min-change", default="2%", show_default=True, help="Tell of changes of this much at least.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a page with plots: .html.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-v", "--verbose", is_flag=True)
def history(file, cases, min_change, output, format_, verbose) -> int:
    """Latency by commit, as `ci run` appended it to FILE, and where its level changed."""
    least = fraction(min_change, "--min-change")
    entries, spoilt = histories.read(file)
    if spoilt:
        STDERR.print(f"{file}: {spoilt} lines are no entries; they are left out", markup=False)
    known = histories.series(entries)
    for case in cases:
        if case not in {name for name, _ in known}:
            raise errors.SpecError(
                f"{file} has no case {case!r}", hint=f"it has: {', '.join(sorted({n for n, _ in known}))}"
            )
    kept = {key: line for key, line in known.items() if not cases or key[0] in cases}
    changes = {key: change_points([e.median_s for e in line], least) for key, line in kept.items()}
    if output is not None:
        write_whole(output, history_page(kept, changes))
    if format_ == "json":
        click.echo(json.dumps([_plain(key, line, changes[key]) for key, line in kept.items()]))
        return errors.EXIT_DONE
    for (case, machine), line in kept.items():
        last = line[-1]
        STDOUT.print(
            f"{case} on {machine[:12]}: {len(line)} commits, now {1e3 * last.median_s:.3f} ms",
            markup=False,
            soft_wrap=True,
        )
        STDOUT.print(f"  {sparkline([e.median_s for e in line])}", markup=False, soft_wrap=True)
        for change in changes[case, machine]:
            entry = line[change.index]
            STDOUT.print(
                f"  {'slower' if change.ratio > 1 else 'faster'} since {entry.commit[:12]} ({entry.time}): "
                f"{1e3 * change.before:.3f} -> {1e3 * change.after:.3f} ms, {100 * (change.ratio - 1):+.1f} % "
                f"(p = {change.p_value:.4f})",
                markup=False,
                soft_wrap=True,
            )
    return errors.EXIT_DONE


def _plain(key, line, changes) -> dict:
    return {
        "case": key[0],
        "fingerprint": key[1],
        "commits": [{"commit": e.commit, "time": e.time, "median_s": e.median_s} for e in line],
        "changes": [
            {
                "commit": line[c.index].commit,
                "before_s": c.before,
                "after_s": c.after,
                "ratio": c.ratio,
                "p_value": c.p_value,
            }
            for c in changes
        ],
    }
