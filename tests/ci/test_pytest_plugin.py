"""The plugin in a pytest of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = "pytester"
DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture
def gated(pytester):
    """Runs a test file with the plugin, whether or not the installed package registers it."""
    shutil.copy(DIGITS / "digits.onnx", pytester.path / "digits.onnx")

    def run(text: str, *arguments: str):
        pytester.makepyfile(text)
        return pytester.runpytest_subprocess("-p", "no:graphopt", "-p", "graphopt.pytest_plugin", *arguments)

    return run


def test_a_latency_is_judged(gated):
    result = gated(
        """
        def test_latency(graphopt_latency):
            found = graphopt_latency("digits.onnx", "digits.onnx", max_regression="400%", seconds=10)
            assert found.comparison.verdict.value == "same"
        """,
        "-rs",
    )
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) + outcomes.get("skipped", 0) == 1, result.stdout.str()  # busy: it may not tell


def test_figures_fail_and_are_explained(gated):
    result = gated(
        """
        import pytest

        def test_over(graphopt_latency):
            graphopt_latency("digits.onnx", "digits.onnx", timed=False, max_nodes="3")

        @pytest.mark.graphopt("digits.onnx", new="digits.onnx", timed=False, max_nodes="+0")
        def test_marked(graphopt_latency):
            graphopt_latency()

        def test_unknown(graphopt_latency):
            graphopt_latency("digits.onnx", "digits.onnx", timed=False, max_kernels="+0")
        """,
        "--strict-markers",
    )
    result.assert_outcomes(failed=1, passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*nodes of the graph: 16 -> 16 =, bound 3: over*"])


def test_what_cannot_be_told_may_fail(gated):
    text = """
        def test_unknown(graphopt_latency):
            graphopt_latency("digits.onnx", "digits.onnx", timed=False, max_kernels="+0")
        """
    gated(text, "--graphopt-inconclusive=fail").assert_outcomes(failed=1)
    gated(text, "--no-graphopt").assert_outcomes(skipped=1)


def test_wrong_use_is_told(gated):
    result = gated(
        """
        def test_nothing(graphopt_latency):
            graphopt_latency()

        def test_option(graphopt_latency):
            graphopt_latency("digits.onnx", "digits.onnx", max_siz="1%")
        """
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*needs two models*", "*has no option 'max_siz'*"])
