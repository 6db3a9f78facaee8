"""A suite's report for whoever reads it: Markdown for job summaries, JUnit XML, annotations of GitHub, a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from graphopt.ci.figures import Row
from graphopt.ci.judged import cell, change
from graphopt.ci.suite import Outcome, SuiteReport

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # what no XML may hold
_FAILED = ("regressed", "error")


def markdown(report: SuiteReport) -> str:
    """A table of the cases, and below it the figures of each."""
    lines = [
        f"## graphopt: {headline(report)}",
        "",
        f"Commit `{_inline(report.commit)}`, {report.time}",
        "",
        "| case | verdict | time, new over base [95 %] | details |",
        "|---|---|---|---|",
    ]
    for outcome in report.outcomes:
        details = "; ".join([outcome.told, *outcome.notes])
        lines.append(
            f"| {_inline(outcome.case.name)} | {_MARKS[outcome.state]} {outcome.state} | {_ratio(outcome)} "
            f"| {_inline(details)} |"
        )
    for outcome in report.outcomes:
        rows = outcome.judged.rows if outcome.judged is not None else ()
        if rows:
            lines += ["", f"<details><summary>Figures of {_inline(outcome.case.name)}</summary>", ""]
            lines += ["| figure | base | new | change | bound | | note |", "|---|---:|---:|---:|---|---|---|"]
            lines += [f"| {' | '.join(_inline(text) for text in _cells(row))} |" for row in rows]
            lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


_MARKS = {
    "passed": "✅",
    "faster": "🚀",
    "identical": "✅",
    "no base": "➖",
    "regressed": "❌",
    "inconclusive": "❔",
    "error": "💥",
}


def headline(report: SuiteReport) -> str:
    """`3 passed, 1 regressed`."""
    states = [outcome.state for outcome in report.outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in _MARKS if state in states) or "no cases"


def _cells(row: Row) -> tuple[str, ...]:
    state = "" if row.state == "shown" else row.state
    return (row.title, cell(row, row.base), cell(row, row.new), change(row), row.bound, state, row.note)


def _ratio(outcome: Outcome) -> str:
    comparison = outcome.judged.comparison if outcome.judged is not None else None
    return str(comparison.ratio) if comparison is not None else "-"


def _inline(text: str) -> str:
    """As text in a cell of a table, whatever it holds."""
    plain = " ".join(_UNPRINTABLE.sub("\ufffd", text).split())
    return re.sub(r"([\\`|<>*_\[\]])", r"\\\1", plain)


def junit(report: SuiteReport) -> str:
    """A test case for the time and for each bounded figure; inconclusive ones are skipped, with the reason."""
    suite = ElementTree.Element("testsuite", name="graphopt", timestamp=report.time)
    for outcome in report.outcomes:
        for name, kind, text in _checks(outcome):
            case = ElementTree.SubElement(suite, "testcase", classname=f"graphopt.{outcome.case.name}", name=name)
            if kind != "passed":
                ElementTree.SubElement(case, kind, message=_UNPRINTABLE.sub("\ufffd", text))
            elif text:
                ElementTree.SubElement(case, "system-out").text = _UNPRINTABLE.sub("\ufffd", text)
    suite.set("tests", str(len(suite)))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _checks(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    """Name, element (`passed` for none) and text of each check."""
    judged = outcome.judged
    if outcome.state == "error":
        yield "run", "error", outcome.told
    elif judged is None or judged.comparison is None:
        yield "run", "skipped" if outcome.state == "no base" else "passed", outcome.told
    else:
        verdict = judged.comparison.verdict.value
        kind = {"slower": "failure", "inconclusive": "skipped"}.get(verdict, "passed")
        yield "latency", kind, judged.comparison.describe()
    kinds = {"over": "failure", "unknown": "skipped", "within": "passed"}
    for row in judged.rows if judged is not None else ():
        if row.state in kinds:
            text = f"{cell(row, row.base)} -> {cell(row, row.new)} {change(row)}, bound {row.bound}; {row.note}"
            yield row.name, kinds[row.state], text


def github_annotations(report: SuiteReport) -> list[str]:
    """GitHub's workflow commands: an error for what failed, a warning for what could not be told."""
    lines = []
    for outcome in report.outcomes:
        level = "error" if outcome.state in _FAILED else "warning" if outcome.state == "inconclusive" else None
        if level is not None:
            title = f"graphopt: {outcome.case.name} {outcome.state}"
            lines.append(f"::{level} title={_property(title)}::{_data(outcome.told)}")
    return lines


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
