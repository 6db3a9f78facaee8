"""Every error graphopt raises on purpose, and the exit code the command line gives it.

Exit codes: 0 done; 1 failure; 2 usage or input; 3 accuracy bound missed; 4 regression, of latency or another figure
with a bound; 5 inconclusive comparison; 6 a remote device or its tracker cannot be reached, was lost or runs another
version of TVM; 130 interrupted by the user. Code 4 and 5 are verdicts, not errors: they are returned by
`graphopt compare`, `graphopt ci run` and `graphopt bisect`, and never raised.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_ACCURACY = 3
EXIT_REGRESSION = 4
EXIT_INCONCLUSIVE = 5
EXIT_DEVICE = 6
EXIT_INTERRUPTED = 130


class GraphoptError(Exception):
    """One clear line: what went wrong, at which node, what to do about it."""

    exit_code = EXIT_FAILURE

    def __init__(self, what: str, *, node: str | None = None, hint: str | None = None):
        self.what = what
        self.node = node
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        where = f" (node {self.node!r})" if self.node else ""
        todo = f"; {self.hint}" if self.hint else ""
        return " ".join(f"{self.what}{where}{todo}".split())


class SpecError(GraphoptError):
    """A pass, target or option was named wrongly."""

    exit_code = EXIT_USAGE


class ModelError(GraphoptError):
    """The model file cannot be read, is invalid, or does not have what was asked of it."""

    exit_code = EXIT_USAGE


class DataError(GraphoptError):
    """Calibration or evaluation data is missing, malformed, or does not fit the model."""

    exit_code = EXIT_USAGE


class ArtifactError(GraphoptError):
    """An artifact folder cannot be read, is damaged, or cannot be written."""

    exit_code = EXIT_USAGE


class PassError(GraphoptError):
    """A pass failed or left the model invalid."""


class VerificationError(GraphoptError):
    """A rewritten or compiled model does not compute what the original computes."""


class AccuracyError(GraphoptError):
    """No variant of the model stays within the accuracy bound."""

    exit_code = EXIT_ACCURACY


class TargetError(GraphoptError):
    """The target cannot lower, tune, build or run the model."""


class DeviceError(TargetError):
    """A remote device or its tracker cannot be reached, was lost, or runs another version of TVM."""

    exit_code = EXIT_DEVICE


class UnsupportedOperatorError(TargetError):
    """The target's compiler has no implementation for some of the model's operators."""


class MeasurementError(GraphoptError):
    """A contender could not be timed: it would not start, crashed, or did not answer in time."""


class EnvironmentMismatchError(MeasurementError):
    """Saved measurements were taken under different conditions: their ratio would mean nothing."""

    exit_code = EXIT_USAGE


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
