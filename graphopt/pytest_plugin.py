"""The pytest plugin: a fixture for those who gate latency in their tests.

    def test_latency(graphopt_latency):
        graphopt_latency("base.onnx", "new.onnx", max_regression="5%", max_size="10%")

A regression fails the test, with the same text as `graphopt compare`; what cannot be told skips it, or fails it with
`--graphopt-inconclusive=fail`. Called without arguments it judges the models of `@pytest.mark.graphopt(base=..., ...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from graphopt.ci.judged import Judged

_SECONDS = 60.0
_BOUNDS = (
    "max_regression", "max_instructions", "max_nodes", "max_kernels", "max_parameters", "max_activations", "max_size",
    "max_drop", "min_snr",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("graphopt", "latency gates")
    group.addoption(
        "--graphopt-inconclusive",
        choices=["skip", "fail"],
        default="skip",
        help="what becomes of tests that cannot tell",
    )
    group.addoption("--graphopt-seconds", type=float, help="budget of a comparison [60]")
    group.addoption("--no-graphopt", action="store_true", help="skip tests that time models")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "graphopt(base, new, **bounds): what the fixture graphopt_latency judges")


class LatencyGate:
    """What the fixture gives: call it to judge a pair."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        mark = request.node.get_closest_marker("graphopt")
        named = dict(zip(("base", "new"), mark.args, strict=False)) if mark else {}
        self._marked: dict[str, Any] = {**named, **(mark.kwargs if mark else {})}

    def __call__(self, base: Any = None, new: Any = None, **options: Any) -> Judged:
        """Judge `new` against `base`: ONNX files or artifacts, relative to the test's folder.

        `options` are the bounds of `graphopt compare` with underscores (max_regression="5%", max_size="10%", ...), and
        data, preprocess, threads (1), seconds, inputs (shapes by name), seed, timed. Returns what was found. Fails the
        test on a regression; skips it where that cannot be told. Raises GraphoptError for what cannot be run.
        """
        from graphopt.ci.figures import parse_bounds
        from graphopt.ci.judged import judge
        from graphopt.errors import EXIT_INCONCLUSIVE, EXIT_REGRESSION, SpecError

        given = {**self._marked, **options}
        marked_base, marked_new = given.pop("base", None), given.pop("new", None)
        base, new = base or marked_base, new or marked_new
        if base is None or new is None:
            raise SpecError("graphopt_latency needs two models", hint="call it with BASE and NEW, or mark the test")
        bounds = parse_bounds(
            {key.replace("_", "-"): given.pop(key) for key in _BOUNDS if key in given}, "graphopt_latency"
        )
        known = ("data", "preprocess", "threads", "seconds", "inputs", "seed", "timed", "trust")
        unknown = [key for key in given if key not in known]
        if unknown:
            hint = f"it has: {', '.join((*_BOUNDS, *known))}"
            raise SpecError(f"graphopt_latency has no option {unknown[0]!r}", hint=hint)
        seconds = self._request.config.getoption("--graphopt-seconds") or given.get("seconds", _SECONDS)
        judged = judge(
            self._path(base),
            self._path(new),
            bounds,
            timed=given.get("timed", True),
            data=None if given.get("data") is None else self._path(given["data"]),
            preprocess=given.get("preprocess"),
            threads=given.get("threads", 1),
            seconds=seconds,
            shapes=given.get("inputs"),
            seed=given.get("seed", 0),
            trust=given.get("trust", False),
        )
        told = describe(judged)
        self._request.node.add_report_section("call", "graphopt", told)
        if judged.comparison is not None:
            self._request.node.user_properties.append(("graphopt_ratio", judged.comparison.ratio.median))
        if judged.exit_code == EXIT_REGRESSION:
            pytest.fail(told, pytrace=False)
        if judged.exit_code == EXIT_INCONCLUSIVE:
            if self._request.config.getoption("--graphopt-inconclusive") == "fail":
                pytest.fail(told, pytrace=False)
            pytest.skip(told)
        return judged

    def _path(self, path: Any) -> str:
        return str(self._request.path.parent / Path(path))


def describe(judged: Judged) -> str:
    """The comparison's lines, and one for each figure that has a bound."""
    from graphopt.ci.judged import cell, change

    lines = [judged.comparison.describe()] if judged.comparison is not None else []
    lines += [
        f"{row.title}: {cell(row, row.base)} -> {cell(row, row.new)} {change(row)}, "
        f"bound {row.bound}: {row.state} {row.note}"
        for row in judged.rows
        if row.state != "shown"
    ]
    return "\n".join(lines)


@pytest.fixture
def graphopt_latency(request: pytest.FixtureRequest) -> LatencyGate:
    """Judge one model against another: `graphopt_latency("base.onnx", "new.onnx", max_regression="5%")`."""
    if request.config.getoption("--no-graphopt"):
        pytest.skip("--no-graphopt")
    return LatencyGate(request)
